"""What builds an architecture of the zoo, as a user would give it: the model or a partial."""

from __future__ import annotations

import functools
import pkgutil
from typing import Any

from torch import nn

from tests.zoo.registry import Entry, Scale
from tests.zoo.timm_models import Row as TimmRow
from tests.zoo.timm_models import _imported


def like_of(entry: Entry, model: nn.Module) -> Any:
    """Return what `native` takes for an entry; nothing in it is stated per model."""
    maker = entry.build.args[0]  # type: ignore[attr-defined]
    row = getattr(maker, "__self__", None)
    if isinstance(row, TimmRow):
        return _timm(row)
    return model if hasattr(model, "config") else functools.partial(_scaled, maker, ratio=1.0)


def _timm(row: TimmRow) -> Any:
    import timm

    config = {"num_classes": 10} | {key: _imported(value) for key, value in row.config.items()}
    module, _, name = row.model.rpartition(":")
    if module:
        return functools.partial(pkgutil.resolve_name(f"timm.models.{module}:{name}"), **config)
    return functools.partial(timm.create_model, name, **config)


def _scaled(maker: Any, ratio: float) -> nn.Module:
    return maker(Scale(ratio))[0]
