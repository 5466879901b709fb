"""What training code of one's own needs beside a doll and a loss.

The Trainer of transformers is in `matryoshkafy.training.huggingface`, which alone imports it.
"""

from matryoshkafy.training.all_sizes import AllSizes as AllSizes
from matryoshkafy.training.all_sizes import StepLoss as StepLoss
from matryoshkafy.training.all_sizes import own_loss as own_loss
from matryoshkafy.training.blaming import Blame as Blame
from matryoshkafy.training.blaming import NonFiniteLoss as NonFiniteLoss
from matryoshkafy.training.blaming import first_non_finite as first_non_finite
from matryoshkafy.training.corrections import Corrections as Corrections
from matryoshkafy.training.distil import distil as distil
from matryoshkafy.training.initialising import scale_rows as scale_rows
from matryoshkafy.training.recipes import DistilError as DistilError
from matryoshkafy.training.recipes import Recipe as Recipe
from matryoshkafy.training.recipes import Term as Term
from matryoshkafy.training.replaying import Replayed as Replayed
from matryoshkafy.training.replaying import ReplayError as ReplayError
from matryoshkafy.training.resuming import ResumeError as ResumeError
from matryoshkafy.training.resuming import batches as batches
from matryoshkafy.training.resuming import resume_run as resume_run
from matryoshkafy.training.resuming import save_run as save_run
from matryoshkafy.training.sentences import NestedSentenceLoss as NestedSentenceLoss
from matryoshkafy.training.sentences import SentenceLossError as SentenceLossError
from matryoshkafy.training.sharding import full_state as full_state
from matryoshkafy.training.watching import RunLog as RunLog
