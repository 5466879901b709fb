"""What nested sizes are for at serving time: funnels, cascades, one table for all sizes."""

from matryoshkafy.serving.cascade import Cascade as Cascade
from matryoshkafy.serving.cascade import Routed as Routed
from matryoshkafy.serving.cascade import fit_cascade as fit_cascade
from matryoshkafy.serving.decoding import Decoder as Decoder
from matryoshkafy.serving.decoding import Generated as Generated
from matryoshkafy.serving.funnel import Ranking as Ranking
from matryoshkafy.serving.funnel import exact as exact
from matryoshkafy.serving.funnel import funnel as funnel
from matryoshkafy.serving.index import ShortIndex as ShortIndex
from matryoshkafy.serving.ranks import Banned as Banned
from matryoshkafy.serving.ranks import metrics_by_size as metrics_by_size
from matryoshkafy.serving.rotation import Rotation as Rotation
from matryoshkafy.serving.rotation import fit_rotation as fit_rotation
from matryoshkafy.serving.rotation import train_rotation as train_rotation
from matryoshkafy.serving.router import fit_projection as fit_projection
from matryoshkafy.serving.router import save_router as save_router
from matryoshkafy.serving.session import Session as Session
from matryoshkafy.serving.tune import Setting as Setting
from matryoshkafy.serving.tune import tune as tune
from matryoshkafy.serving.vectors import ServingError as ServingError
from matryoshkafy.serving.vectors import Vectors as Vectors
