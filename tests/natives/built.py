"""A model of the user's own, as the command line names it."""

from tests.natives.test_native import IDS, Net

example_inputs = IDS


def model() -> Net:
    return Net().eval()
