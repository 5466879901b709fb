"""spare(): a copy of the user's model that may be called, traced and trained without a trace left.

A forward may write: running statistics, codebooks through `.data`, buffers that it assigns anew,
attributes that it makes at its first call. Whatever looks at a model does so on a spare.
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import copy
import enum
import random
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.closures import rebind

TABLES = ("_parameters", "_buffers", "_modules")
EMPTY = (dict, OrderedDict)
CONSTANT = (str, int, float, bool, type(None), Tensor)
# What is no object with attributes of its own, which a forward may read and set.
NO_OBJECT = (
    Tensor,
    nn.Module,
    enum.Enum,
    type,
    types.ModuleType,
    types.FunctionType,
    str,
    bytes,
)


@contextlib.contextmanager
def spare(model: nn.Module) -> Generator[nn.Module, None, None]:
    """Yield a model that computes as the user's does and may be changed; random numbers go on as
    if nothing had been drawn.

    Its tensors share memory with the user's until one of them is written; what cannot be copied
    (locks, handles, generators) is shared. Raises `TraceError` for a module that refuses.
    """
    with chance_kept():
        yield _copied(model)


@contextlib.contextmanager
def chance_kept() -> Generator[None, None, None]:
    """The random numbers of torch, numpy and Python afterwards are those that were due before."""
    numpy = sys.modules.get("numpy")
    own, theirs = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with forked():
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(theirs)


# torch gives the two no types.
forked = cast(
    "Callable[..., AbstractContextManager[None]]",
    torch.random.fork_rng,  # pyright: ignore[reportUnknownMemberType]
)
seed_torch = cast(
    "Callable[[int], torch.Generator]",
    torch.manual_seed,  # pyright: ignore[reportUnknownMemberType]
)


def drawn_by_others() -> tuple[object, ...]:
    """Return a state that moves with each random number of Python or numpy."""
    numpy = sys.modules.get("numpy")
    state: dict[str, Any] = {}
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)["state"]
    theirs = (v.tobytes() if hasattr(v, "tobytes") else v for v in state.values())
    return random.getstate(), *theirs


def reseed_others(seed: int) -> None:
    """Seed the random numbers that a trace does not see: Python's and numpy's."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def copied_inputs(
    args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's inputs as memory of their own: a forward may write into them."""
    return pytree.tree_map(_copied_input, (tuple(args), dict(kwargs)))


def _copied_input(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return copied_tensor(leaf)
    if isinstance(leaf, NO_OBJECT) or not getattr(leaf, "__dict__", None):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # noqa: BLE001  a user's object may hold anything
        return leaf


def copied_tensor(value: Tensor) -> Tensor:
    """Return a tensor in memory of its own, which may have a gradient where this one may."""
    return value.detach().clone().requires_grad_(value.requires_grad)


def untouched(mine: Tensor, theirs: Tensor) -> bool:
    """Two copies of a tensor that still share its memory: nothing was written to either."""
    shares = cast("Callable[[Tensor], bool]", torch._C._is_cow_tensor)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    return shares(mine) and shares(theirs)


def _copied(model: nn.Module) -> nn.Module:
    twins = _twins(model) | _empty_tables(model)
    try:
        return _deeply(model, dict(twins))
    except Exception:  # noqa: BLE001  a user's module may hold anything
        shared = {id(value): value for value in _stubborn(model, twins)}
    try:
        return _deeply(model, twins | shared)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a "
            "model is only looked at in a copy, since a forward may change it. Expected modules "
            "that copy.deepcopy accepts: define __deepcopy__ on the one that does not."
        ) from error


def _deeply(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    twin = copy.deepcopy(model, memo)
    rebind(twin, memo)
    return twin


def _stubborn(model: nn.Module, twins: Mapping[int, object]) -> Iterator[object]:
    """Yield the attributes of modules that cannot be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name in TABLES or isinstance(value, (nn.Module, *CONSTANT)):
                continue
            try:
                copy.deepcopy(value, dict(twins))
            except Exception:  # noqa: BLE001  a user's module may hold anything
                yield value


def _twins(model: nn.Module) -> dict[int, object]:
    """Return {id: twin} of the tensors that own their storage, as `deepcopy` looks them up."""
    tensors = {id(t): t for t in _tensors(model) if _is_plain(t)}
    owners = Counter(t.untyped_storage()._cdata for t in tensors.values())
    twins: dict[int, object] = {}
    for key, tensor in tensors.items():
        if owners[tensor.untyped_storage()._cdata] == 1:
            with contextlib.suppress(RuntimeError):  # memory that cannot be shared lazily is copied
                twins[key] = _twin(tensor)
    return twins


def _empty_tables(model: nn.Module) -> dict[int, object]:
    """Return {id: twin} of the tables without entries: a module has a dozen, for hooks mostly, and
    `deepcopy` spends half its time on them.
    """
    tables = (t for m in model.modules() for t in vars(m).values() if type(t) in EMPTY and not t)
    return {id(table): type(table)() for table in tables}


def _twin(tensor: Tensor) -> Tensor:
    data = torch._lazy_clone(tensor.detach())  # type: ignore[reportPrivateImportUsage]
    if isinstance(tensor, nn.Parameter):
        twin: Tensor = nn.Parameter(data, requires_grad=tensor.requires_grad)
    else:
        twin = data.requires_grad_(tensor.requires_grad and tensor.is_leaf)
    for name, value in vars(tensor).items():
        setattr(twin, name, value)
    return twin


def _is_plain(tensor: Tensor) -> bool:
    known = type(tensor) in (Tensor, nn.Parameter)
    return known and tensor.layout == torch.strided and not tensor.is_meta


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for holder in (module.__dict__, module._parameters, module._buffers):
            yield from (value for value in holder.values() if isinstance(value, Tensor))
