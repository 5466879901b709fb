"""Training in the ecosystem: one call for all sizes, resuming, blame, logs, accelerate, Trainer."""

from __future__ import annotations

import copy
import io
import json
import random
import signal
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.files.folders import FolderError
from matryoshkafy.losses import MatryoshkaLoss
from matryoshkafy.training import (
    AllSizes,
    NonFiniteLoss,
    ResumeError,
    RunLog,
    batches,
    first_non_finite,
    resume_run,
    save_run,
    scale_rows,
)
from matryoshkafy.training.all_sizes import AllSizesError
from matryoshkafy.training.resuming import state_from_json, state_to_json
from tests.training.runs import (
    BATCH,
    EXAMPLES,
    SAVE_EVERY,
    STEPS,
    consecutive,
    examples,
    loss_of,
    plain_losses,
    run,
    sgd,
    small_doll,
)

ROOT = Path(__file__).parents[2]


# AllSizes.


def test_names_and_parameters_are_the_users() -> None:
    doll = small_doll()
    everything = AllSizes(doll, loss_of())
    names = [name for name, _ in doll.named_parameters()]
    assert "stem.weight" in names
    assert [name for name, _ in everything.named_parameters()] == names
    assert list(everything.state_dict()) == list(doll.state_dict())
    assert all(a is b for a, b in zip(everything.parameters(), doll.parameters(), strict=True))
    everything.load_state_dict({n: torch.zeros_like(t) for n, t in doll.state_dict().items()})
    assert all(not t.any() for t in doll.parameters())


def test_the_loss_is_the_sum_of_the_cross_entropies_of_the_slices() -> None:
    doll, (x, y) = small_doll().double(), examples()
    everything = AllSizes(doll, MatryoshkaLoss(nn.CrossEntropyLoss()))
    loss, per_size = everything(x.double(), labels=y)
    expected = {m: F.cross_entropy(mk.slice(doll, m)(x.double()), y) for m in doll.sizes}
    assert {m: v.item() for m, v in per_size.items()} == pytest.approx(
        {m: v.item() for m, v in expected.items()}, rel=1e-12
    )
    assert loss.item() == pytest.approx(sum(v.item() for v in expected.values()), rel=1e-12)


def test_mode_dtype_and_copies_follow() -> None:
    doll = small_doll(dropout=0.5)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(weight=torch.ones(5)))
    everything = AllSizes(doll, loss).double().eval()
    x, y = examples()
    assert not doll.training and not doll._root.training
    assert torch.equal(everything(x.double(), labels=y).loss, everything(x.double(), labels=y).loss)
    twin = copy.deepcopy(everything)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not twin(x.double(), labels=y).loss.equal(everything(x.double(), labels=y).loss)
    assert next(twin.doll.parameters()) is next(twin.parameters())


class Judging(nn.Module):
    """A model that computes its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and the logits."""
        logits = self.head(torch.relu(self.mid(torch.relu(self.stem(x)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_with_a_loss_of_its_own_keeps_it() -> None:
    x, y = examples()
    doll = mk.convert(Judging(), (x[:3], y[:3]), sizes="4..16")
    loss, per_size = AllSizes(doll)(x, labels=y)
    slices = [mk.slice(doll, m)(x, y)["loss"].item() for m in doll.sizes]
    assert [v.item() for v in per_size.values()] == pytest.approx(slices, rel=1e-5)
    assert loss.item() == pytest.approx(sum(slices), rel=1e-5)


def test_a_missing_loss_is_refused() -> None:
    with pytest.raises(AllSizesError, match="no loss was given.*MatryoshkaLoss"):
        AllSizes(small_doll())


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_learned_scales_train_along(nesting: str) -> None:
    doll, (x, y) = small_doll(nesting=nesting), examples()
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), sizes=doll.sizes, learn_scales=True)
    everything = AllSizes(doll, loss)
    names = [name for name, _ in everything.named_parameters()]
    assert names == [*(name for name, _ in doll.named_parameters()), "loss.log_scales"]
    assert "loss" not in doll._modules and loss.log_scales is not None
    optimizer = torch.optim.SGD(everything.parameters(), lr=0.1)
    everything(x, labels=y).loss.backward()
    (expected,) = torch.autograd.grad(loss(doll.outputs(x), y), [loss.log_scales])
    torch.testing.assert_close(loss.log_scales.grad, expected)
    optimizer.step()
    assert (loss.log_scales != 0).all()
    twin = copy.deepcopy(everything).double()
    assert twin.state_dict()["loss.log_scales"].dtype == torch.float64
    assert loss.log_scales.dtype == torch.float32


class Causal(nn.Module):
    """A language model [B, T] -> [B, T, V] that sees its own position, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(7, 16), nn.Linear(16, 16), nn.Linear(16, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The scores of the next token."""
        return self.head(torch.relu(self.mid(self.table(input_ids))))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_labels_that_are_the_inputs_are_shifted_or_refused(nesting: str) -> None:
    ids, loss = torch.randint(7, (3, 5)), MatryoshkaLoss(nn.CrossEntropyLoss())
    doll = mk.convert(Causal(), ids, sizes=[4, 16], nesting=nesting)
    with pytest.raises(AllSizesError, match="the labels are the input ids.*shift_labels=True"):
        AllSizes(doll, loss)(input_ids=ids, labels=ids)
    labels = ids.clone()
    labels[0, :2] = -100
    with pytest.raises(AllSizesError, match="the labels are the input ids"):
        AllSizes(doll, loss)(ids, labels=labels)
    found = AllSizes(doll, loss, shift_labels=True)(ids, labels=labels).loss
    logits = [mk.slice(doll, size)(ids)[:, :-1].flatten(0, 1) for size in doll.sizes]
    expected = sum(F.cross_entropy(out, labels[:, 1:].flatten()) for out in logits)
    torch.testing.assert_close(found, expected)
    as_they_are = AllSizes(doll, loss, shift_labels=False)(ids, labels=labels).loss
    assert not torch.allclose(as_they_are, found)
    AllSizes(doll, loss)(ids, labels=(labels + 1) % 7)


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_rows_are_scaled_to_what_they_read(nesting: str) -> None:
    doll = small_doll(nesting=nesting)
    before = {name: t.detach().clone() for name, t in doll.named_parameters()}
    factors = scale_rows(doll)
    assert set(factors) == ({"up.weight", "down.weight"} if nesting == "masked" else set())
    rows = {"up.weight": [8, 8, 16], "down.weight": [4, 4, 8]}
    for name, tensor in doll.named_parameters():
        scale = torch.ones(len(tensor))
        if name in factors:
            assert factors[name] == pytest.approx((2.0, 2**0.5, 1.0))
            scale = torch.tensor(factors[name]).repeat_interleave(torch.tensor(rows[name]))
        expected = before[name] * scale.view(-1, *[1] * (tensor.dim() - 1))
        torch.testing.assert_close(tensor.detach(), expected)


# Resuming.


@pytest.mark.parametrize("event", [0, 6, 13])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, event: int) -> None:
    """SIGKILL in the first save after a random step, at its first, a middle and a late moment."""
    folder, step = tmp_path / "run", random.SystemRandom().randrange(1, STEPS - SAVE_EVERY)
    command = [sys.executable, "-m", "tests.training.runs", str(folder), str(step), str(event)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, (step, done.stderr)
    resumed, whole = run(folder), run(None)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), (name, step, event)


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.standard_normal(), torch.rand(()).item()]

    np.random.standard_normal()
    save_run(tmp_path / "run", {})
    expected = draw()
    draw()
    assert resume_run(tmp_path / "run", {}) is None
    assert draw() == expected


def test_states_survive_as_they_are(tmp_path: Path) -> None:
    state = {
        "milestones": Counter({3: 1, 7: 2}),
        2: [(1, -0.0), OrderedDict(b=1, a=None)],
        "best": float("-inf"),
        "tiny": 5e-324,
        "flag": True,
    }
    back = state_from_json(json.loads(json.dumps(state_to_json(state, "x", {}))), None)
    assert back == state and list(back[2][1]) == ["b", "a"]
    assert str(back[2][0][1]) == "-0.0"
    assert type(back["milestones"]) is Counter and back["flag"] is True


@pytest.mark.parametrize(
    ("state", "place"), [({"a": [1, {2, 3}]}, "part.a.1"), ({"f": len}, "part.f")]
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, place: str) -> None:
    class Part:
        def state_dict(self) -> Any:
            return state

    with pytest.raises(ResumeError, match=f"{place} is .* which cannot be saved"):
        save_run(tmp_path / "run", {"part": Part()})
    assert not (tmp_path / "run").exists()


def test_other_parts_and_damage_are_refused(tmp_path: Path) -> None:
    folder, doll = tmp_path / "run", small_doll()
    assert resume_run(folder, {"model": doll}) is None
    assert save_run(folder, {"model": doll}, {"epoch": 1}) == folder
    assert resume_run(folder, {"model": doll}) == {"epoch": 1}
    with pytest.raises(ResumeError, match=r"a run of \['model'\], but \['net'\] were given"):
        resume_run(folder, {"net": doll})
    data = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FolderError, match="SHA-256"):
        resume_run(folder, {"model": doll})
    (folder / "run.json").write_text('{"format": 99}')
    with pytest.raises(ResumeError, match="format"):
        resume_run(folder, {"model": doll})


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    whole = list(batches(10, 4, seed=1, epoch=2))
    assert [len(b) for b in whole] == [4, 4, 2]
    assert sorted(torch.cat(whole).tolist()) == list(range(10))
    rest = list(batches(10, 4, seed=1, epoch=2, start=1))
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(torch.cat(whole), torch.cat(list(batches(10, 4, seed=1, epoch=3))))


# Non-finite losses.


def spoiled_input(everything: AllSizes, x: Tensor, y: Tensor) -> None:
    x[0, 0] = float("inf")


def spoiled_weight(everything: AllSizes, x: Tensor, y: Tensor) -> None:
    everything.get_parameter("up.weight").data[0, 0] = float("nan")


def overflow(everything: AllSizes, x: Tensor, y: Tensor) -> None:
    everything.get_parameter("down.weight").data.fill_(3e38)


def large_sizes_only(everything: AllSizes, x: Tensor, y: Tensor) -> None:
    everything.get_parameter("head.weight").data[:, 8:] = 3e38


def no_labels(everything: AllSizes, x: Tensor, y: Tensor) -> None:
    y.fill_(-100)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoiled_input, "input `x` holds inf"),
        (spoiled_weight, "parameter `up.weight` holds nan"),
        (overflow, r"module `down`: linear gives (inf|nan) \(.*runs.py:\d+"),
        (large_sizes_only, r"module `head`: linear gives (inf|nan) \(.*, size 16\)"),
        (no_labels, "outputs are finite at every size: the criterion or its labels"),
    ],
)
def test_a_non_finite_loss_names_its_origin(spoil: Any, message: str) -> None:
    everything, (x, y) = AllSizes(small_doll(), MatryoshkaLoss(nn.CrossEntropyLoss())), examples()
    spoil(everything, x, y)
    with pytest.raises(NonFiniteLoss, match=message):
        everything(x, labels=y)
    unchecked = AllSizes(everything.doll, everything.loss, check=False)
    assert not unchecked(x, labels=y).loss.isfinite()


class Masked(nn.Module):
    """Attention weights over a mask, the infinities of which are no error."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x [N, 6], keep [N, N] -> [N, 5]."""
        x = self.norm(x)
        scores = (x @ x.t()).masked_fill(~keep, float("-inf"))
        return self.head(torch.softmax(scores, -1) @ self.mid(torch.relu(self.stem(x))))


def test_the_infinities_of_a_mask_are_no_origin() -> None:
    x, _ = examples()
    keep = torch.ones(EXAMPLES, EXAMPLES).tril().bool()
    doll = mk.convert(Masked(), (x, keep), sizes="4..16")
    before = {n: b.clone() for n, b in doll.named_buffers()}
    state = torch.get_rng_state()
    assert first_non_finite(doll, (x, keep)) is None
    assert all(torch.equal(b, before[n]) for n, b in doll.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    keep[3] = False
    found = first_non_finite(doll, (x, keep))
    assert found is not None and (found.name, found.value) == ("softmax", "nan")


# Progress and event files.


def test_event_files_hold_every_size(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = Console(file=io.StringIO(), force_terminal=True, width=120)
    with RunLog(4, folder=tmp_path, every=2, console=shown) as log:
        for step in range(4):
            log.step(step + 0.5, {8: torch.tensor(step * 2.0), 16: torch.tensor(step * 1.0)})
        log.record("accuracy", {8: 0.5, 16: 0.75}, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    assert read == {
        "loss": [(0, 0.5), (2, 2.5)],
        "loss/8": [(0, 0.0), (2, 4.0)],
        "loss/16": [(0, 0.0), (2, 2.0)],
        "accuracy/8": [(4, 0.5)],
        "accuracy/16": [(4, 0.75)],
    }
    assert isinstance(shown.file, io.StringIO) and "loss 2.5000" in shown.file.getvalue()


# accelerate and Trainer against the plain loop.


def test_accelerate_takes_the_same_steps() -> None:
    from accelerate import Accelerator

    expected = plain_losses(small_doll(), 2, sgd)
    accelerator, (x, y) = Accelerator(cpu=True), examples()
    everything = AllSizes(small_doll(), loss_of())
    model, optimizer = accelerator.prepare(everything, sgd(everything.parameters()))
    losses = []
    for rows in list(consecutive())[:2]:
        optimizer.zero_grad()
        loss = model(x[rows], labels=y[rows]).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-6)
    assert accelerator.unwrap_model(model) is everything


def test_accelerate_accumulates_gradients() -> None:
    from accelerate import Accelerator

    accelerator, (x, y) = Accelerator(cpu=True, gradient_accumulation_steps=2), examples()
    everything = AllSizes(small_doll(), MatryoshkaLoss(nn.CrossEntropyLoss()))
    model, optimizer = accelerator.prepare(everything, sgd(everything.parameters()))
    for half in (slice(0, 8), slice(8, 16)):
        with accelerator.accumulate(model):
            accelerator.backward(model(x[half], labels=y[half]).loss)
            optimizer.step()
            optimizer.zero_grad()
    other = AllSizes(small_doll(), MatryoshkaLoss(nn.CrossEntropyLoss()))
    plain = sgd(other.parameters())
    other(x[:16], labels=y[:16]).loss.backward()
    plain.step()
    for mine, theirs in zip(everything.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_accelerate_runs_in_bfloat16_as_autocast_does() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    (x, y), everything = examples(), AllSizes(small_doll(), loss_of())
    with torch.autocast("cpu", torch.bfloat16):
        expected = everything(x, labels=y).loss
    AcceleratorState._reset_state()
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(AllSizes(small_doll(), loss_of()))
    AcceleratorState._reset_state()
    loss = model(x, labels=y).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() != everything(x, labels=y).loss.item()


class Rows(torch.utils.data.Dataset):
    """The examples as Trainer wants them."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = examples()
        return {"x": x[index], "labels": y[index]}


def trainer(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    from matryoshkafy.training.huggingface import NestedTrainer

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_steps=2, use_cpu=True, report_to=[],
        logging_steps=1, lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True,
        save_strategy="no", train_sampling_strategy="sequential", **options.pop("arguments", {}),
    )  # fmt: skip
    doll = small_doll()
    optimizers = (sgd(doll.parameters()), None)
    return NestedTrainer(
        doll, arguments, loss=loss_of(), train_dataset=Rows(), eval_dataset=Rows(),
        optimizers=optimizers, **options,
    )  # fmt: skip


def test_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    expected = plain_losses(small_doll(), 2, sgd)
    run = trainer(tmp_path)
    run.train()
    steps = [row for row in run.state.log_history if "loss" in row]
    assert [row["loss"] for row in steps] == pytest.approx(expected, rel=1e-4)
    assert {"loss_4", "loss_8", "loss_16"} <= set(steps[0])
    run.save_model(str(tmp_path / "saved"))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert sorted(saved) == sorted(small_doll().state_dict())
    x, _ = examples()
    small = mk.load(tmp_path / "saved" / "doll", size=8)
    assert torch.equal(small(x), mk.slice(run.model.doll, 8)(x))


def test_trainer_evaluates_every_size(tmp_path: Path) -> None:
    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    run, (x, y) = trainer(tmp_path, compute_metrics=accuracy), examples()
    metrics = run.evaluate()
    for size in run.model.sizes:
        logits = mk.slice(run.model.doll, size)(x)
        expected = (logits.argmax(-1) == y).double().mean().item()
        assert metrics[f"eval_{size}_accuracy"] == pytest.approx(expected)
        loss = F.cross_entropy(logits, y).item()
        assert metrics[f"eval_{size}_loss"] == pytest.approx(loss, rel=1e-4)
    assert "eval_loss" in metrics


def test_trainer_shifts_the_labels_of_a_causal_collator(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from matryoshkafy.training.huggingface import NestedTrainer

    ids = torch.randint(7, (4, 5))
    doll = mk.convert(Causal(), ids, sizes=[4, 16])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())
    rows = [{"input_ids": row, "labels": row} for row in ids]
    metrics = NestedTrainer(doll, arguments, loss=loss, eval_dataset=rows).evaluate()
    for size in doll.sizes:
        logits = mk.slice(doll, size)(ids)[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, ids[:, 1:].flatten()).item()
        assert metrics[f"eval_{size}_loss"] == pytest.approx(expected, rel=1e-4)
