"""MatryoshkaLoss: any criterion, at every size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.losses.distillation import Distillation, divergences, readout_divergences
from matryoshkafy.losses.fused import LossError, nested_cross_entropy
from matryoshkafy.outputs import Outputs, Readout, scores_of

Weights = Sequence[float] | Mapping[int, float]
Targets = tuple[object, ...]


@dataclass(frozen=True)
class CrossEntropySettings:
    """What nested_cross_entropy needs to know of a cross entropy criterion."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    weight: Tensor | None = None


def settings_of(criterion: Callable[..., object]) -> CrossEntropySettings | None:
    """The settings of nn.CrossEntropyLoss, F.cross_entropy or a partial of it, else None."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        names = ("ignore_index", "label_smoothing", "reduction", "weight")
        return CrossEntropySettings(**{name: getattr(criterion, name) for name in names})
    if criterion is F.cross_entropy:
        return CrossEntropySettings()
    known = CrossEntropySettings.__dataclass_fields__
    if isinstance(criterion, partial) and criterion.func is F.cross_entropy:
        plain = not criterion.args and set(criterion.keywords) <= set(known)
        return CrossEntropySettings(**criterion.keywords) if plain else None
    return None


class MatryoshkaLoss(nn.Module):
    """Adds up a criterion over the sizes of `doll.outputs(...)`.

    A cross entropy criterion over outputs that end in one linear goes through nested_cross_entropy,
    which never stores the logits: `fuses(outputs, *targets)` tells. It also accepts class-last
    logits: output [B, T, V] with target [B, T], where torch wants [B, V, T]; target.shape ==
    output.shape[:-1] decides. Of a structured output it takes the logits (`outputs.scores_of`);
    any other criterion gets the output as it is.

    Args:
        criterion: criterion(output, *targets), called once per size.
        sizes: those that learn; all by default.
        weights: the relative importances c_m of MRL (default 1), in the order of `sizes` (ascending
            if sizes is None) or {size: weight}.
        n_sizes_per_step: n takes, at each call, the largest, the smallest and n - 2 random sizes
            (the sandwich rule).
        reduction: "sum" adds the weighted losses, "mean" divides by the weights in use.
        distill: adds weight * divergence of each smaller size (times its own weight) from the
            detached largest one.
        normalize: L2-normalise outputs (and per-size targets) at each size, for criteria over
            embeddings.
        generator: draws the random sizes; by default the global one of the CPU: give all processes
            the same seed.
        learn_scales: multiply the scores of each of `sizes` by a learned scale inside a cross
            entropy (log_scales, one per size: give loss.parameters() to the optimizer, too): units
            that all sizes share keep a size from a temperature of its own. They start at 1, or at
            the positive numbers given, in the order of `sizes` or {size: scale}. The model is
            unchanged, and so is how it ranks.

    Raises:
        LossError: sizes, weights or words that do not fit.
    """

    log_scales: nn.Parameter | None

    def __init__(  # noqa: PLR0913 - the options of a training run
        self,
        criterion: Callable[..., Tensor],
        sizes: Sequence[int] | None = None,
        weights: Weights | None = None,
        n_sizes_per_step: int | None = None,
        reduction: str = "sum",
        *,
        distill: Distillation | None = None,
        normalize: bool = False,
        generator: torch.Generator | None = None,
        learn_scales: bool | Weights = False,
    ) -> None:
        super().__init__()
        check_arguments(sizes, weights, n_sizes_per_step, reduction)
        if learn_scales:
            check_scales(criterion, sizes)
        self.register_parameter("log_scales", first_scales(sizes or (), learn_scales))
        self.criterion, self.sizes, self.weights = criterion, sizes, weights
        self.n_sizes_per_step, self.reduction = n_sizes_per_step, reduction
        self.distill, self.normalize, self.generator = distill, normalize, generator

    def forward(
        self, outputs: Mapping[int, object], *targets: object, return_per_size: bool = False
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """The loss, and with return_per_size also {size: unweighted loss}, detached.

        outputs {size: output}; a target that is a mapping gives each size its own.
        """
        weights = self.drawn(self.weights_of(outputs))
        total, per_size = self.evaluate(outputs, targets, weights)
        if self.reduction == "mean":
            total = total / sum(weights.values())
        return (total, per_size) if return_per_size else total

    def per_size(self, outputs: Mapping[int, object], *targets: object) -> dict[int, Tensor]:
        """{size: criterion}, unweighted, without distillation, detached, for every size."""
        with torch.no_grad():
            weights = self.weights_of(outputs)
            return self.criteria(outputs, targets, weights)[1]

    def weights_of(self, outputs: Mapping[int, object]) -> dict[int, float]:
        """{size: weight}, ascending."""
        sizes = sorted(outputs) if self.sizes is None else list(self.sizes)
        missing = sorted(set(sizes) - set(outputs))
        if missing:
            raise LossError(f"the outputs have sizes {sorted(outputs)}, but not {missing}")
        weights = named_weights(sizes, self.weights)
        return {size: weights[size] for size in sorted(sizes)}

    def scales(self) -> dict[int, Tensor]:
        """{size: learned scale of its scores}; empty without learn_scales."""
        if self.log_scales is None:
            return {}
        return dict(zip(self.sizes or (), self.log_scales.exp(), strict=True))

    def drawn(self, weights: dict[int, float]) -> dict[int, float]:
        """The sizes of this step."""
        n = self.n_sizes_per_step
        if n is None or n >= len(weights):
            return weights
        smallest, *middle, largest = weights
        order = [int(i) for i in torch.randperm(len(middle), generator=self.generator)]
        kept = sorted({smallest, largest, *[middle[i] for i in order[: n - 2]]})
        return {size: weights[size] for size in kept}

    def evaluate(
        self, outputs: Mapping[int, object], targets: Targets, weights: dict[int, float]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The weighted sum with distillation, and the criterion of each size."""
        total, per_size, scores = self.criteria(outputs, targets, weights)
        if self.distill is not None and len(weights) > 1:
            taught = self.taught(outputs, scores, targets, weights)
            total = total + self.distill.weight * taught
        return total, per_size

    def criteria(
        self, outputs: Mapping[int, object], targets: Targets, weights: dict[int, float]
    ) -> tuple[Tensor, dict[int, Tensor], Mapping[int, object] | None]:
        """The weighted sum of the criterion, the criterion of each size, detached, and the scores.

        There are no scores where a readout spares them.
        """
        readouts = self.readouts(outputs, targets, weights)
        if readouts:
            settings, target = settings_of(self.criterion), targets[0]
            assert settings is not None and isinstance(target, Tensor)
            return *fused(readouts, target, weights, settings, self.scales()), None
        scores = {size: self.scores(size, outputs) for size in weights}
        losses = {size: self.at_size(out, targets, size) for size, out in scores.items()}
        return *weighed(losses, weights), scores

    def fuses(self, outputs: Mapping[int, object], *targets: object) -> bool:
        """Whether nested_cross_entropy computes the loss of these outputs.

        Args:
            outputs: {size: output}, from `doll.outputs`.
            targets: as the loss is called with.

        Returns:
            True where the logits are never stored; False where each size's are.
        """
        return bool(self.readouts(outputs, targets, self.weights_of(outputs)))

    def readouts(
        self, outputs: Mapping[int, object], targets: Targets, weights: Mapping[int, float]
    ) -> dict[int, Readout]:
        """{size: its last linear} where all of them can be fused, else nothing."""
        settings, is_module = settings_of(self.criterion), isinstance(self.criterion, nn.Module)
        if (
            settings is None
            or settings.weight is not None
            or (is_module and type(self.criterion) is not nn.CrossEntropyLoss)
            or not isinstance(outputs, Outputs)
            or self.normalize
            or len(targets) != 1
        ):
            return {}
        found = {size: outputs.readout_at(size) for size in weights}
        fit = {
            m: r for m, r in found.items() if r and class_indices(targets[0], r.hidden) is not None
        }
        return fit if len(fit) == len(found) else {}

    def at_size(self, out: object, targets: Targets, size: int) -> Tensor:
        """The criterion of the scores of one size."""
        settings = settings_of(self.criterion)
        at = [self.at(size, target) for target in targets]
        classes = class_indices(at[0], out) if settings and len(at) == 1 else None
        if settings is None or classes is None or not isinstance(out, Tensor):
            return self.criterion(out, *at)
        loss = self.criterion(out.reshape(-1, out.shape[-1]), classes.reshape(-1))
        return loss.view(classes.shape) if settings.reduction == "none" else loss

    def at(self, size: int, target: object) -> object:
        """The target of one size: its own, normalised if asked, where there is one for each."""
        if not isinstance(target, Mapping):
            return target
        return self.prepared(cast("Mapping[int, object]", target)[size])

    def scores(self, size: int, outputs: Mapping[int, object]) -> object:
        """The output of one size, normalised and scaled if asked."""
        output = outputs[size]
        if settings_of(self.criterion) is not None:
            output = scores_of(output)
        output = self.prepared(output)
        if self.log_scales is None:
            return output
        assert isinstance(output, Tensor), "learned scales multiply the scores of a cross entropy"
        return output * self.scales()[size]

    def prepared(self, value: object) -> object:
        """An output or per-size target, every floating tensor in it normalised if asked."""
        return pytree.tree_map(normalised, value) if self.normalize else value

    def taught(
        self,
        outputs: Mapping[int, object],
        scores: Mapping[int, object] | None,
        targets: Targets,
        weights: dict[int, float],
    ) -> Tensor:
        """The weighted divergences of the smaller sizes from the largest; scores as in criteria."""
        config, settings = self.distill, settings_of(self.criterion)
        assert config is not None
        readouts = {} if scores is not None else self.readouts(outputs, targets, weights)
        one = next(iter(readouts.values()), None)
        shared = one is not None and all(r is one for r in readouts.values())
        if one is not None and shared and config.kind != "similarity":
            real = real_rows(targets, settings, one.hidden)
            parts = readout_divergences(one, list(weights), config, real, self.scales())
        else:
            found = scores or {size: self.scores(size, outputs) for size in weights}
            scores = cast("Mapping[int, Tensor]", found)
            parts = divergences(scores, config, real_rows(targets, settings, scores[max(scores)]))
        return torch.stack([weights[size] * part for size, part in parts.items()]).sum()


def normalised(value: object) -> object:
    """A floating tensor with rows of length 1; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return F.normalize(value, dim=-1)


def check_arguments(
    sizes: Sequence[int] | None, weights: Weights | None, n: int | None, reduction: str
) -> None:
    """Raises LossError with what was given and what was expected."""
    rows = (
        (sizes is None or len(set(sizes)) == len(sizes) > 0, f"sizes {sizes} should be distinct"),
        (n is None or n >= 2, f"n_sizes_per_step {n} should be at least 2, largest and smallest"),
        (reduction in ("sum", "mean"), f"reduction {reduction!r} should be 'sum' or 'mean'"),
    )
    for holds, message in rows:
        if not holds:
            raise LossError(f"MatryoshkaLoss: {message}")
    if sizes is not None:
        named_weights(sizes, weights)


def check_scales(criterion: Callable[..., Tensor], sizes: Sequence[int] | None) -> None:
    """Raises LossError where learned scales have no meaning."""
    rows = (
        (sizes is not None, "needs `sizes`, one scale for each"),
        (settings_of(criterion) is not None, "scales scores, so the criterion is cross entropy"),
    )
    for holds, message in rows:
        if not holds:
            raise LossError(f"MatryoshkaLoss: learn_scales {message}")


def first_scales(sizes: Sequence[int], given: bool | Weights) -> nn.Parameter | None:
    """The logarithms of the scales that training starts from; None where none are learned."""
    if not given:
        return None
    named = named_weights(sizes, None if given is True else given, "learn_scales")
    values = torch.tensor([*named.values()])
    if not (values > 0).all():
        raise LossError(f"MatryoshkaLoss: learn_scales {given} should be positive")
    return nn.Parameter(values.log())


def named_weights(
    sizes: Sequence[int], weights: Weights | None, what: str = "weights"
) -> dict[int, float]:
    """{size: weight}; `what` is the argument that an error names."""
    if isinstance(weights, Mapping):
        if not set(sizes) <= set(weights):
            raise LossError(f"{what} {dict(weights)} lack some of the sizes {list(sizes)}")
        return {size: weights[size] for size in sizes}
    if weights is not None and len(weights) != len(sizes):
        raise LossError(f"{what} {list(weights)} should be one per size of {list(sizes)}")
    return dict(zip(sizes, weights or [1.0] * len(sizes), strict=True))


def class_indices(target: object, output: object) -> Tensor | None:
    """The target where it holds one class index per row of a class-last output, else None."""
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        return None
    fits = not target.is_floating_point() and target.shape == output.shape[:-1]
    return target if fits else None


def real_rows(
    targets: Targets, settings: CrossEntropySettings | None, like: object
) -> Tensor | None:
    """The rows [...] that a cross entropy does not ignore; None if all count.

    like: the scores or hidden values [..., D] of any size.
    """
    classes = class_indices(targets[0], like) if len(targets) == 1 else None
    return None if settings is None or classes is None else classes != settings.ignore_index


def weighed(
    losses: Mapping[int, Tensor], weights: Mapping[int, float]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The weighted sum over {size: loss}, and the losses, detached."""
    total = torch.stack([weights[size] * loss for size, loss in losses.items()]).sum(0)
    return total, {size: loss.detach() for size, loss in losses.items()}


def by_readout(readouts: Mapping[int, Readout]) -> Iterator[tuple[Readout, list[int]]]:
    """Yield each readout once, with the sizes that share it."""
    for readout in {id(r): r for r in readouts.values()}.values():
        yield readout, [size for size in readouts if readouts[size] is readout]


def fused(
    readouts: Mapping[int, Readout],
    target: Tensor,
    weights: dict[int, float],
    settings: CrossEntropySettings,
    scales: dict[int, Tensor],
) -> tuple[Tensor, dict[int, Tensor]]:
    """The cross entropies of {size: readout}: sizes that share one are computed together."""
    totals: list[Tensor] = []
    losses: dict[int, Tensor] = {}
    for readout, sizes in by_readout(readouts):
        mine = {m: weights[m] for m in sizes}
        total, found = fused_group(readout, target, mine, settings, scales)
        totals.append(total)
        losses |= found
    return torch.stack(totals).sum(0), {size: losses[size] for size in weights}


def fused_group(
    readout: Readout,
    target: Tensor,
    weights: dict[int, float],
    settings: CrossEntropySettings,
    scales: dict[int, Tensor],
) -> tuple[Tensor, dict[int, Tensor]]:
    """The cross entropies of one readout at the sizes of weights."""
    # two sizes may share a width of the readout
    shares = dict.fromkeys([readout.widths[size] for size in weights], 0.0)
    for size, weight in weights.items():
        shares[readout.widths[size]] += weight
    of_widths = {readout.widths[size]: scales[size] for size in weights if scales}
    total, losses = nested_cross_entropy(
        readout.scaled,
        readout.table,
        target,
        list(shares),
        weights=list(shares.values()),
        bias=readout.bias,
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
        reduction=settings.reduction,
        return_per_size=True,
        scales=torch.stack([of_widths[width] for width in shares]) if scales else None,
    )
    by_width = dict(zip(shares, losses, strict=True))
    return total, {size: by_width[readout.widths[size]] for size in weights}
