"""untie(): a head that is its model's table of tokens, too, gets a weight of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from matryoshkafy.dolls.calls import Call, call_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.graph.quiet import modes_kept
from matryoshkafy.units.permute import OrderError

TOLERANCE = 1e-6
# What transformers remembers of a model's ties, worked out when it was built.
TIES = "all_tied_weights_keys"


def untie(
    model: nn.Module, args: object = None, kwargs: Mapping[str, object] | None = None
) -> tuple[str, ...]:
    """Give every linear that shares its weight with an embedding a copy of it, in place.

    `rotate` folds the gain of the last norm into the head that reads behind it. A head that is the
    table of tokens at the same time cannot take it, so its stream would only be permuted. The model
    grows by the copy. A transformers config that ties the two says so no longer
    (`tie_word_embeddings`), so that folders of the model and of its sizes hold both.

    Args:
        model: any module; call it before `convert`.
        args: example inputs, as for `convert`.
        kwargs: further example inputs by name.

    Returns:
        The names of the weights that are heads' own now; empty where none was shared.

    Raises:
        OrderError: where the class computes something else with an untied config (T5 scales what
            its head reads); the model is left as it was.
    """
    shared = list(_shared(model))
    if not shared:
        return ()
    call = call_of(model, args, kwargs)
    before, configs = _outputs(call), list(_configs(model))
    tables = {name: head.weight for name, head in shared}
    for _, head in shared:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    _tell(configs, tied=False)
    error = relative_error(_outputs(call), before)
    if not error <= TOLERANCE:
        for name, head in shared:
            head.weight = tables[name]
        _tell(configs, tied=True)
        raise OrderError(
            f"{type(model).__name__} computes something else where its config says that "
            f"{', '.join(tables)} is not tied (off by {error:.0e}); expected the same outputs. "
            "Leave it tied: rotate permutes its stream"
        )
    for module in model.modules():
        _forget(module)
    return tuple(tables)


def _shared(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    for name, module in modules:
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            yield f"{name}.weight", module


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield every config of the model and its parts that ties, once."""
    seen: set[int] = set()
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "tie_word_embeddings", False) is True and id(config) not in seen:
            seen.add(id(config))
            yield config


def _tell(configs: list[Any], *, tied: bool) -> None:
    for config in configs:
        config.tie_word_embeddings = tied


def _forget(module: nn.Module) -> None:
    """Drop the ties of what is untied; others, of an encoder's table with a decoder's, stay."""
    ties: dict[str, str] | None = module.__dict__.get(TIES)
    if ties:
        state = dict(module.named_parameters(remove_duplicate=False))
        kept = {a: b for a, b in ties.items() if state.get(a) is state.get(b)}
        module.__dict__[TIES] = kept


@torch.no_grad()
def _outputs(call: Call) -> object:
    """Return what the call gives in evaluation mode; the modes stay as they are."""
    with modes_kept(call.model):
        call.model.eval()
        return call.model(*call.args, **call.kwargs)
