"""The recommender nested: conversion, how axes cross the scan, what a step minimises.

`scan_axes` says how axes cross `fmrlrec::lru_scan`: the one thing the library cannot know.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import fx, nn

import matryoshkafy as mk
from examples.fmrlrec.config import Config, ConfigError
from examples.fmrlrec.data import PADDING
from examples.fmrlrec.encoders import Features
from examples.fmrlrec.evaluation import Scorer
from examples.fmrlrec.model import Recommender, Shape
from matryoshkafy.losses import SampledMatryoshkaLoss
from matryoshkafy.rules.table import Args, Walk, rule
from matryoshkafy.sizes import parse_ladder
from matryoshkafy.training import AllSizes


def sizes_of(config: Config) -> tuple[int, ...]:
    """The ladder of a configuration; its last rung is the width of the model."""
    ladder = parse_ladder(config.sizes)
    if ladder.relative:
        raise ConfigError(f"sizes={config.sizes!r} are ratios; give units, such as 8..64")
    return ladder.at(int(ladder.rungs[-1]))


def build(config: Config, items: int, features: Features, width: int) -> Recommender:
    """Builds the plain model of one width, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    vectors = features.joined(config.modality)
    shape = Shape(items, width, config.blocks, config.dropout, config.r_min)
    table = None if vectors is None else torch.from_numpy(vectors)
    return Recommender(shape, table, trainable_features=config.trainable_features)


def nest(model: Recommender, config: Config) -> mk.Doll:
    """Converts the plain model; the example says no more than that batch and length are free."""
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


class StaggeredLoss(SampledMatryoshkaLoss):
    """Equation 14: the sum of the cross entropies of all sizes; some learn at every nth step.

    With `config.negatives` a step scores the target and so many items drawn at random.
    """

    def __init__(self, config: Config, sizes: Sequence[int]) -> None:
        # What a step of the optimizer adds to a score grows with the units that the score sums.
        scales = {size: config.score_scale / size or 1.0 for size in sizes}
        super().__init__(
            nn.CrossEntropyLoss(ignore_index=PADDING),
            config.negatives,
            sizes,
            per_size(config, "weights", sizes),
            learn_scales=scales if config.learn_scales else False,
            generator=torch.Generator(),
        )
        self.every = dict(zip(sizes, intervals(config, sizes), strict=True))
        self.seed, self.step = config.seed, 0

    def at_step(self, step: int) -> None:
        """Which sizes learn, and from which items, is a function of the step alone."""
        self.step = step
        cast("torch.Generator", self.generator).manual_seed(self.seed * 1_000_003 + step)

    def drawn(self, weights: dict[int, float]) -> dict[int, float]:
        """The sizes that learn at this step."""
        return {m: weight for m, weight in weights.items() if self.step % self.every[m] == 0}


def objective(doll: mk.Doll, config: Config) -> AllSizes:
    """What a step calls: (inputs [B, T], labels=targets [B, T]) -> the loss, {size: loss}."""
    return AllSizes(doll, StaggeredLoss(config, doll.sizes), shift_labels=False)


def nested_scorer(doll: mk.Doll) -> Scorer:
    """Scores of every size of a doll from one trunk pass, at the last position alone."""
    return lambda sequences: (
        (str(size), scores) for size, scores in doll.outputs(sequences).scores_at(slice(None), -1)
    )


def per_size(config: Config, setting: str, sizes: Sequence[int]) -> list[float]:
    """The numbers of "weights" or "every" for each of `sizes`; 1 where the setting is empty.

    Written by share of the width, "1/32:10,1:2": a size takes the first share that it does not
    exceed, or the last one.
    """
    text = getattr(config, setting) or "1:1"
    pairs = (word.split(":") for word in text.split(","))
    try:
        shares = sorted((Fraction(share), float(value)) for share, value in pairs)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{setting}={text!r} are no numbers by share of the width; write for example "
            f"--set {setting}=1/8:4,1:1"
        ) from error
    wanted = [Fraction(size, max(sizes)) for size in sizes]
    return [next((v for share, v in shares if share >= w), shares[-1][1]) for w in wanted]


def intervals(config: Config, sizes: Sequence[int]) -> list[float]:
    """Of how many steps each size learns at one.

    A ladder may hold only the shares that wait; then the size that waits least does not.
    """
    every = per_size(config, "every", sizes)
    if any(steps < 1 or steps % 1 for steps in every):
        raise ConfigError(
            f"every={config.every!r} should be whole numbers of steps by share of the width; give "
            "for example --set every=1/2:1,1:2"
        )
    return [steps // min(every) for steps in every]
