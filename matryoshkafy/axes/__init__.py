"""The algebra of axes: what a tensor dimension is made of.

`terms` describe a dimension while the graph is walked, `unify` makes two of them one, and `dims`
are what is left once it is known which groups nest.
"""

from matryoshkafy.axes.terms import COPIES as COPIES
from matryoshkafy.axes.terms import Axis as Axis
from matryoshkafy.axes.terms import Reason as Reason
from matryoshkafy.axes.terms import Sum as Sum
from matryoshkafy.axes.terms import Term as Term
from matryoshkafy.axes.terms import copies as copies
from matryoshkafy.axes.terms import fix as fix
from matryoshkafy.axes.terms import is_fixed as is_fixed
from matryoshkafy.axes.terms import leaves as leaves
from matryoshkafy.axes.terms import resolve as resolve
from matryoshkafy.axes.terms import size as size
from matryoshkafy.axes.unify import concatenate as concatenate
from matryoshkafy.axes.unify import cut as cut
from matryoshkafy.axes.unify import regroup as regroup
from matryoshkafy.axes.unify import unify as unify
