"""SVG drawings of a plan, of a nested weight, of what sizes cost and achieve; no dependency."""

from matryoshkafy.pictures.charts import bars as bars
from matryoshkafy.pictures.charts import colour as colour
from matryoshkafy.pictures.charts import lines as lines
from matryoshkafy.pictures.plans import groups as groups
from matryoshkafy.pictures.svg import STYLE as STYLE
from matryoshkafy.pictures.svg import standalone as standalone
from matryoshkafy.pictures.weights import drawn_layer as drawn_layer
from matryoshkafy.pictures.weights import weight as weight
