"""Models from a configuration: plain at one width, or nested by the library.

`scan_axes` says how axes cross `fmrlrec::lru_scan`: the one thing the library cannot know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from examples.fmrlrec.config import Config, ConfigError
from examples.fmrlrec.encoders import Features
from examples.fmrlrec.model import Recommender, Shape
from examples.fmrlrec.scan import lru_scan
from matryoshkafy.rules.table import Args, Walk, rule

assert lru_scan  # registers the operator


def sizes_of(config: Config) -> tuple[int, ...]:
    """The ladder of a configuration; its last rung is the width of the model."""
    from matryoshkafy.sizes import parse_ladder

    ladder = parse_ladder(config.sizes)
    if ladder.relative:
        raise ConfigError(f"sizes={config.sizes!r} are ratios; give units, such as 8..64")
    return ladder.at(int(ladder.rungs[-1]))


def build(config: Config, items: int, features: Features, width: int) -> Recommender:
    """Builds the plain model of one width, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    vectors = features.joined(config.modality)
    shape = Shape(
        items=items,
        width=width,
        blocks=config.blocks,
        state_factor=config.state_factor,
        hidden_factor=config.hidden_factor,
        dropout=config.dropout,
        r_min=config.r_min,
        item_bias=config.item_bias,
    )
    table = None if vectors is None else torch.from_numpy(vectors)
    return Recommender(shape, table, trainable_features=config.trainable_features)


def nest(model: Recommender, config: Config) -> Any:
    """Converts the plain model; the example says no more than that batch and length are free."""
    import matryoshkafy as mk

    example = torch.ones(3, 5, dtype=torch.int64)
    # The features are an input like any other: every size reads all of them.
    keep = () if config.modality == "id" else ("items.features",)
    return mk.convert(
        model, (example,), sizes=config.sizes, nesting=config.nesting, norm=config.norm, keep=keep
    )


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
