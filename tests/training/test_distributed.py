"""Two gloo processes take the steps of one process over the same global batch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import matryoshkafy as mk
from matryoshkafy.training import (
    AllSizes,
    Corrections,
    Recipe,
    Term,
    distil,
    full_state,
    resume_run,
    save_run,
)
from tests.training.runs import consecutive, examples, loss_of, plain_losses, sgd, small_doll

WORLD, STEPS = 2, 3
KINDS = ("ddp", "accelerate", "fsdp", "fsdp resumed")


def test_losses_are_those_of_one_process(runs: Path) -> None:
    expected = plain_losses(small_doll(), STEPS, sgd)
    found = [json.loads((runs / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for kind in KINDS:
        means = [sum(step) / WORLD for step in zip(*(f[kind] for f in found), strict=True)]
        assert means == pytest.approx(expected, rel=1e-5), kind


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpoints_hold_the_weights_of_one_process(runs: Path, kind: str) -> None:
    doll = small_doll()
    plain_losses(doll, STEPS, sgd)
    loaded = mk.load(runs / kind)
    assert list(loaded.state_dict()) == list(doll.state_dict())
    for name, tensor in doll.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    x, _ = examples()
    torch.testing.assert_close(mk.load(runs / kind, size=8)(x), mk.slice(loaded, 8)(x))


def test_a_sharded_run_resumes_in_one_process(runs: Path) -> None:
    """save_run gathers, so that one process can go on where two left off."""
    everything = AllSizes(small_doll(1), loss_of())
    optimizer = sgd(everything.parameters())
    parts = {"model": everything, "optimizer": optimizer}
    assert resume_run(runs / "run", parts) == {"step": 1}
    reference = small_doll()
    plain_losses(reference, 1, sgd)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(everything.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the processes filled."""
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(worker, (str(folder), port), nprocs=WORLD)
    return folder


def test_where_the_first_process_cannot_save_none_waits(tmp_path: Path) -> None:
    """The first one raises its own error, the others say whose it was."""
    (tmp_path / "taken").write_text("a file")
    multiprocessing.spawn(failing, (str(tmp_path),), nprocs=WORLD)
    found = [(tmp_path / str(rank)).read_text() for rank in range(WORLD)]
    assert "FolderError" in found[0] and "is a file" in found[0]
    assert "ResumeError" in found[1] and "the first process failed" in found[1]


def failing(rank: int, folder: str) -> None:
    """Saves where a file stands."""
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        save_run(Path(folder) / "taken", {"generator": torch.Generator()})
    except mk.MatryoshkafyError as error:
        Path(folder, str(rank)).write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def worker(rank: int, folder: str, port: int) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    dist.init_process_group("gloo")
    path = Path(folder)
    losses = {
        "ddp": with_ddp(path),
        "accelerate": with_accelerate(),
        "fsdp": with_fsdp(path),
        "fsdp resumed": with_resumed_fsdp(path),
    }
    distilled(path)
    (path / f"{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def distilled(folder: Path) -> None:
    """Distillation under accelerate and under FSDP2."""
    from accelerate import Accelerator

    mesh = init_device_mesh("cpu", (WORLD,))
    ways = {
        "accelerate": Accelerator(cpu=True).prepare,
        "fsdp": lambda model: fully_shard(model, mesh=mesh),
    }
    for name, way in ways.items():
        doll = small_doll()
        distil(doll, *lesson(), RECIPE, prepare=way, folder=folder / f"run {name}")
        state = full_state(doll)
        if dist.get_rank() == 0:
            torch.save(state, folder / f"distilled {name}.pt")
        corrected(way).save(folder / f"own {name} {dist.get_rank()}.safetensors")


def corrected(way: Callable[[torch.nn.Module], torch.nn.Module] | None = None) -> Corrections:
    """What the sizes have of their own after a distillation."""
    doll = small_doll(nesting="sliced")
    report = distil(doll, *lesson(), RECIPE, prepare=way, corrections=Corrections.start(doll, 2))
    assert report.corrections is not None
    return report.corrections


def lesson() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the teacher said, and the rows."""
    x, _ = examples()
    with torch.no_grad():
        return small_doll(7)(x), list(x)


RECIPE = Recipe(3, 8, 1e-2, clip=1e9, terms=(Term("mse"),), sizes="all", save=2)


@pytest.mark.parametrize("way", ["accelerate", "fsdp"])
def test_a_distillation_takes_the_steps_of_one_process(runs: Path, way: str) -> None:
    doll = small_doll()
    distil(doll, *lesson(), RECIPE)
    found = torch.load(runs / f"distilled {way}.pt")
    for name, tensor in doll.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    resumed = small_doll()
    distil(resumed, *lesson(), RECIPE, folder=runs / f"run {way}")
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["accelerate", "fsdp"])
def test_corrections_are_those_of_one_process(runs: Path, way: str) -> None:
    expected = corrected()
    for rank in range(WORLD):
        found = Corrections.load(runs / f"own {way} {rank}.safetensors")
        for size in expected.sizes:
            for name, own in expected.at(size).items():
                for mine, theirs in zip(own, found.at(size)[name], strict=True):
                    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def with_ddp(folder: Path) -> list[float]:
    """DistributedDataParallel around the one module."""
    doll = small_doll()
    model = DistributedDataParallel(AllSizes(doll, loss_of()))
    losses = steps(model, sgd(model.parameters()))
    if dist.get_rank() == 0:
        mk.save(doll, folder / "ddp")
    return losses


def with_accelerate() -> list[float]:
    """What accelerate makes of it."""
    from accelerate import Accelerator

    everything = AllSizes(small_doll(), loss_of())
    model, optimizer = Accelerator(cpu=True).prepare(everything, sgd(everything.parameters()))
    assert isinstance(model, DistributedDataParallel)
    return steps(model, optimizer)


def with_fsdp(folder: Path) -> list[float]:
    """fully_shard; the checkpoint is saved from a doll that is whole."""
    model, optimizer = sharded(0)
    assert model.get_parameter("up.weight").to_local().shape[0] == 16
    losses = steps(model, optimizer)
    state = full_state(model)
    if dist.get_rank() == 0:
        doll = small_doll(seed=3)
        doll.load_state_dict(state)
        mk.save(doll, folder / "fsdp")
    return losses


def with_resumed_fsdp(folder: Path) -> list[float]:
    """The first step, save, another model, resume, the other steps."""
    model, optimizer = sharded(0)
    losses = steps(model, optimizer, slice(0, 1))
    save_run(folder / "run", {"model": model, "optimizer": optimizer}, {"step": 1})
    model, optimizer = sharded(1)
    assert resume_run(folder / "run", {"model": model, "optimizer": optimizer}) == {"step": 1}
    return losses + steps(model, optimizer, slice(1, STEPS))


def sharded(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model under FSDP2 and its optimizer."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = fully_shard(AllSizes(small_doll(seed), loss_of()), mesh=mesh)
    return model, sgd(model.parameters())


def steps(model: Any, optimizer: Any, which: slice = slice(0, STEPS)) -> list[float]:
    """This process' losses on its half of each batch."""
    (x, y), losses = examples(), []
    for rows in list(consecutive())[which]:
        mine = torch.arange(rows.start, rows.stop).chunk(WORLD)[dist.get_rank()]
        optimizer.zero_grad()
        loss = model(x[mine], labels=y[mine]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
