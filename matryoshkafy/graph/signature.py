"""How the user's call becomes the flat inputs of the graph, and its flat outputs the result."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.guards import Guards
from matryoshkafy.graph.holders import is_array, like


def parameter_names(model: nn.Module) -> tuple[list[str], bool]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return names, any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


def named_args(model: nn.Module, args: tuple[object, ...]) -> dict[str, object]:
    names, variadic = parameter_names(model)
    if variadic or len(args) > len(names):
        names = names[: len(args)]
        names += [f"args_{i}" for i in range(len(args) - len(names))]
    return dict(zip(names, args, strict=False))


def as_inputs(
    args: object, kwargs: Mapping[str, object] | None, names: Collection[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs of what a person gives as example inputs.

    Args:
        args: a tensor, a sequence of positional inputs, or a mapping (also what a tokenizer
            returns): keyword inputs where it has a key of `names`, else the one positional input.
        kwargs: keyword inputs.
        names: what the forward calls its arguments.
    """
    named = dict(kwargs or {})
    if isinstance(args, Mapping):
        given = cast("Mapping[str, object]", args)
        if not set(names).isdisjoint(given):
            return (), {**given, **named}
        # What a tokenizer returns becomes a plain one; a dictionary of a class of its own does not.
        own = isinstance(given, dict) and any(v is given for v in pytree.tree_leaves(given))
        return (given if own else dict(given),), named
    if isinstance(args, (tuple, list)):
        return tuple(cast("Sequence[object]", args)), named
    return () if args is None else (args,), named


# Arguments that a doll answers for: it has no cache, and returns what it was traced to return.
WITHOUT_EFFECT = frozenset(("use_cache", "return_dict"))


@dataclass(frozen=True)
class Input:
    """One argument of the user's forward: its structure, and per leaf a placeholder or a constant.

    `bounds` are the least and largest value of each example tensor (None: unknown, or no tensor).
    A constant is `optional` where a call without it means the traced value: the forward's own
    default is not another one.
    """

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[object, ...]
    is_tensor: tuple[bool, ...]
    bounds: tuple[tuple[float, float] | None, ...] = ()
    optional: bool = True


@dataclass(frozen=True)
class Filled:
    """An input that a call may leave out: then it is full of `value`, of the shape of `like`."""

    name: str
    like: str
    value: int
    dtype: torch.dtype

    def made(self, like: torch.Tensor) -> torch.Tensor:
        """Return the default for a call whose `like` this is."""
        return torch.full_like(like, self.value, dtype=self.dtype)


@dataclass(frozen=True)
class Signature:
    """How the user's call becomes the flat inputs of the graph, and its flat outputs the result.

    `guards` say for which sizes and kinds of inputs the graph is right; `filled` which inputs may
    be left out.
    """

    positional: tuple[str, ...]
    inputs: tuple[Input, ...]
    out_spec: pytree.TreeSpec
    guards: Guards = Guards()
    filled: tuple[Filled, ...] = ()

    def flatten(self, args: Sequence[object], kwargs: Mapping[str, object]) -> list[torch.Tensor]:
        """Return the flat tensors of a call.

        Raises `TraceError` when it is not the traced call, `GuardError` when its sizes are outside
        of what the trace is right for.
        """
        given = dict(zip(self.positional, args, strict=False)) | dict(kwargs)
        if len(args) > len(self.positional):
            raise TraceError(
                f"{len(args)} positional arguments were given, the traced forward takes "
                f"{len(self.positional)}: {', '.join(self.positional)}"
            )
        flat: list[torch.Tensor] = []
        known = {item.name for item in self.inputs}
        given = self._completed(given, known)
        for item in self.inputs:
            flat.extend(_leaves_of(item, given))
        for name, value in given.items():
            if name not in known and value is not None:
                raise TraceError(
                    f"argument {name!r} was not part of the example inputs, so its path was not "
                    f"traced; convert again with {name!r} among the example inputs"
                )
        self.guards.check(flat)
        return flat

    def by_position(self, values: Sequence[object]) -> list[torch.Tensor]:
        """Return the flat tensors of a call without names: keywords follow in the traced order."""
        names = [item.name for item in self.inputs]
        tensors = [item.name for item in self.inputs if any(item.is_tensor)]
        bound = next((n for n in (tensors, names) if len(n) == len(values)), None)
        if bound is None or set(tensors) <= set(self.positional[: len(values)]):
            return self.flatten(values, {})
        return self.flatten((), dict(zip(bound, values, strict=True)))

    def _completed(self, given: dict[str, object], known: Collection[str]) -> dict[str, object]:
        """Fill in what is missing, and leave out a default that the trace does without."""
        for default in self.filled:
            value, like = given.get(default.name), given.get(default.like)
            if not isinstance(like, torch.Tensor):
                continue
            if default.name in known and value is None:
                given = {**given, default.name: default.made(like)}
            spare = isinstance(value, torch.Tensor) and default.name not in known
            if spare and bool(torch.all(torch.eq(cast("torch.Tensor", value), default.value))):
                given = {**given, default.name: None}
        return given

    def call(self, flat: Iterable[object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the (args, kwargs) that `flatten` takes apart into these tensors."""
        tensors = iter(flat)
        values = {item.name: _value(item, tensors) for item in self.inputs}
        args: list[Any] = []
        for name in self.positional:
            if name not in values:
                break
            args.append(values.pop(name))
        return tuple(args), values

    def of_forward(self) -> inspect.Signature:
        """Return what tools that look at a forward see: after the module, the user's arguments."""
        kind, inputs = inspect.Parameter, {item.name: item for item in self.inputs}
        spared, made = {item.name for item in self.filled}, list[inspect.Parameter]()
        names = dict.fromkeys([*self.positional, *inputs])
        said = [name for name in names if name.isidentifier() and not keyword.iskeyword(name)]
        optional = False
        for name in said:
            needed = name in inputs and any(inputs[name].is_tensor) and name not in spared
            positional = name in self.positional
            # Whatever follows an optional argument by position is optional, too.
            optional = not needed or (positional and optional)
            how = kind.POSITIONAL_OR_KEYWORD if positional else kind.KEYWORD_ONLY
            default = _constant(inputs.get(name)) if optional else kind.empty
            made.append(kind(name, how, default=default))
        rest = [kind("kwargs", kind.VAR_KEYWORD)] if len(said) < len(names) else []
        module = max(["self", *said], key=len) + "_"  # an argument may be called self
        return inspect.Signature([kind(module, kind.POSITIONAL_ONLY), *made, *rest])

    def unflatten(self, outputs: Sequence[object]) -> Any:
        """Return the outputs in the structure of the user's model."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def _constant(item: Input | None) -> object:
    """The traced value of an argument without tensors, else None."""
    if item is None or any(item.is_tensor):
        return None
    return pytree.tree_unflatten(item.leaves, item.spec)


def _value(item: Input, tensors: Iterator[object]) -> object:
    pairs = zip(item.leaves, item.is_tensor, strict=True)
    leaves = [next(tensors) if is_tensor else leaf for leaf, is_tensor in pairs]
    return pytree.tree_unflatten(leaves, item.spec)


def _leaves_of(item: Input, given: Mapping[str, object]) -> list[Any]:
    if item.name not in given:
        if any(item.is_tensor):
            raise TraceError(f"argument {item.name!r} is missing: the model was traced with it")
        if not item.optional:
            traced = pytree.tree_unflatten(item.leaves, item.spec)
            raise TraceError(
                f"argument {item.name!r} is missing: the model was traced with {traced!r}, and its "
                "own default is another or not known; give that value, or convert again without it"
            )
        return []
    found = like(given[item.name], item.spec)
    leaves, spec = pytree.tree_flatten(found)
    if spec != item.spec:
        raise TraceError(
            f"argument {item.name!r} has structure {spec}, the model was traced with {item.spec}"
        )
    tensors: list[Any] = []
    for i, (value, traced) in enumerate(zip(leaves, item.leaves, strict=True)):
        if item.is_tensor[i]:
            tensors.append(as_tensor(value))
        elif not _same(value, traced):
            where = item.name + pytree.keystr(pytree.tree_flatten_with_path(found)[0][i][0])
            raise TraceError(
                f"argument {where!r} is {_shown(value)}, the model was traced with {traced!r}; "
                "convert again with the value you need"
            )
    return tensors


def _shown(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def as_tensor(value: Any) -> Any:
    """Return an array of numpy as a tensor, anything else as it is."""
    return torch.as_tensor(value) if is_array(value) else value


def _same(value: Any, traced: Any) -> bool:
    """Tell whether a constant is the traced one; arrays compare element by element."""
    try:
        return bool(value == traced)
    except (ValueError, RuntimeError):
        return getattr(value, "shape", ()) == getattr(traced, "shape", None) and bool(
            (value == traced).all()
        )


def tensor_names(inputs: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a call in flat order, named as a person would: `batch['mask']`."""
    for name, value in inputs.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                yield name + pytree.keystr(path), leaf


def read_input(model: nn.Module, name: str, value: object) -> Input:
    parameter = inspect.signature(model.forward).parameters.get(name)
    if parameter is None:  # **kwargs says no default
        optional = value is None or name in WITHOUT_EFFECT
    else:
        default = parameter.default
        none = default is None or default is inspect.Parameter.empty
        optional = none or _same(default, value)
    leaves, spec = pytree.tree_flatten(value)
    is_tensor = tuple(isinstance(v, torch.Tensor) for v in leaves)
    constants = tuple(None if t else v for v, t in zip(leaves, is_tensor, strict=True))
    return Input(name, spec, constants, is_tensor, tuple(map(_bounds, leaves)), optional)


def _bounds(value: object) -> tuple[float, float] | None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.numel():
        return None
    if value.is_meta or value.is_complex():
        return None
    low, high = (float(n) for n in torch.aminmax(value.detach().to(torch.float64)))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
