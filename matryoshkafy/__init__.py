"""matryoshkafy makes any PyTorch model a matryoshka doll: train once, deploy any size."""

from matryoshkafy.checkpoint import load as load
from matryoshkafy.checkpoint import save as save
from matryoshkafy.checks import verify as verify
from matryoshkafy.converting import convert as convert
from matryoshkafy.converting import inspect as inspect
from matryoshkafy.doll import Doll as Doll
from matryoshkafy.errors import MatryoshkafyError as MatryoshkafyError
from matryoshkafy.plan import Plan as Plan
from matryoshkafy.rules import rule as rule
from matryoshkafy.slicing import slice as slice
