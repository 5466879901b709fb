"""The recommender nested: conversion, how axes cross the scan, what a step minimises.

`scan_axes` says how axes cross `fmrlrec::lru_scan`: the one thing the library cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from examples.fmrlrec.config import Config, ConfigError
from examples.fmrlrec.data import PADDING
from examples.fmrlrec.encoders import Features
from examples.fmrlrec.evaluation import Scorer
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


class PlainObjective(nn.Module):
    """Cross entropy of one plain model over the positions that have a next item."""

    log_scale: nn.Parameter | None

    def __init__(self, model: Recommender, config: Config) -> None:
        super().__init__()
        self.model = model
        scale = torch.tensor(first_scale(config, model.norm_out.weight.numel()))
        parameter = nn.Parameter(scale.log()) if config.learn_scales else None
        self.register_parameter("log_scale", parameter)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """inputs and targets int64 [B, T] -> the mean loss, and nothing per size."""
        table, real = self.model.items(), targets != PADDING
        hidden = self.model.encode(inputs, table)[real]
        bias = self.model.bias
        if self.log_scale is not None:
            # Cheaper than the same on the scores.
            scale = self.log_scale.exp()
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        logits = functional.linear(hidden, table, bias)
        return functional.cross_entropy(logits, targets[real]), {}

    def start_step(self, epoch: int, step: int) -> None:
        """Every step is like the others."""

    def scorer(self) -> Scorer:
        """Scores at the last position, under the width as the name of the size."""
        model, table = self.model, self.model.items()
        width = str(table.shape[1])

        def scores(sequences: Tensor) -> Iterator[tuple[str, Tensor]]:
            hidden = model.encode(sequences, table)[:, -1]
            yield width, functional.linear(hidden, table, model.bias)

        return scores


class NestedObjective(nn.Module):
    """The sum of the cross entropies of all sizes of a doll, equation 14."""

    def __init__(self, doll: Any, config: Config) -> None:
        super().__init__()
        from matryoshkafy.losses import Distillation, MatryoshkaLoss

        self.model, self.config = doll, config
        learning = doll.sizes if config.learn_scales else ()
        self.distillation = Distillation(config.distill) if config.distill else None
        self.loss = MatryoshkaLoss(
            nn.CrossEntropyLoss(ignore_index=PADDING),
            weights=per_size(config, "weights", doll.sizes),
            sizes=learning or None,
            learn_scales={size: first_scale(config, size) for size in learning},
        )
        self.every = dict(zip(doll.sizes, intervals(config, doll.sizes), strict=True))
        self.start_step(0, 0)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """inputs and targets int64 [B, T] -> the summed loss, and the loss of each size in it."""
        outputs = self.model.outputs(inputs)
        weights = self.loss.weights_of(outputs)
        learning = {s: weight for s, weight in weights.items() if self.step % self.every[s] == 0}
        loss, losses = self.loss.evaluate(outputs, (targets,), learning)
        return loss, {f"loss {size}": value for size, value in losses.items()}

    def start_step(self, epoch: int, step: int) -> None:
        """From epoch `config.distill_from` (counted from 0) on, the largest size teaches."""
        self.step = step
        self.loss.distill = self.distillation if epoch >= self.config.distill_from else None

    def scorer(self) -> Scorer:
        """Scores of every size at the last position, from one pass."""
        return nested_scorer(self.model)


def nested_scorer(doll: Any) -> Scorer:
    """Scores of every size of a doll from one trunk pass, at the last position alone."""

    def scores(sequences: Tensor) -> Iterator[tuple[str, Tensor]]:
        for size, found in doll.outputs(sequences).scores_at(slice(None), -1):
            yield str(size), found

    return scores


def per_size(config: Config, setting: str, sizes: Sequence[int]) -> list[float] | None:
    """The numbers of "weights" or "every" for each of `sizes`; None where the setting is empty.

    Written in order of the sizes ("10,4,2"; the last is that of all larger ones), or by share of
    the width ("1/32:10,1:2"; a size takes the first share that it does not exceed).
    """
    text = getattr(config, setting)
    if not text:
        return None
    words = text.split(",")
    try:
        if ":" in text:
            return _by_share([word.split(":") for word in words], sizes)
        given = [float(word) for word in words]
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{setting}={text!r} are no numbers; write --set {setting}=4,2,1, or by share of the "
            f"width --set {setting}=1/8:4,1:1"
        ) from error
    if len(given) > len(sizes):
        raise ConfigError(
            f"{setting}={text!r} are {len(given)}, the sizes only {len(sizes)}; give as many or "
            f"fewer: --set {setting}={','.join(words[: len(sizes)])}"
        )
    return [*given, *given[-1:] * (len(sizes) - len(given))]


def _by_share(rows: list[list[str]], sizes: Sequence[int]) -> list[float]:
    shares = sorted((Fraction(share), float(value)) for share, value in rows)
    wanted = [Fraction(size, max(sizes)) for size in sizes]
    return [next((v for share, v in shares if share >= w), shares[-1][1]) for w in wanted]


def intervals(config: Config, sizes: Sequence[int]) -> list[float]:
    """Of how many steps each size learns at one."""
    every = per_size(config, "every", sizes) or [1.0] * len(sizes)
    if ":" in config.every:
        # A ladder may hold only the shares that wait; then the one that waits least does not.
        every = [max(1.0, steps // min(every)) for steps in every]
    if 1 not in every or any(steps < 1 or steps % 1 for steps in every):
        raise ConfigError(
            f"every={config.every!r} should be whole numbers of steps, and 1 for at least one "
            "size; give for example --set every=1,1,2"
        )
    return every


def first_scale(config: Config, size: int) -> float:
    """The scale of the scores of a size that training starts from.

    What a step of the optimizer adds to a score grows with the units that the score sums.
    """
    return config.score_scale / size if config.score_scale else 1.0
