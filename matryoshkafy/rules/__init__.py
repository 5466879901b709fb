"""How axes cross each op: one file per family, one row per op."""

from matryoshkafy.rules import attention as attention
from matryoshkafy.rules import contraction as contraction
from matryoshkafy.rules import convolution as convolution
from matryoshkafy.rules import creation as creation
from matryoshkafy.rules import indexing as indexing
from matryoshkafy.rules import pieces as pieces
from matryoshkafy.rules import pointwise as pointwise
from matryoshkafy.rules import recurrent as recurrent
from matryoshkafy.rules import reduction as reduction
from matryoshkafy.rules import space as space
from matryoshkafy.rules import view as view

from matryoshkafy.rules import algebra as algebra  # isort: skip  it says more of rows that stand
from matryoshkafy.rules.table import OPS as OPS
from matryoshkafy.rules.table import Args as Args
from matryoshkafy.rules.table import Op as Op
from matryoshkafy.rules.table import Sizes as Sizes
from matryoshkafy.rules.table import Terms as Terms
from matryoshkafy.rules.table import Walk as Walk
from matryoshkafy.rules.table import Weight as Weight
from matryoshkafy.rules.table import op_of as op_of
from matryoshkafy.rules.table import rule as rule
