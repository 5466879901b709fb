"""What a person gives as a model and its inputs becomes one call: a module, args and kwargs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.doll import tables_of
from matryoshkafy.dolls.libraries import made_inputs
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.copies import spare
from matryoshkafy.graph.holders import Rebuilt, holds, reads_of, taken_apart
from matryoshkafy.graph.quiet import silent
from matryoshkafy.graph.signature import as_inputs

STATE = (Tensor, nn.Module, torch.Generator)


@dataclass(frozen=True)
class Call:
    """A module whose forward is traced, on these inputs."""

    model: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


def call_of(
    model: object, args: object, kwargs: Mapping[str, object] | None, method: str = "forward"
) -> Call:
    """Return the call that a person means.

    Args:
        model: the user's module.
        args: a tensor, a sequence, or a mapping of keyword inputs; None where they can be made.
        kwargs: keyword inputs.
        method: which of the model's methods is its forward.

    Raises:
        TraceError: the model is no module, or has no such method; or it has values, and torch's
            default device has none.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"a {type(model).__name__} was given as the model; expected a torch.nn.Module. Give "
            "the module itself, not its class, its path or its output."
        )
    if method != "forward":
        model = Another(model, _method_of(model, method))
    if args is None and kwargs is None:
        call = Call(model, *made_inputs(model))
    else:
        names = inspect.signature(model.forward).parameters
        call = Call(model, *as_inputs(args, kwargs, names))
    call = _taken_apart(call)
    refuse_meta(model, (call.args, call.kwargs))
    return call


def _taken_apart(call: Call) -> Call:
    """Return the call with its objects as named tuples, on a module that takes these."""
    given = call.args, dict(call.kwargs)
    if not any(map(holds, pytree.tree_leaves(given))):
        return call
    with silent(), spare(call.model) as twin:
        reads = reads_of(twin, *given)
    kinds: dict[type, type] = {}
    args, kwargs = cast("tuple[Any, Any]", taken_apart(given, reads, kinds))
    return Call(Another(call.model, Rebuilt(call.model.forward, kinds)), args, kwargs)


def refuse_meta(model: nn.Module, inputs: object) -> None:
    """Refuse a default device of no values around a model, or inputs, that have some.

    What a forward makes there (zeros, a range) is on another device than its weights.

    Raises:
        TraceError: says where the model is, and what to do.
    """
    if torch.get_default_device().type != "meta":
        return
    leaves = (*model.parameters(), *model.buffers(), *pytree.tree_leaves(inputs))
    real = next((t for t in leaves if isinstance(t, Tensor) and not t.is_meta), None)
    if real is not None:
        raise TraceError(
            "torch's default device is 'meta', whose tensors have no values, while model or inputs "
            f"are on {str(real.device)!r}; expected one device for all. Leave `with "
            'torch.device("meta"):` (or set_default_device) before this call; model and inputs '
            "that are both on meta are taken inside of it, too."
        )


class Another(nn.Module):
    """A module with another forward than the user's, over the user's own state.

    It shares the tables of the user's module, so names stay as they are; the mode is the user's.

    Args:
        owner: the user's module.
        forward: what it computes.
    """

    def __init__(self, owner: nn.Module, forward: Callable[..., Any]) -> None:
        self.__dict__["owner"] = owner
        super().__init__()
        self.__dict__.update(tables_of(owner))
        self.__dict__["forward"] = forward

    @property
    def training(self) -> bool:
        """The mode of the user's module."""
        return self.__dict__["owner"].training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # nn.Module.__init__ sets a mode of its own before there are tables.
        if "_modules" in self.__dict__:
            self.__dict__["owner"].training = mode

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["owner"], name)


def _method_of(owner: nn.Module, method: str) -> Callable[..., Any]:
    found = getattr(owner, method, None)
    if callable(found) and not isinstance(found, nn.Module):
        return found
    raise TraceError(
        f"method={method!r} was given, but {type(owner).__name__} has no such method; "
        f"expected the name of one that computes with the model: {_methods(owner)}"
    )


def _methods(owner: nn.Module) -> str:
    own = [n for n, v in vars(type(owner)).items() if callable(v) and not n.startswith("_")]
    return ", ".join(own[:8]) or "it has none of its own"


def plain_attributes(model: nn.Module) -> dict[str, object]:
    """Return what the user's model says of itself: attributes that hold no tensor and no module.

    `config` of transformers is one; private names, functions and the mode are none.
    """
    model = model.__dict__["owner"] if isinstance(model, Another) else model
    public = {n: v for n, v in vars(model).items() if not n.startswith("_") and n != "training"}
    return {
        name: value
        for name, value in public.items()
        if not callable(value)
        and not any(isinstance(leaf, STATE) for leaf in pytree.tree_leaves(value))
    }
