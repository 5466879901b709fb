"""Random models out of the supported ops, and the laws that each of them must keep."""
