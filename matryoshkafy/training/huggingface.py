"""The Trainer of transformers for a doll: one training run, metrics of every size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.files.checkpoint import save
from matryoshkafy.losses import scores_of
from matryoshkafy.training.all_sizes import AllSizes, are_inputs, argument_names

Metrics = Callable[[EvalPrediction], dict[str, float]]
Batch = dict[str, Any]  # what a collator makes


def untyped(value: object) -> Any:
    """A part of transformers or accelerate, whose own types are not known."""
    return value


class NestedTrainer(Trainer):
    """Trainer(model=doll, loss=MatryoshkaLoss(...)): trains every size, evaluates every size.

    compute_metrics gets the predictions of one size at a time; its metrics come back as
    `eval_<size>_<name>`, beside `eval_<size>_loss`. Logs hold `loss_<size>`. Checkpoints hold the
    weights under the user's own names, and in their folder `doll` what `mk.load` reads.

    Args:
        model: a doll (or an AllSizes).
        args: as for Trainer.
        loss: as for AllSizes.
        compute_metrics: as for Trainer, of one size.
        shift_labels: as for AllSizes, but None shifts labels that are the input ids, as a collator
            for causal language models makes them.
        kwargs: as for Trainer.
    """

    def __init__(
        self,
        model: Doll | AllSizes,
        *args: Any,
        loss: Callable[..., object] | None = None,
        compute_metrics: Metrics | None = None,
        shift_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        made = isinstance(model, AllSizes)
        everything = model if made else AllSizes(model, loss, shift_labels=shift_labels)
        metrics = None if compute_metrics is None else per_size(compute_metrics, everything.sizes)
        self._everything, self._seen = everything, dict[int, list[Tensor]]()
        self._judged: dict[int, list[Tensor]] = {}
        start = cast("Callable[..., None]", super().__init__)  # pyright: ignore[reportUnknownMemberType]
        start(everything, *args, compute_metrics=metrics, **kwargs)
        self._columns = argument_names(everything.doll)
        self._signature_columns = [*self._columns, "label", "label_ids", "labels"]

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Any, inputs: Batch, return_outputs: bool = False, **kwargs: object
    ) -> Any:
        """The loss of all sizes; what each size lost is kept for the log."""
        whole = self._everything
        if whole.shift_labels is None and not whole.labels_inside:
            whole.shift_labels = are_inputs(inputs.get("labels"), inputs.get("input_ids"))
        found = model(**inputs)
        seen = self._seen if model.training else self._judged
        for size, value in found.per_size.items():
            seen.setdefault(size, []).append(value.detach())
        return (found.loss, found) if return_outputs else found.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean loss of each size since the last time."""
        if "loss" in logs:
            means = {m: torch.stack(values).mean().item() for m, values in self._seen.items()}
            logs |= {f"loss_{size}": mean for size, mean in means.items()}
            self._seen = {}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the mean loss of each size over the batches."""
        self._judged = {}
        judge = cast("Callable[..., Any]", super().evaluation_loop)  # pyright: ignore[reportUnknownMemberType]
        found = judge(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for size, values in self._judged.items():
            mean = untyped(self.accelerator).reduce(torch.stack(values).mean(), "mean")
            found.metrics[f"{prefix}_{size}_loss"] = mean.item()
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint of the doll beside what Trainer reads, unless it is sharded."""
        write = cast("Callable[..., None]", super()._save)  # pyright: ignore[reportUnknownMemberType]
        write(output_dir, state_dict=state_dict)
        doll, folder = self._everything.doll, output_dir or self.args.output_dir
        if folder is not None and all(type(p) is nn.Parameter for p in doll.parameters()):
            save(doll, Path(folder) / "doll", force=True)

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """(loss, a tuple of every size's predictions, labels)."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach() if labels is not None else None
            if prediction_loss_only:
                return loss, None, None
            kept = {k: v for k, v in inputs.items() if k in self._columns}
            outputs = self._everything.doll.outputs(**kept)
        return loss, tuple(scores(outputs[size]) for size in outputs), labels


def scores(output: object) -> Tensor:
    """The logits of a model's output."""
    found = scores_of(output)
    assert isinstance(found, Tensor), f"a size gives {type(found).__name__}, no scores"
    return found.detach()


def per_size(metrics: Metrics, sizes: list[int]) -> Metrics:
    """Metrics over the predictions of every size."""

    def every(found: EvalPrediction) -> dict[str, float]:
        each = zip(sizes, found.predictions, strict=True)
        results = {m: metrics(EvalPrediction(out, found.label_ids)) for m, out in each}
        return {f"{m}_{name}": v for m, found in results.items() for name, v in found.items()}

    return every
