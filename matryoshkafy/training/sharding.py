"""Tensors that FSDP2 has sharded over processes: whole for saving, and sharded again."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; where it is sharded every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(value: object, like: object) -> object:
    """A whole value sharded as `like` is, where that is sharded and of the same shape."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with whole tensors on the CPU, for a doll that is not sharded.

    After training under fully_shard: `state = full_state(everything)` on every process, then on
    one `doll.load_state_dict(state)` of a freshly converted doll, to be saved and sliced.

    Args:
        model: a module whose parameters FSDP2 may have sharded.
    """
    return {name: whole(tensor).detach().cpu() for name, tensor in model.state_dict().items()}
