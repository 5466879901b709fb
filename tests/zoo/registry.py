"""The zoo: named architectures, each built small, seeded and random, with inputs that fit it.

A maker takes a `Scale` and wraps every width in it, so that one function states both the model of
the zoo (ratio 1) and the same class built from the smaller config (the truth for slices).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Built = tuple["nn.Module", tuple[Any, ...], dict[str, Any]]
Maker = Callable[["Scale"], Built]

LIBRARIES = (
    "hf",
    "hf_wide",
    "timm_models",
    "torchvision_models",
    "open_clip_models",
    "torch_nn",
    "recommenders",
)


@dataclass(frozen=True)
class Scale:
    """The rule of the ladder: a width n becomes ceil(n * ratio), at least 1."""

    ratio: float = 1.0

    def __call__(self, width: int) -> int:
        return max(1, math.ceil(width * self.ratio))

    def each(self, widths: Iterable[int]) -> list[int]:
        """Scales every width of a sequence."""
        return [self(width) for width in widths]

    def keys(self, config: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
        """Scales the entries of a nested config whose key is in `names`; leaves the others."""
        return {key: self._value(key, value, names) for key, value in config.items()}

    def _value(self, key: str, value: Any, names: frozenset[str]) -> Any:
        if isinstance(value, Mapping):
            return self.keys(value, names)
        if key not in names or isinstance(value, (bool, str, type(None))):
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self._value(key, item, names) for item in value)
        return self(value)


@dataclass(frozen=True)
class Entry:
    """One architecture.

    `build()` gives the model in eval mode, its args and its kwargs. `rebuild(ratio)` gives the same
    class built from the config with every width n replaced by ceil(n * ratio): heads, key-value
    heads and hidden widths shrink; head_dim, vocabulary, classes, positions, patches and experts
    stay. `rebuild` is None where the class offers no such config.
    """

    name: str
    family: str
    build: Callable[[], Built]
    rebuild: Callable[[float], nn.Module] | None = None
    tags: tuple[str, ...] = ()


_ENTRIES: dict[str, Entry] = {}


def entry(
    name: str,
    family: str,
    *,
    rebuilds: bool = True,
    tags: tuple[str, ...] = (),
    table: dict[str, Entry] = _ENTRIES,
) -> Callable[[Maker], Maker]:
    """Registers the decorated maker under `name` in a table; a name taken twice is an error."""

    def register(make: Maker) -> Maker:
        if name in table:
            raise ValueError(f"the zoo already holds {name!r}: give this entry another name")
        truth = partial(_rebuilt, make) if rebuilds else None
        build = partial(_built, make, settled="settle" in tags)
        table[name] = Entry(name, family, build, truth, tags)
        return make

    return register


def entries(names: Iterable[str] | None = None) -> list[Entry]:
    """Lists the entries named, or all of them, in the order of registration."""
    for library in LIBRARIES:
        importlib.import_module(f"tests.zoo.{library}")
    if names is None:
        return list(_ENTRIES.values())
    wanted = list(names)
    unknown = sorted(set(wanted) - set(_ENTRIES))
    if unknown:
        raise KeyError(f"not in the zoo: {', '.join(unknown)}; it holds {', '.join(_ENTRIES)}")
    return [_ENTRIES[name] for name in wanted]


def _built(make: Maker, *, settled: bool) -> Built:
    import torch

    torch.manual_seed(0)
    model, args, kwargs = make(Scale())
    model.eval()
    with torch.no_grad():
        randomise(model)
        if settled:
            settle(model, args, kwargs)
    return model, args, kwargs


def _rebuilt(make: Maker, ratio: float) -> nn.Module:
    import torch

    torch.manual_seed(1)
    return make(Scale(ratio))[0].eval()


def randomise(model: nn.Module) -> None:
    """Draws every weight anew, so that no norm, table or layer is still at a trivial value.

    Contractions get variance 1 / fan-in. Everything else keeps its initial value plus noise, which
    leaves parameters with a meaning of their own (decays, temperatures) where they work.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                _draw(module, name, parameter)
        _draw_statistics(module)


def _draw(module: nn.Module, name: str, parameter: torch.Tensor) -> None:
    import torch

    fan_in = _fan_in(module, name, parameter)
    if fan_in:
        parameter.copy_(torch.randn_like(parameter) / math.sqrt(fan_in))
    else:
        _shake(parameter)


def _shake(parameter: torch.Tensor) -> None:
    """Adds noise; a value that is constant and tiny (layer scale at 1e-6) is replaced instead."""
    import torch

    if not parameter.numel():
        return
    noise = 0.1 * torch.randn_like(parameter)
    constant = not parameter.is_complex() and bool((parameter == parameter.flatten()[0]).all())
    tiny = constant and 0 < float(parameter.flatten()[0].abs()) < 1e-2
    parameter.copy_(0.5 + noise if tiny else parameter + noise)


def _fan_in(module: nn.Module, name: str, parameter: torch.Tensor) -> int:
    from torch import nn

    if parameter.ndim < 2 or isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return 0
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, nn.modules.conv._ConvNd):
        return parameter[0].numel()
    if type(module).__name__ == "Conv1D":
        return parameter.shape[0]
    experts = parameter.ndim == 3 and "proj" in name
    return parameter.shape[-1] if experts or isinstance(module, nn.Linear) else 0


def _draw_statistics(module: nn.Module) -> None:
    import torch

    for name, buffer in module.named_buffers(recurse=False):
        if name == "running_mean":
            buffer.copy_(0.1 * torch.randn_like(buffer))
        if name == "running_var":
            buffer.copy_(0.5 + torch.rand_like(buffer))


def settle(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Takes the statistics of every batch norm from the inputs, where sums of branches explode."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_measure) for norm in norms]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()


def _measure(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    import torch

    values = inputs[0].transpose(0, 1).flatten(1)
    spread = values.var(1, correction=0)
    norm.running_mean.copy_(values.mean(1))
    norm.running_var.copy_(torch.maximum(spread, 0.1 * spread.mean() + 1e-3))
