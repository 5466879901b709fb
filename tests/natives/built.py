"""A model of the user's own, as the command line names it."""

from torch import nn

from tests.natives.test_native import IDS, Net

example_inputs = IDS


def model() -> Net:
    return Net().eval()


def from_weights(path: str = "weights.pt", width: int = 32) -> Net:
    """A class that is not made without its weights."""
    open(path).close()
    return Net(width).eval()


def of_one_size(name: str = "llama") -> nn.Module:
    """A builder that takes no width."""
    import transformers

    from tests.natives.test_saving import LLAMA

    assert name
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
