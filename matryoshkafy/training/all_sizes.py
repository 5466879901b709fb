"""AllSizes: a doll and its loss as one module, whose call DDP, FSDP2 and Trainer can hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll, tables_of, trace_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.losses import MatryoshkaLoss
from matryoshkafy.training.blaming import NonFiniteLoss, explain

IGNORED = -100
Targets = tuple[object, ...]


class AllSizesError(MatryoshkafyError):
    """A doll and a loss that do not make a training step."""


class StepLoss(NamedTuple):
    """The loss of a step, and {size: unweighted loss}, detached."""

    loss: Tensor
    per_size: dict[int, Tensor]


def own_loss(output: Any) -> Tensor:
    """The loss that a model computed itself: its output's "loss", .loss, or first part.

    Args:
        output: what the model returned.
    """
    if isinstance(output, Mapping):
        return cast("Mapping[str, Tensor]", output)["loss"]
    return output.loss if hasattr(output, "loss") else output[0]


class AllSizes(nn.Module):
    """`loss, per_size = AllSizes(doll, loss)(x, labels=y)`: one call computes every size's loss.

    Give it to DistributedDataParallel, fully_shard, accelerate or Trainer in place of the model. It
    holds the doll's own parameters under the user's own names, without a prefix.

    loss(outputs, *targets) is a MatryoshkaLoss over what `doll.outputs` returns; parameters of its
    own (learned scales) train along, under names that begin with `loss.`. `labels` is a target or a
    tuple of them; it goes into the model instead where the doll was traced with an argument
    `labels`: then the losses that the model itself returns are summed over the sizes.
    fully_shard this module as a whole: those inside are only names.

    Args:
        doll: what is trained.
        loss: None where the doll computes its own.
        check: a loss that is not finite raises NonFiniteLoss with the place of its origin; reading
            the loss waits for the device.
        shift_labels: labels [B, T] of a causal language model are its input ids: position t learns
            label t + 1. True shifts them; None refuses labels that are the input ids.

    Raises:
        AllSizesError: no loss where one is needed, or labels that a copy of the input predicts.
    """

    doll: Doll
    loss: Callable[..., Any]
    # Trainer would otherwise pass num_items_in_batch and expect the model to divide by it.
    accepts_loss_kwargs = False

    def __init__(
        self,
        doll: Doll,
        loss: Callable[..., object] | None = None,
        *,
        check: bool = True,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(tables_of(doll))
        inside = "labels" in argument_names(doll)
        check_loss(loss, inside)
        if isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None:
            self.__dict__["_modules"] = with_loss(doll, loss)
        # Past nn.Module's __setattr__, which would register both under names of ours.
        self.__dict__["doll"] = doll
        self.__dict__["loss"] = MatryoshkaLoss(own_loss) if loss is None else loss
        self.labels_inside, self.check, self.shift_labels = inside, check, shift_labels
        self.training = doll.training

    @property
    def sizes(self) -> list[int]:
        """The sizes of the doll, ascending."""
        return self.doll.sizes

    def forward(self, *args: object, labels: object = None, **kwargs: object) -> StepLoss:
        """The doll's own arguments, and labels -> the loss and {size: loss}."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        targets, kwargs = self.targets(labels, kwargs)
        if self.shift_labels or (self.shift_labels is None and not self.labels_inside):
            targets = tuple(self.shifted(target, ids) for target in targets)
        outputs = self.doll.outputs(*args, **kwargs)
        found = self.evaluated(outputs, targets)
        checked = self.check and not torch.compiler.is_compiling()
        if checked and not bool(torch.isfinite(found.loss.detach()).all()):
            raise NonFiniteLoss(explain(found.loss, self.doll, args, kwargs))
        return found

    def targets(
        self, labels: object, kwargs: dict[str, object]
    ) -> tuple[Targets, dict[str, object]]:
        """What the loss gets, and the keywords that the model gets."""
        if labels is None:
            return (), kwargs
        if self.labels_inside:
            return (), {**kwargs, "labels": labels}
        several = isinstance(labels, tuple)
        return cast("Targets", labels) if several else (labels,), kwargs

    def shifted(self, target: object, ids: object) -> object:
        """What each position learns: the label of the next one, where labels are to be shifted."""
        if self.shift_labels and isinstance(target, Tensor):
            return F.pad(target[:, 1:], (0, 1), value=IGNORED)
        if are_inputs(target, ids):
            raise AllSizesError(
                "the labels are the input ids, position by position: a model that copies its input "
                "would have learned them. For a causal language model, whose position t predicts "
                "token t + 1, give shift_labels=True; else shift_labels=False"
            )
        return target

    def evaluated(self, outputs: Mapping[int, object], targets: Targets) -> StepLoss:
        """The loss, per size where it is a MatryoshkaLoss."""
        if isinstance(self.loss, MatryoshkaLoss):
            return StepLoss(*self.loss(outputs, *targets, return_per_size=True))
        return StepLoss(self.loss(outputs, *targets), {})

    def train(self, mode: bool = True) -> AllSizes:
        """Switch the doll, too."""
        self.training = mode
        self.doll.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AllSizes:
        """Class weights and the like follow the model to its device."""
        applied: Any = super()  # torch leaves it untyped
        applied._apply(fn, recurse)
        loss: Any = self.loss
        if isinstance(loss, nn.Module) and loss not in self._modules.values():
            loss._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        return self


def argument_names(doll: Doll) -> list[str]:
    """The names of the arguments that a doll was traced with."""
    return [item.name for item in trace_of(doll).signature.inputs]


def check_loss(loss: Callable[..., object] | None, inside: bool) -> None:
    """Raises AllSizesError with the remedy."""
    if loss is None and not inside:
        raise AllSizesError(
            "no loss was given, and the doll was not traced with labels; give one, e.g. "
            "AllSizes(doll, MatryoshkaLoss(nn.CrossEntropyLoss()))"
        )


def with_loss(doll: Doll, loss: nn.Module) -> dict[str, nn.Module | None]:
    """The modules of a doll, and the loss under a name of its own."""
    parts: dict[str, nn.Module | None] = doll.__dict__["_modules"]
    if "loss" in parts:
        raise AllSizesError(
            "the loss has parameters of its own, which would be called loss.*, but the model has "
            "a part of that name; make the parameters part of the model before convert"
        )
    return {**parts, "loss": loss}


def are_inputs(labels: object, ids: object) -> bool:
    """Whether labels are the input ids wherever they count, in more than one position."""
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor):
        return False
    if labels.shape != ids.shape or ids.ndim != 2 or ids.is_floating_point():
        return False
    real, same = torch.ne(labels, IGNORED), torch.eq(labels, ids)
    return ids.shape[1] > 1 and bool(real.any()) and bool(same[real].all())
