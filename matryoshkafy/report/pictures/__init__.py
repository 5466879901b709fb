"""SVG drawings of a plan, of a nested weight, of what sizes cost and achieve; no dependency."""

from matryoshkafy.report.pictures.charts import bars as bars
from matryoshkafy.report.pictures.charts import colour as colour
from matryoshkafy.report.pictures.charts import lines as lines
from matryoshkafy.report.pictures.plans import groups as groups
from matryoshkafy.report.pictures.svg import STYLE as STYLE
from matryoshkafy.report.pictures.svg import sized as sized
from matryoshkafy.report.pictures.svg import standalone as standalone
from matryoshkafy.report.pictures.tradeoffs import Point as Point
from matryoshkafy.report.pictures.tradeoffs import tradeoff as tradeoff
from matryoshkafy.report.pictures.weights import drawn_layer as drawn_layer
from matryoshkafy.report.pictures.weights import weight as weight
