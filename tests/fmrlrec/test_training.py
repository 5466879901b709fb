"""The loop: it learns, it resumes to the same bits after SIGKILL, and it stops with a reason."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.fmrlrec import training
from examples.fmrlrec.config import Config, DataError, RunError, replace
from examples.fmrlrec.nesting import build, nest, objective
from examples.fmrlrec.pipeline import Material
from examples.fmrlrec.workers import device
from matryoshkafy.training import NonFiniteLoss

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from tests.fmrlrec import conftest, test_training
from examples.fmrlrec import training
from examples.fmrlrec.config import Config, replace
from matryoshkafy.training import resuming

training.torch.set_num_threads(1)  # as this process: the bits depend on the number
calls, real = [], resuming.write_tensors
def write_tensors(path, entries):
    calls.append(path)
    if len(calls) == int(sys.argv[2]):
        if sys.argv[3] == "cut":
            Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, entries)

resuming.write_tensors = write_tensors
config = replace(Config(), conftest.TINY)
test_training.run(conftest.cyclic_material(), config, Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("precision", "half"), [("auto", torch.cuda.is_available()), ("full", False), ("bf16", True)]
)
def test_a_run_computes_in_its_precision(precision: str, half: bool) -> None:
    with training.autocast(replace(Config(), {"precision": precision})):
        found = torch.ones(2, 2, device=device()) @ torch.ones(2, 2, device=device())
    assert found.dtype == (torch.bfloat16 if half else torch.float32)


def objective_of(material: Material, config: Config, kind: str = "one"):
    config = replace(config, {"sizes": "8"}) if kind == "one" else config
    model = build(config, material.data.item_count, material.features, 8)
    return objective(nest(model, config), config)


def run(material: Material, config: Config, folder: Path, kind: str = "one"):
    learning = objective_of(material, config, kind)
    progress = training.train(learning, material.data, config, folder)
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in progress.history]
    return history, {k: v.clone() for k, v in learning.doll.state_dict().items()}


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.fixture(scope="module")
def uninterrupted(material: Material, tiny: Config, tmp_path_factory: pytest.TempPathFactory):
    return run(material, tiny, tmp_path_factory.mktemp("whole"))


def test_the_seed_decides_the_weights(uninterrupted, material, tiny, tmp_path: Path) -> None:
    assert_same(run(material, tiny, tmp_path), uninterrupted)
    other = run(material, replace(tiny, {"seed": 1}), tmp_path / "other")
    assert other[0] != uninterrupted[0]


@pytest.mark.parametrize("moment", [pytest.param("3 before", marks=pytest.mark.slow), "6 cut"])
def test_a_killed_run_ends_with_the_same_bits(
    moment: str, uninterrupted, material, tiny, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), *moment.split(), str(ROOT)]
    killed = subprocess.run(words, capture_output=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert_same(run(material, tiny, tmp_path), uninterrupted)


def test_more_epochs_go_on_from_where_it_ended(material, tiny, tmp_path: Path) -> None:
    run(material, replace(tiny, {"epochs": 2}), tmp_path / "a")
    assert_same(run(material, tiny, tmp_path / "a"), run(material, tiny, tmp_path / "b"))


@pytest.mark.parametrize("kind", ["one", "nested"])
def test_it_learns(kind: str, material: Material, tiny: Config, tmp_path: Path) -> None:
    config = replace(tiny, {"epochs": 12, "patience": 12, "dropout": 0.0})
    history, _ = run(material, config, tmp_path, kind)
    name = {"one": "loss", "nested": "loss 8"}[kind]
    assert history[-1][name] < 0.7 * history[0][name]
    # 40 items in any order would give 0.11.
    assert max(row["NDCG@10 8"] for row in history) > 0.5


def test_nested_losses_are_told_per_size(material: Material, tiny: Config, tmp_path: Path) -> None:
    history, _ = run(material, replace(tiny, {"epochs": 1}), tmp_path, "nested")
    row = history[0]
    assert row["loss"] == pytest.approx(sum(row[f"loss {m}"] for m in (2, 4, 8)), rel=1e-5)
    assert {"NDCG@10 2", "NDCG@10 4", "NDCG@10 8"} <= row.keys()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss/2", "NDCG@10/8"} <= set(events.Tags()["scalars"])


def test_a_loss_told_is_the_mean_of_the_steps_that_had_it(material, tiny, tmp_path: Path) -> None:
    config = replace(tiny, {"every": "1/4:1,1/2:2,1:3", "epochs": 1, "checkpoint_steps": 1})
    learning, seen = objective_of(material, config, "nested"), []
    learning.register_forward_hook(lambda _module, _args, result: seen.append(result[1]))
    (row,) = training.train(learning, material.data, config, tmp_path).history
    for place, size in enumerate((2, 4, 8)):
        values = [float(losses[size]) for losses in seen if size in losses]
        assert len(values) == len(seen[:: place + 1]) > 1
        assert row[f"loss {size}"] == pytest.approx(sum(values) / len(values))


def test_it_stops_after_patience() -> None:
    config = replace(Config(), {"patience": 2, "epochs": 9})
    progress = training.Progress(epoch=4, best_epoch=2)
    assert not training.finished(progress, config)
    assert training.finished(dataclasses.replace(progress, epoch=5), config)
    assert training.finished(dataclasses.replace(progress, epoch=9, best_epoch=8), config)


def test_a_loss_that_is_not_finite_stops_with_its_place(material, tiny, tmp_path: Path) -> None:
    learning = objective_of(material, tiny)
    with torch.no_grad():
        learning.doll.get_parameter("norm_out.weight").fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match=r"parameter `norm_out.weight` holds nan. Lower the"):
        training.train(learning, material.data, tiny, tmp_path)


def test_users_without_a_step_are_refused(material, tiny, tmp_path: Path) -> None:
    data = dataclasses.replace(material.data, offsets=material.data.offsets[:1].repeat(3))
    with pytest.raises(DataError, match="four items"):
        training.train(objective_of(material, tiny), data, tiny, tmp_path)


def test_warm_up_rises_and_stays() -> None:
    config = replace(Config(), {"lr": 0.1, "warmup": 4})
    rates = [training.learning_rate(step, 50, config) for step in range(6)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_a_cosine_falls_to_a_fiftieth_over_all_epochs() -> None:
    settings = {"lr": 0.1, "warmup": 1, "schedule": "cosine", "epochs": 5}
    config = replace(Config(), settings)
    rates = [training.learning_rate(step, 50, config) for step in range(51)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[25], rates[50]) == pytest.approx((0.1, 0.051, 0.002))


def test_only_matrices_decay(material, tiny) -> None:
    learning = objective_of(material, tiny, "nested")
    groups = training.parameter_groups(learning, 0.3)
    by_kind = {(g["weight_decay"], g["factor"]): g for g in groups}
    decayed, kept, scales = (by_kind[key] for key in ((0.3, 1), (0.0, 1), (0.0, 10)))
    names = {id(p): n for n, p in learning.doll.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert {"bias", "blocks.0.mix.nu_log"} <= {names[id(p)] for p in kept["params"]}
    assert [p.shape for p in scales["params"]] == [(3,)]
    assert sum(len(g["params"]) for g in groups) == len(names) + 1


def test_missing_weights_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run `train` first"):
        training.load_weights(torch.nn.Linear(1, 1), tmp_path / "best.safetensors")


def test_the_log_is_a_table_of_80_columns() -> None:
    sizes = [2**i for i in range(3, 14)]
    row = {"epoch": 1.0, "seconds": 7300.0, "loss": 1234.5, "loss 8": 3.0}
    row |= {f"NDCG@10 {size}": size / 2**14 for size in sizes}
    first = training.Progress(epoch=1, best_epoch=0, history=(row,))
    title, head, line = training.log_lines(first)
    assert max(map(len, (title, head, line))) <= 80
    assert head.split()[3:] == [str(size) for size in sizes[-8:]]
    scores = [f"{size / 2**14:.4f}" for size in sizes[-8:]]
    assert line.split() == ["1", "121", "min", "40", "s", "1234", *scores[:-1], scores[-1] + "*"]
    later = training.Progress(epoch=123, best_epoch=0, history=(row, row))
    assert len(training.log_lines(later)) == 1 and "*" not in training.log_lines(later)[0]
