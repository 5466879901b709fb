"""Order: a pretrained model's units, the most important first, its function unchanged."""

from matryoshkafy.order.order import order as order
from matryoshkafy.order.permute import OrderError as OrderError
from matryoshkafy.order.report import OrderReport as OrderReport
