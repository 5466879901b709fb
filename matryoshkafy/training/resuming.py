"""save_run() and resume_run(): a training run as a folder that replaces its predecessor whole.

    run.json               every part's state without its tensors, and the position
    tensors.safetensors    the tensors of all parts

Nothing is pickled: what is neither a tensor nor of `KINDS` is refused, by its place. The random
states of Python, numpy and torch are one more part.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import Writer, digest_file, recover_folder, write_folder
from matryoshkafy.files.held import check_digests
from matryoshkafy.files.json_text import is_object, parse_json, shown
from matryoshkafy.files.tensors import TensorFile, entry_of, write_tensors
from matryoshkafy.training.sharding import placed_like, whole

RUN, TENSORS, FORMAT = "run.json", "tensors.safetensors", 1
PLAIN = (type(None), bool, int, str)
RANDOM = "random state"
State = dict[str, Any]  # a state_dict: what is in it is the part's own
Tensors = dict[str, Tensor]
Reader = Callable[[Any, TensorFile | None], object]


class ResumeError(MatryoshkafyError):
    """A part of a run that cannot be saved, or a saved run that does not fit."""


def save_run(
    folder: str | os.PathLike[str], parts: Mapping[str, object], position: object = None
) -> Path:
    """Save the parts of a run, the random states and the position in the data; return the path.

    A killed save leaves the run that was there. With several processes call it on each: the first
    one writes, its random states count, and what FSDP2 has sharded is gathered; where the first
    one fails, all of them do.

    Args:
        folder: where the run is kept.
        parts: by name, what has a state_dict (model, optimizer, scheduler, scaler, stateful
            loader), or a torch.Generator.
        position: what the next step needs to know, e.g. {"epoch": 2, "batch": 17}.

    Raises:
        ResumeError: names what cannot be represented.
        FolderError: where the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    states = {name: _state_of(part) for name, part in parts.items()} | {RANDOM: random_state()}
    tree = {name: state_to_json(state, name, tensors) for name, state in states.items()}
    content = {"format": FORMAT, "parts": tree, "position": state_to_json(position, "position", {})}
    failure = None
    if is_first():
        try:
            write_folder(folder, writers(content, tensors), force=True)
        except Exception as error:  # noqa: BLE001  whatever it is, the others wait to hear of it
            failure = error
    if any_failed(failure is not None):
        raise failure or ResumeError(
            f"the run was not saved in {folder}: the first process failed. See its error."
        )
    return Path(os.path.realpath(folder))


def any_failed(failed: bool) -> bool:
    """Tell whether this or another process failed; all processes wait for each other here."""
    if not dist.is_initialized():
        return failed
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told = torch.tensor(int(failed), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


def writers(content: Mapping[str, object], tensors: dict[str, Tensor]) -> dict[str, Writer]:
    """How each file is written."""

    def described(path: Path) -> None:
        digests = {TENSORS: digest_file(path.parent / TENSORS)}
        path.write_text(json.dumps({**content, "digests": digests}, allow_nan=False))

    def stored(path: Path) -> None:
        write_tensors(path, [entry_of(name, tensor) for name, tensor in tensors.items()])

    return {TENSORS: stored, RUN: described}


def resume_run(folder: str | os.PathLike[str], parts: Mapping[str, object]) -> Any:
    """Load a saved run into its parts and the random states; return the position, None without one.

    Args:
        folder: what `save_run` wrote. One that does not exist is the start of a new run: nothing is
            changed and None returned.
        parts: the same names as were saved, and what is to be loaded.

    Raises:
        ResumeError: parts other than the saved ones.
        FolderError: damage; so does JsonError.
    """
    target = recover_folder(folder)
    if not target.exists():
        return None
    content = _content(target)
    saved, names = set(content["parts"]) - {RANDOM}, set(parts)
    if saved != names:
        raise ResumeError(
            f"{folder} holds a run of {sorted(saved)}, but {sorted(names)} were given; give the "
            "parts that were saved"
        )
    with TensorFile(target / TENSORS) as file:
        states = {name: state_from_json(tree, file) for name, tree in content["parts"].items()}
    position = state_from_json(content["position"], None)
    for name, part in parts.items():
        _load(part, states[name])
    set_random_state(states[RANDOM])
    return position


def _content(target: Path) -> State:
    """The checked content of run.json."""
    path = target / RUN
    if not path.is_file():
        raise ResumeError(f"{target} is no saved run: it has no {RUN}; give a folder of save_run")
    content = parse_json(path.read_bytes(), str(path))
    if not is_object(content) or content.get("format") != FORMAT:
        raise ResumeError(f"{path} is not of format {FORMAT}: resume where it was saved")
    check_digests(target, content.get("digests"))
    return content


def batches(count: int, batch: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
    """Yield the indices of each batch of an epoch from batch `start` on.

    The order follows from seed and epoch alone, so that a resumed run sees what the uninterrupted
    one would have seen.

    Args:
        count: how many examples there are.
        batch: examples of a batch; the last may be smaller.
        seed: of the order.
        epoch: of the order, too.
        start: the first batch that is wanted.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    yield from torch.split(order, batch)[start:]


def is_first() -> bool:
    """Whether this process writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


# Parts.


def _state_of(part: Any) -> Any:
    """The state of a part."""
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    """Put a state back into a part; tensors become sharded where the part's are."""
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(sharded_optimizer(part, state))
    elif isinstance(part, torch.nn.Module):
        own: dict[str, Tensor] = part.state_dict()
        part.load_state_dict({k: placed_like(v, own.get(k)) for k, v in state.items()})
    else:
        part.load_state_dict(state)


def sharded_optimizer(optimizer: torch.optim.Optimizer, state: State) -> State:
    """The optimizer's state with tensors of a parameter's shape placed as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    known = dict(zip(numbers, parameters, strict=False))
    placed = {
        i: {name: placed_like(value, known[i]) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": placed}


# Random states.


def random_state() -> State:
    """The states of Python's, numpy's and torch's global generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(name), torch.as_tensor(np.array(keys, dtype=np.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: State) -> None:
    """Put back what `random_state` gave; the states of absent CUDA devices are left out."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)


# Trees of states as JSON and tensors.


def pairs(value: Mapping[object, object], place: str, tensors: Tensors) -> list[object]:
    """[[key, value], ...]: JSON's own objects have texts as keys only."""
    return [
        [state_to_json(k, f"{place}.{k}", tensors), state_to_json(v, f"{place}.{k}", tensors)]
        for k, v in value.items()
    ]


def items(value: Sequence[object], place: str, tensors: Tensors) -> list[object]:
    """[value, ...]."""
    return [state_to_json(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]


def as_dict(rows: list[Any], file: TensorFile | None) -> dict[object, object]:
    """What `pairs` was made of."""
    return {state_from_json(k, file): state_from_json(v, file) for k, v in rows}


def as_list(rows: list[Any], file: TensorFile | None) -> list[object]:
    """What `items` was made of."""
    return [state_from_json(row, file) for row in rows]


def as_float(text: str, file: TensorFile | None) -> float:
    """A float, bit for bit."""
    return float.fromhex(text)


def hexed(value: float, place: str, tensors: Tensors) -> str:
    """A float as a text that loses nothing."""
    return value.hex()


def _made(kind: Callable[[Any], object], read: Reader) -> Reader:
    """A reader whose result becomes another type."""

    def reader(rows: Any, file: TensorFile | None) -> object:
        return kind(read(rows, file))

    return reader


# type -> (its name in the file, to JSON, from JSON)
KINDS: Mapping[type, tuple[str, Callable[[Any, str, Tensors], object], Reader]] = {
    list: ("list", items, as_list),
    tuple: ("tuple", items, _made(tuple, as_list)),
    dict: ("dict", pairs, as_dict),
    OrderedDict: ("ordered", pairs, _made(OrderedDict, as_dict)),
    Counter: ("counter", pairs, _made(Counter, as_dict)),
    float: ("float", hexed, as_float),
}
READERS: Mapping[str, Reader] = {name: reader for name, _, reader in KINDS.values()}


def state_to_json(value: object, place: str, tensors: Tensors) -> object:
    """A state as JSON; its tensors go into `tensors` under their places. Raises ResumeError."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        tensors[place] = whole(value)
        return {"tensor": place}
    if type(value) not in KINDS:
        kinds = ", ".join(k.__name__ for k in (*PLAIN[1:], *KINDS))
        raise ResumeError(
            f"{place} is {shown(value)} of type {type(value).__name__}, which cannot be saved: "
            f"expected a tensor, None, or one of {kinds}. Convert it in the part's state_dict."
        )
    name, writer, _ = KINDS[type(value)]
    return {name: writer(value, place, tensors)}


def state_from_json(tree: object, file: TensorFile | None) -> Any:
    """What `state_to_json` was given. Raises ResumeError."""
    if type(tree) in PLAIN:
        return tree
    name, value = next(iter(tree.items())) if is_object(tree) and tree else ("", None)
    if name == "tensor" and file is not None and isinstance(value, str):
        return file.read(value)
    if name not in READERS:
        raise ResumeError(f"a saved run holds {shown(tree)}, of no known kind: it is damaged")
    return READERS[name](value, file)
