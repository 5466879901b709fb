"""What a step minimises and how a model scores, for the plain and for the nested model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.fmrlrec.config import Config
from examples.fmrlrec.data import PADDING
from examples.fmrlrec.errors import ConfigError
from examples.fmrlrec.evaluation import Scorer, last_scores
from examples.fmrlrec.model import Recommender


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
        self.distillation = Distillation(config.distill) if config.distill else None
        self.loss = MatryoshkaLoss(
            nn.CrossEntropyLoss(ignore_index=PADDING),
            weights=per_size(config, "weights", len(doll.sizes)),
            sizes=doll.sizes if config.learn_scales else None,
            learn_scales=first_scales(config, doll.sizes),
        )
        self.every = dict(zip(doll.sizes, intervals(config, len(doll.sizes)), strict=True))
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
    """Scores of every size of a doll from one trunk pass and one product over the catalogue."""

    def scores(sequences: Tensor) -> Iterator[tuple[str, Tensor]]:
        outputs = doll.outputs(sequences)
        yield from last_scores(outputs) if outputs.readout is None else _summed(outputs.readout)

    return scores


def per_size(config: Config, setting: str, count: int) -> list[float] | None:
    """The numbers of "weights" or "every" for `count` sizes; None where the setting is empty.

    The last one given is that of all larger sizes.
    """
    text = getattr(config, setting)
    if not text:
        return None
    given = [float(word) for word in text.split(",")]
    if len(given) > count:
        raise ConfigError(
            f"{setting}={text!r} are {len(given)}, the sizes only {count}; "
            f"give as many or fewer: --set {setting}={','.join(text.split(',')[:count])}"
        )
    return [*given, *given[-1:] * (count - len(given))]


def intervals(config: Config, count: int) -> list[float]:
    """Of how many steps each size learns at one."""
    every = per_size(config, "every", count) or [1.0] * count
    if 1 not in every or any(steps < 1 or steps % 1 for steps in every):
        raise ConfigError(
            f"every={config.every!r} should be whole numbers of steps, and 1 for at least one "
            "size; give for example --set every=1,1,2"
        )
    return every


def first_scales(config: Config, sizes: tuple[int, ...]) -> dict[int, float]:
    """The scales of the scores that training starts from; none where none are learned."""
    return {size: first_scale(config, size) for size in sizes} if config.learn_scales else {}


def first_scale(config: Config, size: int) -> float:
    """What a step of the optimizer adds to a score grows with the units that the score sums."""
    return config.score_scale / size if config.score_scale else 1.0


def _summed(readout: Any) -> Iterator[tuple[str, Tensor]]:
    """Scores of every size at the last position."""
    last = replace(readout, hidden=readout.hidden[:, -1])
    for size, scores in last.logits_by_size():
        yield str(size), scores
