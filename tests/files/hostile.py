"""Makes hostile checkpoints and reads each in a process of its own: what does a reader do?

    python -m tests.files.hostile --count 500 --seed 0 --markdown docs/results/hostile.md

A case is a sound checkpoint and one attack on it, signed anew as an attacker can. The child may
use 1 GiB more than the parent has mapped, and 20 seconds of a processor; an audit hook reports
what it opens, starts or imports. Forking shares the imports, so that a case takes milliseconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files import tree_json
from matryoshkafy.files.json_text import signed
from tests.small_models import build

WEIGHTS, CONSTANTS = "model.safetensors", "constants.safetensors"
GRAPH, MANIFEST = "graph.json", "matryoshka.json"
MEMORY, SECONDS, PATIENCE = 2**30, 20, 120
# What a fresh process takes that has imported the library. A fork of a test's worker, which has
# imported far more, begins with more: that is not the file's doing.
LIBRARIES = 450 << 20
CANARY = "hostile_canary"
Attack = Callable[[Path, random.Random], None]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    """Register an attack under its name."""
    ATTACKS[function.__name__.strip("_")] = function
    return function


# What attackers write.

HUGE = (-1, 0, 1, 7, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), 10**18, 10**400)
TEXTS = (
    "", "x", "\x1b]0;owned\x07", "\u202eexe.txt", "../../etc/passwd", "/etc/passwd", "a\0b",
    "__class__", "__globals__.x", "x; import os", f"__import__('os').system('touch {CANARY}')",
    f"'); open('{CANARY}', 'w'); ('", "self", "torch", "None", "lambda", "é", "a" * 20_000,
    CANARY, f"{CANARY}.run", "os.system", "builtins.eval", "posix.system", "g0:999999999999",
    "aten.linear.default", "user_meta.weight", "meta", "training",
)  # fmt: skip


class Payload:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


def deep(depth: int) -> list[Any]:
    """A list in a list in a list ..."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def hostile_value(rng: random.Random) -> Any:
    """Something that does not belong where it will stand."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(HUGE),
        lambda: rng.choice(HUGE),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice((None, True, False, 0.5, -0.0, 1e308)),
        lambda: [],
        lambda: {},
        lambda: [rng.choice(HUGE)] * rng.choice((1, 2, 64, 1000)),
        lambda: {rng.choice(TEXTS): rng.choice(HUGE)},
        lambda: {"str": rng.choice(TEXTS)},
        lambda: {"device": rng.choice(("cuda:99", "meta", "mps", "xla", "x"))},
        lambda: {"dtype": rng.choice(("float99", "__class__", "complex32", "quint8", "bits8"))},
        lambda: deep(rng.choice((20, 40, 500))),
        lambda: {"float": rng.choice(("inf", "-inf", "nan", "x"))},
    )
    return rng.choice(kinds)()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from places(item)


# Reading, changing and signing.


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change the JSON of a file."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def sign(folder: Path) -> None:
    """Write the digests anew."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in manifest["digests"]:
            if (folder / name).is_file() and not (folder / name).is_symlink():
                data = (folder / name).read_bytes()
                manifest["digests"][name] = hashlib.sha256(data).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(signed(manifest)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def edit_header(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file."""
    data = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def weights_of(folder: Path) -> str:
    """The first tensor file: that of all weights, or of the lowest level."""
    return WEIGHTS if (folder / WEIGHTS).exists() else "level-0.safetensors"


def files(folder: Path) -> list[str]:
    """The names of the files."""
    return sorted(path.name for path in folder.iterdir())


def calls(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that call a function."""
    return [node for node in graph["nodes"] if node["op"] == "call_function"]


# The attacks.


@attack
def random_bytes(folder: Path, rng: random.Random) -> None:
    """Flips, cuts or adds bytes anywhere."""
    path = folder / rng.choice(files(folder))
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    at = rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.choice((1, 8, 4096)))
    else:
        data[:8] = struct.pack("<Q", rng.choice((0, 2**25, 2**63, len(data))))
    path.write_bytes(data)


@attack
def other_formats(folder: Path, rng: random.Random) -> None:
    """Puts a pickle, an archive or nonsense where a file should be."""
    pickled = pickle.dumps(Payload())
    data = rng.choice((pickled, b"PK\x03\x04" + pickled, b"", b"\0" * 64, b"GGUF" + b"\0" * 60))
    (folder / rng.choice(files(folder))).write_bytes(data)


@attack
def manifest_values(folder: Path, rng: random.Random) -> None:
    """Puts hostile values anywhere in the manifest."""

    def change(manifest: Any) -> None:
        for _ in range(rng.choice((1, 1, 3))):
            container, key = rng.choice(list(places(manifest)))
            container[key] = hostile_value(rng)

    edit(folder, MANIFEST, change)


@attack
def manifest_keys(folder: Path, rng: random.Random) -> None:
    """Renames or drops keys of the manifest."""

    def change(manifest: Any) -> None:
        container, key = rng.choice([p for p in places(manifest) if isinstance(p[0], dict)])
        value = container.pop(key)
        if rng.random() < 0.7:
            container[rng.choice(TEXTS)] = value

    edit(folder, MANIFEST, change)


@attack
def graph_values(folder: Path, rng: random.Random) -> None:
    """Puts hostile values anywhere in the graph."""

    def change(graph: Any) -> None:
        for _ in range(rng.choice((1, 1, 3))):
            container, key = rng.choice(list(places(graph["nodes"])))
            container[key] = hostile_value(rng)

    edit(folder, GRAPH, change)


@attack
def graph_integers(folder: Path, rng: random.Random) -> None:
    """Changes the integers among the arguments: sizes, dims, indices."""

    def change(graph: Any) -> None:
        found = [p for n in calls(graph) for p in places(n["args"]) if type(p[0][p[1]]) is int]
        for container, key in rng.sample(found, min(len(found), rng.choice((1, 2, 5)))):
            container[key] = rng.choice((*HUGE[:-1], 2, 3, -2, 1000, 10**6))

    edit(folder, GRAPH, change)


@attack
def operators(folder: Path, rng: random.Random) -> None:
    """Calls any operator that torch knows, with arguments of the right kinds."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if "::" in s.name]

    def change(graph: Any) -> None:
        node = rng.choice(calls(graph))
        schema = rng.choice(schemas)
        namespace, _, name = schema.name.partition("::")
        node["target"] = f"{namespace}.{name}.{schema.overload_name or 'default'}"
        before = graph["nodes"][: graph["nodes"].index(node)]
        names = [n["name"] for n in before] or [node["name"]]
        node["args"] = [argument(str(a.type), names, rng) for a in schema.arguments]
        node["kwargs"] = {}
        if rng.random() < 0.5:
            node.pop("shape", None)

    edit(folder, GRAPH, change)


def argument(kind: str, names: list[str], rng: random.Random) -> Any:
    """A value of a schema's type, out of bounds where it can be."""
    if "Optional" in kind and rng.random() < 0.5:
        return None
    one: Any = rng.choice((-1, 0, 1, 3, 1000, 2**31, 2**62, -(2**62)))
    if "Tensor" in kind:
        one = rng.choice(names)
    elif "str" in kind:
        one = {"str": rng.choice(("mean", "ij,jk->ik", CANARY))}
    elif "bool" in kind:
        one = rng.random() < 0.5
    elif "float" in kind:
        one = rng.choice((0.0, -1.0, 1e300))
    return [one] * rng.choice((1, 2, 4)) if "List" in kind else one


@attack
def trusted_indices(folder: Path, rng: random.Random) -> None:
    """Calls operators that do not check their indices."""
    targets = {
        "aten._embedding_bag.default": lambda x: [x, x, x],
        "aten._embedding_bag_dense_backward.default": lambda x: [x] * 6 + [10**6, False, 0, None],
        "aten.embedding_dense_backward.default": lambda x: [x, x, 2**40, -1, False],
        "aten.max_unpool2d.default": lambda x: [x, x, [2**20, 2**20]],
        "aten.max_pool2d_with_indices_backward.default": lambda x: [
            x,
            x,
            [2, 2],
            [2, 2],
            [0, 0],
            [1, 1],
            False,
            x,
        ],
        "aten._unsafe_masked_index.default": lambda x: [x, x, [x], 0],
        "aten.as_strided.default": lambda x: [x, [10**6], [10**6], 10**6],
        "aten._reshape_alias.default": lambda x: [x, [10**9], [1]],
        "aten._segment_reduce_backward.default": lambda x: [x, x, x, {"str": "sum"}],
        "aten._transform_bias_rescale_qkv.default": lambda x: [x, x, 3],
        "aten._pad_packed_sequence.default": lambda x: [x, x, True, 0, 10**9],
        "aten.set_.source_Tensor_storage_offset": lambda x: [x, x, 10**9, [10**6], [1]],
        "aten.resize_.default": lambda x: [x, [10**12]],
        "aten._resize_output_.default": lambda x: [x, [10**12], {"device": "cpu"}],
        "aten._nested_view_from_buffer.default": lambda x: [x, x, x, x],
        "aten._cslt_sparse_mm.default": lambda x: [x, x],
        "torchvision._roi_align_backward.default": lambda x: [x, x, 1.0, 2, 2, 9, 9, 9, 9, 2, True],
        "aten._thnn_fused_lstm_cell.default": lambda x: [x, x, x],
        "aten.native_batch_norm_backward.default": lambda x: [x] * 7 + [True, 1e-5, [True] * 3],
        "aten._histogramdd_from_bin_cts.default": lambda x: [x, [2**40]],
        "aten.empty_strided.default": lambda x: [[10**6], [10**6]],
        "aten.empty.memory_format": lambda x: [[2**40]],
        "aten._efficientzerotensor.default": lambda x: [[2**40]],
        "aten.fbgemm_linear_int8_weight.default": lambda x: [x] * 4 + [1, 1, x],
        "aten._mkldnn_reshape.default": lambda x: [x, [1]],
        "aten.quantize_per_tensor.default": lambda x: [x, 0.0, 0, {"dtype": "qint8"}],
    }

    def change(graph: Any) -> None:
        target = rng.choice(list(targets))
        node = rng.choice(calls(graph))
        source = rng.choice(graph["nodes"][: graph["nodes"].index(node)] or [node])["name"]
        node["target"], node["args"], node["kwargs"] = target, targets[target](source), {}

    edit(folder, GRAPH, change)


@attack
def memory_of_the_graph(folder: Path, rng: random.Random) -> None:
    """Lets the graph ask for memory that no file holds."""

    def change(graph: Any) -> None:
        node = rng.choice(calls(graph))
        count = rng.choice((2**31, 2**36, 2**40, 2**60))
        made = {
            "aten.zeros.default": [[count]],
            "aten.full.default": [[count], 1.0],
            "aten.arange.default": [count],
            "aten.rand.default": [[count]],
            "aten.eye.default": [2**25],
            "aten.tril_indices.default": [2**30, 2**30],
            "aten.linspace.default": [0.0, 1.0, count],
            "aten.randperm.default": [count],
        }
        node["target"] = rng.choice(list(made))
        node["args"], node["kwargs"] = made[node["target"]], {}
        if rng.random() < 0.5:
            node["shape"] = {"dtype": "float32", "shape": [count]}

    edit(folder, GRAPH, change)


@attack
def plan_of_pieces(folder: Path, rng: random.Random) -> None:
    """Lets the plan cut an axis into more pieces than memory holds."""
    many = rng.choice((2**20, 2**30, 2**45))

    def change(manifest: Any) -> None:
        plan = manifest["plan"]
        size = plan["groups"][0]["size"]
        axes = rng.choice(
            (
                [many, f"g0:{size}"],
                [[[many, f"g0:{size}"]] * 50],
                [f"g0:{size}"] * 40,
                [[[[[many, f"g0:{size}"]]]]],
            )
        )
        table = rng.choice(("nodes", "parameters"))
        plan[table][rng.choice((*plan[table], "new"))] = [axes]

    edit(folder, MANIFEST, change)


@attack
def plan_of_sizes(folder: Path, rng: random.Random) -> None:
    """Lets groups, ladder and sizes grow."""

    def change(manifest: Any) -> None:
        plan, huge = manifest["plan"], rng.choice((2**33, 10**12, 10**30))
        kind = rng.randrange(4)
        if kind == 0:
            plan["groups"][0]["size"] = huge
            plan["ladder"] = [[huge, *widths[1:]] for widths in plan["ladder"]]
        elif kind == 1:
            plan["sizes"] = list(range(1, 100_000))
            plan["ladder"] = [plan["ladder"][0]] * (len(plan["sizes"]) - 1) + [plan["ladder"][-1]]
        elif kind == 2:
            plan["unit"] = huge
        else:
            plan["groups"] *= 20_000
            plan["ladder"] = [widths * 20_000 for widths in plan["ladder"]]

    edit(folder, MANIFEST, change)


@attack
def statistics_of_choice(folder: Path, rng: random.Random) -> None:
    """Lets slicing compute what the file names a statistic of the weights."""

    def change(manifest: Any) -> None:
        names = [n["name"] for n in json.loads((folder / GRAPH).read_text())["nodes"]]
        manifest["plan"]["full"] = rng.sample(names, rng.choice((1, 2, len(names))))

    edit(folder, MANIFEST, change)
    if rng.random() < 0.5:
        memory_of_the_graph(folder, rng)


@attack
def tensor_headers(folder: Path, rng: random.Random) -> None:
    """Puts hostile values into the header of a tensor file."""

    def change(header: dict[str, Any]) -> None:
        container, key = rng.choice(list(places(header)))
        container[key] = hostile_value(rng)

    edit_header(folder, weights_of(folder), change)


@attack
def empty_tensors(folder: Path, rng: random.Random) -> None:
    """Replaces a tensor by one without bytes and with a huge dim."""
    name = "hollow"

    def change(header: dict[str, Any]) -> None:
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        shape = rng.choice(([0, 2**50], [2**39, 0], [0] * 60, [0, 2**31, 2**20]))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}

    edit_header(folder, weights_of(folder), change)

    def listed(manifest: Any) -> None:
        manifest["tensors"].append({"name": name, "kind": rng.choice(("parameter", "buffer"))})
        manifest["plan"]["parameters"][name] = [[0], [2**50]]

    edit(folder, MANIFEST, listed)


@attack
def special_files(folder: Path, rng: random.Random) -> None:
    """Puts links, pipes, devices and folders behind the names that are read."""
    name = rng.choice(files(folder))
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    outside = folder.parent / "outside"
    outside.write_bytes(data)
    make: tuple[Callable[[], Any], ...] = (
        lambda: os.symlink(outside, path),
        lambda: os.symlink("/etc/passwd", path),
        lambda: os.symlink("/dev/zero", path),
        lambda: os.symlink(path, path),
        lambda: os.mkfifo(path),
        lambda: os.mkdir(path),
        lambda: os.symlink(os.path.relpath(outside, folder), path),
    )
    rng.choice(make)()


@attack
def listed_files(folder: Path, rng: random.Random) -> None:
    """Lists files that are elsewhere, devices, or very many."""

    def change(manifest: Any) -> None:
        names = rng.choice(
            (
                ["../outside"],
                ["/etc/passwd"],
                ["..", "."],
                ["x\0y"],
                [f"file{i}" for i in range(50_000)],
                [".hidden"],
                ["\x1b[2J"],
            )
        )
        manifest["digests"] |= dict.fromkeys(names, "0" * 64)

    edit(folder, MANIFEST, change)


@attack
def json_bombs(folder: Path, rng: random.Random) -> None:
    """Writes JSON that is large, deep or dear in memory."""
    size = rng.choice((2**20, 2**24, 2**25 - 64))
    bomb = rng.choice((
        b"[" * size, b"[" + b"{}," * (size // 3) + b"0]", b'{"a":' * (size // 5),
        b"[" + b"[]," * (size // 3) + b"0]", b"[" + b"1," * (size // 2) + b"0]",
        b'"' + b"a" * size + b'"', b"9" * size, b" " * size + b"{}",
    ))  # fmt: skip
    (folder / rng.choice((GRAPH, MANIFEST))).write_bytes(bomb)


@attack
def many_nodes(folder: Path, rng: random.Random) -> None:
    """Repeats a node, or a tensor of the manifest, very often."""
    count = rng.choice((5_000, 59_000, 61_000, 200_000))

    def nodes(graph: Any) -> None:
        at = len(graph["nodes"]) - 1
        node = rng.choice(calls(graph))
        graph["nodes"][at:at] = [{**node, "name": f"copy_{i}"} for i in range(count)]

    def tensors(manifest: Any) -> None:
        first = manifest["tensors"][0]
        manifest["tensors"] += [{**first, "name": f"t{i}"} for i in range(count)]

    if rng.random() < 0.6:
        edit(folder, GRAPH, nodes)
    else:
        edit(folder, MANIFEST, tensors)


@attack
def names(folder: Path, rng: random.Random) -> None:
    """Writes hostile names of nodes, arguments, targets and sources, everywhere alike."""
    text = rng.choice(TEXTS)

    def change(graph: Any) -> None:
        node = rng.choice(graph["nodes"])
        key = rng.choice(("name", "target", "source", "op", "kwargs"))
        node[key] = {text: 1} if key == "kwargs" else text

    edit(folder, GRAPH, change)


@attack
def tensor_names(folder: Path, rng: random.Random) -> None:
    """Renames a tensor in every file."""
    text = rng.choice(TEXTS)
    old = rng.choice(json.loads((folder / MANIFEST).read_text())["tensors"])["name"]
    for name in (GRAPH, MANIFEST):
        words = (folder / name).read_text().replace(json.dumps(old), json.dumps(text))
        (folder / name).write_text(words)

    def change(header: dict[str, Any]) -> None:
        if old in header:
            header[text] = header.pop(old)

    edit_header(folder, weights_of(folder), change)


@attack
def call_structures(folder: Path, rng: random.Random) -> None:
    """Chooses the classes, keys and ranges of the call."""
    structures = (
        {"type": "model_output", "context": {"module": "os", "name": "system", "keys": []},
         "children": []},
        {"type": "model_output", "context": {"module": f"transformers.models.{CANARY}.modeling_x",
                                             "name": "X", "keys": []}, "children": []},
        {"type": "namedtuple", "context": {"name": f"X(); {CANARY}", "fields": ["a"]},
         "children": [None]},
        {"type": "namedtuple", "context": {"name": "X", "fields": ["__class__"]},
         "children": [None]},
        {"type": "return_type", "context": "__doc__", "children": []},
        {"type": "deque", "context": 2**62, "children": [None]},
        {"type": "defaultdict", "context": {"factory": "exec", "keys": []}, "children": []},
        {"type": "dict", "context": [{"tuple": [1]}] * 2, "children": [None, None]},
    )  # fmt: skip

    def change(manifest: Any) -> None:
        call, kind = manifest["signature"], rng.randrange(4)
        if kind == 0:
            call["output"] = rng.choice(structures)
        elif kind == 1:
            call["inputs"][0]["spec"] = rng.choice(structures)
        elif kind == 2:
            call["inputs"][0]["bounds"] = [[rng.choice(HUGE), rng.choice(HUGE)]]
        else:
            expression: Any = {"leaf": 0, "dim": 0}
            for _ in range(rng.choice((3, 100, 400))):
                expression = [rng.choice(("mul", "add", "mod")), expression, rng.choice(HUGE[:8])]
            call["guards"]["conditions"] = [[["ge", expression, 0], "x"]] * rng.choice((1, 5000))

    edit(folder, MANIFEST, change)


@attack
def namespaces(folder: Path, rng: random.Random) -> None:
    """Names libraries whose operators the graph would like to call."""
    name = rng.choice((CANARY, "antigravity", "inductor", "_test", "os", "prims", "c10d", "x.y"))

    def change(graph: Any) -> None:
        rng.choice(calls(graph))["target"] = f"{name}.run.default"

    edit(folder, GRAPH, change)
    edit(folder, MANIFEST, lambda manifest: manifest["namespaces"].append(name))


# One case.


@dataclass
class Result:
    """What became of a case: the outcome of each step, and what it cost."""

    number: int
    attack: str
    steps: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    fault: str = ""
    seconds: float = 0.0
    memory: int = 0


def outcome_of(step: Callable[[], Any]) -> str:
    """Run a step: "done", "refused" with a message of ours, or the name of another error."""
    try:
        step()
    except MatryoshkafyError as error:
        assert str(error), "an error without a word"
        return "refused"
    except Exception as error:  # noqa: BLE001  what is not ours is a finding
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "done"


def read_all(folder: Path, report: Callable[[str, str], None]) -> None:
    """Do with a checkpoint what users do; stop at the first step that is refused."""
    from matryoshkafy.dolls.example_inputs import example_inputs
    from matryoshkafy.files.checkpoint import open_checkpoint

    made: dict[str, Any] = {}

    def opened() -> None:
        made["found"] = open_checkpoint(folder)

    def whole() -> None:
        made["whole"] = made["found"].whole()

    def small() -> None:
        made["small"] = made["found"].sub_model(made["found"].sizes[0])

    def sliced() -> None:
        mk.slice(made["whole"], made["found"].sizes[0])

    def run() -> None:
        args, kwargs = example_inputs(made["small"])
        with torch.no_grad():
            made["small"](*args, **kwargs)

    for name, step in (("open", opened), ("whole", whole), ("size", small), ("slice", sliced),
                       ("run", run)):  # fmt: skip
        outcome = outcome_of(step)
        report(name, outcome)
        if outcome != "done":
            return


STARTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess", "socket."),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "shutil.", "pickle."),
)


def watch(folder: Path, report: Callable[[str], None]) -> None:
    """Report what the process starts, writes, or reads outside of the folder and its libraries."""
    libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), mk.__path__[0]}
    places = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/", "/etc/ld.so",
              *map(os.path.realpath, (folder, *libraries)))  # fmt: skip

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(STARTS):
            report(f"{event} {args!r:.80}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.join(folder, os.fsdecode(args[0]))
            if not os.path.realpath(path).startswith(places):
                report(f"open {path!r:.120}")
        elif event == "import" and CANARY in str(args[0]):
            report(f"import {args[0]}")

    sys.addaudithook(hook)


def child(folder: Path, pipe: int) -> None:
    """Read a checkpoint under limits; every finding is a line of JSON into the pipe."""

    def report(*finding: str) -> None:
        os.write(pipe, (json.dumps(finding) + "\n").encode())

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    os.chdir(folder.parent)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    watch(folder, lambda text: report("event", text))
    read_all(folder, lambda name, outcome: report(name, outcome))


def make_case(number: int, seed: int, sources: list[Path], place: Path) -> tuple[Path, str]:
    """Write the checkpoint of a number; the attacks take turns."""
    rng = random.Random(f"{seed}-{number}")
    name = list(ATTACKS)[number % len(ATTACKS)]
    folder = place / "c"
    shutil.copytree(rng.choice(sources), folder)
    ATTACKS[name](folder, rng)
    if name != "special_files" and rng.random() < 0.95:
        sign(folder)
    return folder, name


def run_case(number: int, seed: int, sources: list[Path]) -> Result:
    """Make a case, read it in a child, and judge."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        folder, name = make_case(number, seed, sources, Path(temporary))
        result = Result(number, name)
        surplus = max(0, resident() - LIBRARIES)
        lines, status, used = forked(folder)
        result.seconds = used.ru_utime + used.ru_stime
        result.memory = used.ru_maxrss * 1024 - surplus
        for line in lines:
            kind, text = json.loads(line)
            if kind == "event":
                result.events.append(text)
            else:
                result.steps[kind] = text
        result.fault = fault_of(result, status, used, Path(temporary))
        return result


def resident() -> int:
    """Return the bytes of this process in memory, which a fork of it begins with."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forked(folder: Path) -> tuple[list[str], int, resource.struct_rusage]:
    """Run `child` in a fork; return its lines, its wait status and what it used."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        code = 1
        try:
            child(folder, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(process, signal.SIGKILL))
        signal.alarm(PATIENCE)
        lines = file.read().splitlines()
        _, status, used = os.wait4(process, 0)
        signal.alarm(0)
    return lines, status, used


def fault_of(result: Result, status: int, used: Any, place: Path) -> str:
    """Return what broke the promise, "" where nothing did."""
    code = os.waitstatus_to_exitcode(status)
    if any(path.name == CANARY for path in place.rglob("*")):
        return "code was executed"
    if result.events:
        return result.events[0]
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    if code:
        return "the reader failed"
    if used.ru_utime + used.ru_stime > SECONDS or result.memory > MEMORY:
        return f"took {used.ru_utime:.1f} s and {result.memory >> 20} MiB"
    wrong = {k: v for k, v in result.steps.items() if k != "run" and v not in ("done", "refused")}
    wrong |= {k: v for k, v in result.steps.items() if "memory" in v.lower()}
    return f"untyped error: {wrong}" if wrong else ""


def sound_checkpoints(place: Path) -> list[Path]:
    """Three dolls and a sub-model, saved, and one of the dolls packed by level."""
    torch.set_num_threads(1)
    # What a library runs while it is imported (ldconfig) is not the file's doing.
    tree_json._model_output_base()
    made = []
    for name, nesting in (("tied", "masked"), ("images", "sliced"), ("normed", "masked")):
        model, inputs = build(name)
        doll = mk.convert(model, inputs, sizes=[4, 8, 16], nesting=nesting)
        made.append(mk.save(doll, place / name))
    made.append(mk.save(mk.load(made[0], size=8), place / "small"))
    made.append(mk.pack(made[1], place / "packed"))
    mk.slice(mk.load(made[0]), 4)(*build("tied")[1])
    return made


def run_cases(count: int, seed: int) -> Iterator[Result]:
    """Yield the result of each case."""
    with tempfile.TemporaryDirectory(prefix="hostile-sound-") as temporary:
        sources = sound_checkpoints(Path(temporary))
        for number in range(count):
            yield run_case(number, seed, sources)


def table(results: list[Result]) -> str:
    """Return a markdown table: per attack, how many were refused where, and the dearest."""
    lines = ["| attack | what it does | cases | refused | read | faults | seconds | MiB |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, function in ATTACKS.items():
        found = [r for r in results if r.attack == name]
        if not found:
            continue
        refused = sum("refused" in r.steps.values() for r in found)
        done = sum(r.steps.get("slice") == "done" for r in found)
        faults = sum(bool(r.fault) for r in found)
        slowest = max(r.seconds for r in found)
        largest = max(r.memory for r in found) >> 20
        what = (function.__doc__ or "").strip().rstrip(".")
        label = name.replace("_", " ")
        lines.append(
            f"| {label} | {what} | {len(found)} | {refused} | {done} | {faults} | {slowest:.1f} | "
            f"{largest} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one number and print all of it")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if given.only is not None:
        with tempfile.TemporaryDirectory() as temporary:
            print(run_case(given.only, given.seed, sound_checkpoints(Path(temporary))))
        return
    results = []
    for result in run_cases(given.count, given.seed):
        results.append(result)
        if result.fault:
            print(f"{result.number} {result.attack}: {result.fault} {result.steps}", flush=True)
    print(table(results))
    print(Counter(bool(r.fault) for r in results))
    if given.markdown:
        given.markdown.write_text(page(results, given.count, given.seed))
    sys.exit(any(r.fault for r in results))


def page(results: list[Result], count: int, seed: int) -> str:
    """Return the page of results."""
    faults = sum(bool(r.fault) for r in results)
    baseline = min(r.memory for r in results) >> 20
    command = f"python -m tests.files.hostile --count {count} --seed {seed}"
    return f"""# Hostile checkpoints

Made by `{command} --markdown docs/results/hostile.md` on a 2-core CPU machine, torch
{torch.__version__.partition("+")[0]}, Python {sys.version.split()[0]}.

Each case is a sound checkpoint with one attack on it, its digests written anew. A process of its
own opens it, loads the doll and its smallest size, slices it, and runs the small model; it may use
1 GiB and {SECONDS} seconds of a processor. An audit hook reports what it starts, writes, or reads
elsewhere.

**{len(results)} cases, {faults} faults.** A fault is: something executed, written, or read outside
of the folder; a process that died; more than 1 GiB or {SECONDS} s; an error before the graph is run
that is not the library's own, with its message.

`refused`: an error says what is wrong. `read`: what the attack changed does no harm (the value of a
weight, a remark), and the checkpoint loads. `seconds` (of a processor) and `MiB` are those of the
dearest case; the libraries alone take {baseline} MiB.

{table(results)}
"""


if __name__ == "__main__":
    main()
