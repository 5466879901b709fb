"""How axes cross `fmrlrec::lru_scan`: the one thing the library cannot know about this model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from examples.fmrlrec.scan import lru_scan
from matryoshkafy.rules.table import Args, Walk, rule

assert lru_scan


@rule(torch.ops.fmrlrec.lru_scan)
def scan_axes(walk: Walk, node: fx.Node, args: Args) -> Any:
    """u [B, T, N, 2], transition [N, 2], real [B, T]: each state moves by itself, along T."""
    del node
    batch, time, states, parts = walk.of(args["u"])
    own_states, own_parts = walk.of(args["transition"])
    rows, steps = walk.of(args["real"])
    walk.fix(walk.unify(time, steps), "sequence")
    shared = walk.unify(batch, rows), time
    return *shared, walk.unify(states, own_states), walk.unify(parts, own_parts)
