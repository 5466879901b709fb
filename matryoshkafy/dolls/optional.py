"""Inputs that may be missing: where the model's own default is known, a doll fills it in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.graph.copies import copied_inputs, seed_torch, spare
from matryoshkafy.graph.quiet import silent
from matryoshkafy.graph.signature import Filled
from matryoshkafy.graph.trace import Trace

# What a tokenizer gives beside the ids, and what stands for it where it is left out.
CANDIDATES = {"attention_mask": 1, "token_type_ids": 0}
TOLERANCE = 1e-6


def with_defaults(found: Trace, model: nn.Module, kwargs: Mapping[str, object]) -> Trace:
    """Return the trace with the inputs that a call may leave out, or may give although the example
    did not: those for which the model computes the same with and without the default.
    """
    filled = tuple(_filled(model, kwargs))
    return replace(found, signature=replace(found.signature, filled=filled)) if filled else found


def _filled(model: nn.Module, kwargs: Mapping[str, object]) -> Iterator[Filled]:
    ids, known = kwargs.get("input_ids"), inspect.signature(model.forward).parameters
    if not isinstance(ids, Tensor) or ids.is_meta:
        return
    for name, value in CANDIDATES.items():
        given = kwargs.get(name)
        optional = name in known and known[name].default is None
        dtype = given.dtype if isinstance(given, Tensor) else torch.long
        fits = given is None or (isinstance(given, Tensor) and given.shape == ids.shape)
        if optional and fits and _same(model, kwargs, name, torch.full_like(ids, value).to(dtype)):
            yield Filled(name, "input_ids", value, dtype)


def _same(model: nn.Module, kwargs: Mapping[str, object], name: str, value: Tensor) -> bool:
    """Whether the model itself takes the default for what is missing, padded ids among them."""
    ids = kwargs["input_ids"]
    assert isinstance(ids, Tensor)
    padded = ids.clone()
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(pad, int) and padded.ndim == 2 and padded.shape[1] > 1:
        padded[0, -1] = pad
    plain = {k: v for k, v in kwargs.items() if k not in CANDIDATES} | {"input_ids": padded}
    results: list[object] = []
    for more in ({}, {name: value}):
        with torch.no_grad(), silent(), spare(model) as twin:
            seed_torch(0)
            args, named = copied_inputs((), plain | more)
            try:
                results.append(twin.eval()(*args, **named))
            except Exception:  # noqa: BLE001  the user's forward may raise anything
                return False
    return relative_error(*results) <= TOLERANCE
