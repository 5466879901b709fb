"""Users who are served: the recurrent state of each, moved one step by each event.

The state after a history is all that the next recommendation needs, so an event costs one step
whatever the length of the history, and answers are those of the model over the whole history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.fmrlrec.config import RunError
from examples.fmrlrec.model import Recommender
from examples.fmrlrec.serving.compact import rows_of
from matryoshkafy.serving.index import KINDS, Search

CHUNK, SPARE = 2048, 1024


class Unknown(RunError):
    """A user, an item or a size that is not there."""


@dataclass
class Size:
    """One size: its model, what it keeps of each user, and how it searches.

    `rows` [items, m + 1] end in the bias, so that a score is an inner product with [hidden, 1].
    `states` are [users, N, 2] for each block.
    """

    model: Recommender
    table: Tensor
    rows: np.ndarray
    states: list[Tensor]
    hidden: np.ndarray
    search: Search | None = None

    @property
    def bytes(self) -> int:
        """Weights, table, and the states of all users."""
        tensors = [*self.model.parameters(), *self.states]
        return sum(t.nbytes for t in tensors) + self.rows.nbytes + self.hidden.nbytes

    def step(self, rows: list[int], items: Tensor) -> None:
        """Moves the users of these rows by an item each."""
        self._grow(max(rows))
        hidden, moved = self.model.advance(items, [kept[rows] for kept in self.states], self.table)
        for kept, state in zip(self.states, moved, strict=True):
            kept[rows] = state
        self.hidden[rows, :-1] = hidden.numpy()

    def _grow(self, row: int) -> None:
        """Makes room for users who come while it runs."""
        if row < len(self.hidden):
            return
        room = row + SPARE - len(self.hidden)
        self.states = [torch.cat((s, s.new_zeros(room, *s.shape[1:]))) for s in self.states]
        more = np.zeros((room, self.hidden.shape[1]), dtype=np.float32)
        more[:, -1] = 1
        self.hidden = np.concatenate([self.hidden, more])


class Live:
    """The users of a shop at several sizes, each event applied to all of them.

    Args:
        models: {size: compact model}.
        ids: the id of every item, in the order of the table.
        histories: {user: numbers of items, in time order}.
        index: "exact", or a kind of `matryoshkafy.serving.index`.
        length: how many of the latest items a state begins with, as in training; 0: all.
    """

    def __init__(
        self,
        models: Mapping[int, Recommender],
        ids: Sequence[str],
        histories: Mapping[str, np.ndarray],
        *,
        index: str = "exact",
        length: int = 0,
    ) -> None:
        self.names = list(ids)
        self.items = {name: number for number, name in enumerate(ids, start=1)}
        self.users = {user: row for row, user in enumerate(histories)}
        self.seen = [part.tolist() for part in histories.values()]
        self.log: Path | None = None
        self.index = index
        self.sizes = {size: _size(model, len(self.users), index) for size, model in models.items()}
        self._move({row: part[-length:] for row, part in enumerate(self.seen)})

    def replay(self, log: Path) -> None:
        """Applies the events of a log, and appends the coming ones to it."""
        parts: dict[int, list[int]] = {}
        for user, item in logged(log):
            if item in self.items:
                row, number = self._had(user, item)
                parts.setdefault(row, []).append(number)
        self._move(parts)
        self.log = log

    @torch.inference_mode()
    def _move(self, parts: Mapping[int, Sequence[int]]) -> None:
        """Moves users (by row) by their items: one step at a time of all who have one left."""
        order = sorted(parts, key=lambda row: -len(parts[row]))
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            for step in range(len(parts[rows[0]])):
                rows = [row for row in rows if len(parts[row]) > step]
                items = torch.tensor([parts[row][step] for row in rows])
                for size in self.sizes.values():
                    size.step(rows, items)

    def event(self, user: str, item: str) -> int:
        """A user had an item: moves every size one step; returns the user's number of events.

        A user who was never seen begins here. Raises `Unknown` for an item that is not there.
        """
        if item not in self.items:
            raise Unknown(f"no item {item!r}; ids are like {list(self.items)[:3]}")
        row, number = self._had(user, item)
        self._move({row: [number]})
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([user, item]) + "\n")
        return len(self.seen[row])

    def _had(self, user: str, item: str) -> tuple[int, int]:
        """Notes that a user had an item; returns the numbers of both."""
        row, number = self.users.get(user), self.items[item]
        if row is None:
            row = self.users[user] = len(self.seen)
            self.seen.append([])
        self.seen[row].append(number)
        return row, number

    def top(self, user: str, size: int, count: int) -> list[tuple[str, float]]:
        """The `count` best items that the user did not have, best first, with their scores.

        Raises `Unknown` for a user or a size that is not there.
        """
        row, at = self.users.get(user), self.sizes.get(size)
        if row is None:
            raise Unknown(f"no user {user!r}; POST /events starts one")
        if at is None:
            raise Unknown(f"no size {size}; served are {', '.join(map(str, self.sizes))}")
        hidden, seen = at.hidden[row], self.seen[row]
        if at.search is None:
            scores = at.rows @ hidden
            scores[[number - 1 for number in seen]] = -np.inf
            best = _largest(scores, min(count, len(scores) - len(set(seen))))
        else:
            wanted = min(count + len(set(seen)), len(at.rows))
            found = np.asarray(at.search(hidden[None], wanted)[0]).reshape(-1)
            had = {number - 1 for number in seen}
            best = [i for i in found.tolist() if i >= 0 and i not in had][:count]
            scores = dict(zip(best, (at.rows[best] @ hidden).tolist(), strict=True))
        return [(self.names[i], float(scores[i])) for i in best]

    def add(self, item: str, rows: Mapping[int, np.ndarray]) -> None:
        """A new item without training: its row [m] of the table at each size.

        Its bias is the median one. Raises `RunError` for an id that is there already, or for an
        approximate index, which is built once.
        """
        if item in self.items:
            raise RunError(f"item {item!r} is there already; give another item_id")
        if self.index != "exact":
            raise RunError(f"new items need --index exact; this service has {self.index}")
        for number, size in self.sizes.items():
            row = np.append(rows[number], np.median(size.rows[:, -1])).astype(np.float32)
            size.rows = np.concatenate([size.rows, row[None]])
            size.table = torch.cat((size.table, torch.from_numpy(row[None, :-1])))
        self.names.append(item)
        self.items[item] = len(self.names)


def logged(log: Path) -> list[Any]:
    """The lines of a log; one that a killed process cut was not acknowledged, and is left out."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    if text and not text.endswith("\n"):
        with log.open("a", encoding="utf-8") as stream:
            stream.write("\n")
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _size(model: Recommender, users: int, index: str) -> Size:
    vectors, bias = rows_of(model)
    rows = np.concatenate([vectors, bias[:, None]], axis=1)
    hidden = np.zeros((users + SPARE, rows.shape[1]), dtype=np.float32)
    hidden[:, -1] = 1
    search = None
    if index != "exact":
        if index not in KINDS:
            raise RunError(f"index {index!r} was asked for; expected exact, {', '.join(KINDS)}")
        search = KINDS[index](rows, 128)
    table = model.items().detach()
    return Size(model.eval(), table, rows, model.start(users + SPARE), hidden, search)


def _largest(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the largest scores, best first; of equal ones the first."""
    if count <= 0:
        return []
    found = np.argpartition(-scores, count - 1)[:count]
    return found[np.lexsort((found, -scores[found]))].tolist()
