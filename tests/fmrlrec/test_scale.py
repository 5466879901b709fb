"""More than one machine: workers of Ray make the same rows, processes get the same losses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from examples.fmrlrec import data, encoders, formats, synthetic, training
from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.pipeline import Material
from examples.fmrlrec.workers import each_on, serially
from tests.benchmarks import fmrlrec_scale as scale
from tests.fmrlrec.test_training import objective_of

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
from pathlib import Path
import torch
from examples.fmrlrec.config import Config, replace
from tests.fmrlrec import conftest, test_scale
torch.set_num_threads(1)
material, config = conftest.cyclic_material(), replace(Config(), conftest.TINY)
told = {n: test_scale.losses(material, config, f"{sys.argv[1]}/{n}", n) for n in test_scale.DRAWN}
if torch.distributed.get_rank() == 0:
    Path(sys.argv[1], "told.json").write_text(json.dumps(told))
torch.distributed.destroy_process_group()
"""
HERE = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "OMP_NUM_THREADS": "1"}
LAUNCHER = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
# Scores of all items, and of the target and seven more.
DRAWN = (0, 7)


def losses(
    material: Material, config: Config, folder: str, negatives: int, epochs: int = 2
) -> list[dict[str, float]]:
    """The losses in float64: Adam makes much of a rounding of a small gradient."""
    changes = {"dropout": 0.0, "epochs": epochs, "negatives": negatives, "modality": "id"}
    config = replace(config, changes)
    learning = objective_of(material, config, "nested").double()
    history = training.train(learning, material.data, config, Path(folder)).history
    table = learning.doll.get_parameter("items.weight")
    if torch.distributed.is_initialized():
        assert isinstance(table, DTensor) and len(table.to_local()) in (20, 21), "of 41 rows"
    return [{n: v for n, v in row.items() if n.startswith("loss")} for row in history]


def test_parts_may_be_prepared_in_any_order(tmp_path: Path) -> None:
    """What `Each` promises is order of results; who computes them, and when, does not matter."""
    shop = synthetic.generate(tmp_path / "shop", synthetic.Shop(items=50, users=80))
    config = replace(Config(), {"partition_rows": 100, "min_count": 2, "encoder_size": 4})

    def backwards(function, parts, *shared):
        found = {n: function(part, *shared) for n, part in reversed(list(enumerate(parts)))}
        return [found[n] for n in range(len(parts))]

    made = []
    for name, each in (("one", serially), ("other", backwards)):
        source = formats.read(shop, tmp_path / name / "lines")
        found = data.prepare(source, tmp_path / name, config, each)
        made.append((found, encoders.encode(found.catalogue, config, tmp_path / name, each)))
    (one, first), (other, second) = made
    assert scale.same(one, other)
    for name, vectors in first.vectors.items():
        np.testing.assert_array_equal(vectors, second.vectors[name])


@pytest.mark.slow
def test_workers_of_ray_prepare_the_same_rows(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    parts = scale.generate(tmp_path / "parts", 20_000)
    config = replace(Config(), {"partition_rows": 3_000})
    try:
        one, _ = scale.measure(parts, tmp_path / "one", config, serially)
        two, _ = scale.measure(parts, tmp_path / "two", config, each_on(2))
    finally:
        ray.shutdown()
    assert scale.same(one, two) and len(one.items) > 1000


def test_a_plan_multiplies_what_was_measured(material: Material) -> None:
    million = len(material.data.items) / 1e6
    text = scale.plan(60.0, 1024.0, material.data, 10 * million)
    assert "| 10 min |" in text and "| 10.0 GiB |" in text


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes trained in."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**HERE, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", WORKER, str(folder)]
    children = [
        subprocess.Popen(words, cwd=ROOT, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [child.wait(timeout=240) for child in children] == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("negatives", DRAWN)
def test_two_processes_with_half_a_table_each_train_to_the_losses_of_one(
    negatives: int, two_processes: Path, material: Material, tiny: Config, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    found = json.loads((two_processes / "told.json").read_text())[str(negatives)]
    expected = losses(material, tiny, str(tmp_path), negatives, epochs=3)
    assert len(found) == 2 and set(found[0]) == {"loss", "loss 2", "loss 4", "loss 8"}
    for mine, theirs in zip(expected[:2], found, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-8)
    best = load_file(two_processes / str(negatives) / training.BEST)
    assert best["items.weight"].shape == (41, 8), "whole, whoever trained it"
    resumed = losses(material, tiny, str(two_processes / str(negatives)), negatives, epochs=3)
    assert resumed[2] == pytest.approx(expected[2], rel=1e-8), "one goes on where two left off"


@pytest.mark.slow
def test_the_command_trains_on_two_processes_as_on_one(tmp_path: Path) -> None:
    """From nothing: they prepare in turn, train together, and one of them tells."""
    shop = synthetic.generate(tmp_path / "shop", synthetic.Shop(items=50, users=80))
    changes = ("epochs=2", "dropout=0", "encoder_size=4", "negatives=20")
    settings = [word for change in changes for word in ("--set", change)]
    told = []
    for name, launcher in (("one", ()), ("two", (*LAUNCHER, "--"))):
        words = ["train", "--data", str(shop), "--run", str(tmp_path / name), "--sizes", "4..8"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "examples.fmrlrec", *words, *settings],
            cwd=ROOT, env=HERE, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = [line for line in done.stdout.splitlines() if line[:4].strip().isdigit()]
        told.append([float(row[17:23]) for row in rows])
        assert len([*(tmp_path / name / "nested" / "tensorboard").iterdir()]) == 1
    assert len(told[0]) == 2 and told[1] == pytest.approx(told[0], rel=1e-3)
