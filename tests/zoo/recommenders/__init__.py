"""Recommenders: small ones in `classic`, and eleven published systems in their authors' structure.

Each of them is written anew after its paper and public code: the parameters carry the authors'
names, so that their checkpoints load, and the forward takes the same steps.
"""

from tests.zoo.recommenders import bert4rec as bert4rec
from tests.zoo.recommenders import classic as classic
from tests.zoo.recommenders import fmlp_rec as fmlp_rec
from tests.zoo.recommenders import fmrlrec as fmrlrec
from tests.zoo.recommenders import hstu as hstu
from tests.zoo.recommenders import lru_rec as lru_rec
from tests.zoo.recommenders import mmssl as mmssl
from tests.zoo.recommenders import recformer as recformer
from tests.zoo.recommenders import sasrec as sasrec
from tests.zoo.recommenders import unisrec as unisrec
from tests.zoo.recommenders import vip5 as vip5
from tests.zoo.recommenders import vq_rec as vq_rec

PUBLISHED = (
    "published_sasrec",
    "published_sasrec_two_heads",
    "published_bert4rec",
    "published_fmlp_rec",
    "published_lru_rec",
    "published_unisrec",
    "published_unisrec_ids",
    "published_vq_rec",
    "published_recformer",
    "published_mmssl",
    "published_vip5",
    "published_fmrlrec",
    "published_hstu",
)
