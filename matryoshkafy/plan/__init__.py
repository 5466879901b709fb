"""What nests, decided once and frozen."""

from matryoshkafy.old_names import forwarder

# `from matryoshkafy.plan import Plan`, as in version 0.1; gone in the next version.
OLD = ("Plan", "Options", "Group", "Whole", "Unknown", "Scalar", "Action")
__getattr__ = forwarder(__name__, f"{__name__}.plan", OLD)
