"""The next ten items of a user or of a sequence, at every size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from examples.fmrlrec import data
from examples.fmrlrec.errors import DataError
from examples.fmrlrec.objectives import nested_scorer
from examples.fmrlrec.pipeline import Material
from examples.fmrlrec.reporting import Sheet


def history_of(material: Material, user: str) -> np.ndarray:
    """Everything that a user had, by the user's id in the data."""
    ids = material.data.user_ids.cast(str).to_list()
    if user not in ids:
        raise DataError(f"no user {user!r}; the data has {len(ids)} users, such as {ids[:5]}")
    return material.data.sequence(ids.index(user))


def history_from(material: Material, items: list[str]) -> np.ndarray:
    """A sequence of item ids as numbers; unknown ids are named."""
    ids = {str(name): i for i, name in enumerate(material.data.catalogue["item_id"], start=1)}
    unknown = [item for item in items if item not in ids]
    if unknown or not items:
        raise DataError(f"no item {', '.join(unknown) or 'given'}; ids are like {list(ids)[:5]}")
    return np.asarray([ids[item] for item in items], dtype=np.int32)


def recommend(
    doll: Any, material: Material, history: np.ndarray, *, count: int = 10, length: int = 50
) -> Sheet:
    """The `count` best items not in `history` for each size, best first, by title."""
    sequence = torch.from_numpy(data.left_pad([history], min(length, max(2, len(history)))))
    titles, columns = _titles(material), {}
    with torch.inference_mode():
        for size, scores in nested_scorer(doll.eval())(sequence):
            scores = scores[0].clone()
            scores[[0, *history.tolist()]] = -torch.inf
            columns[size] = [titles[i] for i in scores.topk(count).indices.tolist()]
    rows = tuple(zip(range(1, count + 1), *columns.values(), strict=True))
    last = ", ".join(titles[i] for i in history[-3:].tolist())
    return Sheet(f"After ... {last}", ("rank", *(f"size {s}" for s in columns)), rows)


def _titles(material: Material) -> list[str]:
    table = material.data.catalogue
    names = table["title"].fill_null("").to_list() if "title" in table.columns else []
    return ["(padding)", *(t or f"item {i}" for t, i in zip(names, table["item_id"], strict=True))]
