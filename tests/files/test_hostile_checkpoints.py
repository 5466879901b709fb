"""Checkpoints that nobody vouches for: each is refused with a clear message, and runs no code."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.json_text import signed
from tests.small_models import build

WEIGHTS, GRAPH, MANIFEST = "model.safetensors", "graph.json", "matryoshka.json"


class Payload:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return print, ("a pickle was executed",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "c"
    model, inputs = build("tied")
    mk.save(mk.convert(model, inputs, sizes=[4, 8, 16]), folder)
    return folder


def sign(folder: Path) -> None:
    """Write the digests anew, as an attacker can."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["digests"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            manifest["digests"][name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(signed(manifest)))


def edits(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return what changes the JSON of a file and signs it again."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))
        sign(folder)

    return damage


def replaces(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes the bytes of a file and signs it again."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        if file != MANIFEST:
            sign(folder)

    return damage


def header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Return what changes the header of a safetensors file."""

    def damaged(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        values = json.loads(data[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return damaged


def first_of(values: dict) -> dict:
    """The record of the first tensor of a header."""
    return next(v for k, v in values.items() if k != "__metadata__")


def node_of(graph: dict, op: str) -> dict:
    """The first node of a kind."""
    return next(n for n in graph["nodes"] if n["op"] == op)


def widen_first_parameter(manifest: dict) -> None:
    shape = manifest["plan"]["parameters"]["up.weight"]
    shape[0] = [64]


def inflate_group(manifest: dict) -> None:
    manifest["plan"]["groups"][0]["size"] = 10**12
    manifest["plan"]["ladder"] = [[10**12, *widths[1:]] for widths in manifest["plan"]["ladder"]]


def deep(text: str) -> bytes:
    return (text * 100_000).encode()


def read_instead(name: str, other: str) -> Callable[[dict], object]:
    """Return what lets the node that reads a tensor read another one."""

    def change(graph: dict) -> None:
        node = next(n for n in graph["nodes"] if n["op"] == "get_attr" and n["target"] == name)
        node["target"] = other

    return change


def strange_scalar(manifest: dict) -> None:
    scalar = {"node": "nowhere", "argument": "1", "value": 4.0, "group": 0, "units": 16}
    manifest["plan"]["scalars"].append({**scalar, "power": 0.5})


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no checkpoint: there is no such folder"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "it has no matryoshka.json"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "no checkpoint: it is a file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "lacks its file model.safetensors"),
    "no graph": (lambda f: (f / GRAPH).unlink(), "lacks its file graph.json"),
    "no constants": (lambda f: (f / "constants.safetensors").unlink(), "lacks its file constants"),
    "changed weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1] + b"\x01"),
        "was changed or damaged",
    ),
    "changed graph": (lambda f: (f / GRAPH).write_text("{}"), "was changed or damaged"),
    "truncated weights": (replaces(WEIGHTS, lambda d: d[:-8]), "no sound safetensors file"),
    "truncated header": (replaces(WEIGHTS, lambda d: d[:40]), "no sound safetensors file"),
    "empty weights": (replaces(WEIGHTS, lambda d: b""), "too few for a header"),
    "wrong magic": (replaces(WEIGHTS, lambda d: b"\x89HDF" + d[4:]), "an HDF5 file"),
    "header of 2**63": (
        replaces(WEIGHTS, lambda d: struct.pack("<Q", 2**63) + d[8:]),
        "a header of 9223372036854775808 bytes",
    ),
    "pickled weights": (
        replaces(WEIGHTS, lambda d: pickle.dumps(Payload())),
        "a pickle",
    ),
    "zip of pickles": (replaces(WEIGHTS, lambda d: b"PK\x03\x04" + d), "archive of torch.save"),
    "pickled graph": (replaces(GRAPH, lambda d: pickle.dumps(Payload())), "graph.json is no sound"),
    "pickled manifest": (replaces(MANIFEST, lambda d: pickle.dumps(Payload())), "no sound JSON"),
    "overlapping offsets": (
        replaces(WEIGHTS, header(lambda h: first_of(h).update(data_offsets=[4, 68]))),
        "no sound safetensors file",
    ),
    "negative offsets": (
        replaces(WEIGHTS, header(lambda h: first_of(h).update(data_offsets=[-4, 60]))),
        "no sound safetensors file",
    ),
    "unknown dtype": (
        replaces(WEIGHTS, header(lambda h: first_of(h).update(dtype="OBJECT"))),
        "no sound safetensors file",
    ),
    "huge shape": (
        replaces(WEIGHTS, header(lambda h: first_of(h).update(shape=[2**40, 2**40]))),
        "no sound safetensors file",
    ),
    "no JSON": (replaces(MANIFEST, lambda d: b"format: 1"), "no sound JSON"),
    "no object": (replaces(MANIFEST, lambda d: b"[]"), "is no checkpoint"),
    "NaN in JSON": (replaces(MANIFEST, lambda d: b'{"format": NaN}'), "no sound JSON"),
    "key twice": (replaces(MANIFEST, lambda d: b'{"format": 1, "format": 1}'), "repeats a key"),
    "bomb of lists": (replaces(MANIFEST, lambda d: deep("[")), "no sound JSON|nested too deeply"),
    "bomb of objects": (replaces(GRAPH, lambda d: deep('{"a":')), "nested too deeply|no sound"),
    "newer format": (
        edits(MANIFEST, lambda m: m.update(format=99)),
        "has checkpoint format 99, .* reads up to 2.*Upgrade matryoshkafy",
    ),
    "no format": (edits(MANIFEST, lambda m: m.pop("format")), "is no checkpoint"),
    "format of text": (edits(MANIFEST, lambda m: m.update(format="1")), "is no checkpoint"),
    "another kind": (edits(MANIFEST, lambda m: m.update(kind="virus")), "no doll, no submodel"),
    "no plan": (edits(MANIFEST, lambda m: m.pop("plan")), "for 'plan', expected a dict"),
    "plan of another format": (
        edits(MANIFEST, lambda m: m["plan"].update(format=9)),
        "the plan has format 9",
    ),
    "no digests": (edits(MANIFEST, lambda m: m.update(digests={})), "has no digest of"),
    "path as a file": (
        edits(MANIFEST, lambda m: m["digests"].update({"../../etc/passwd": "0"})),
        "expected a plain name",
    ),
    "path as a tensor": (
        edits(MANIFEST, lambda m: m["tensors"][0].update(name="../../x")),
        "lists the tensor .*, which is none",
    ),
    "dunder as a tensor": (
        edits(MANIFEST, lambda m: m["tensors"][0].update(name="__class__.x")),
        "lists the tensor .*, which is none",
    ),
    "tensor that is not there": (
        edits(MANIFEST, lambda m: m["tensors"][0].update(name="nowhere")),
        "not saved|holds no tensor",
    ),
    "tensor of no kind": (
        edits(MANIFEST, lambda m: m["tensors"][0].update(kind="code")),
        "lists the tensor .*, which is none",
    ),
    "plan of other shapes": (
        edits(MANIFEST, widen_first_parameter),
        r"plan expects up\.weight of shape \(64, 16\), the file holds \(32, 16\)",
    ),
    "plan of a huge group": (edits(MANIFEST, inflate_group), "plan"),
    "plan of no group": (
        edits(MANIFEST, lambda m: m["plan"]["parameters"].update({"up.weight": [["g9:16"], [16]]})),
        "names a group that is missing",
    ),
    "plan of a lying axis": (
        edits(
            MANIFEST,
            lambda m: m["plan"]["nodes"].update({next(iter(m["plan"]["nodes"])): [[["g0:999"]]]}),
        ),
        "has an axis of 999 units",
    ),
    "plan without main": (
        edits(MANIFEST, lambda m: m["plan"].update(main=77)),
        "main group is missing",
    ),
    "sizes that descend": (
        edits(MANIFEST, lambda m: m["plan"].update(sizes=[16, 8, 4])),
        "sizes do not ascend",
    ),
    "widths out of bounds": (
        edits(MANIFEST, lambda m: m["plan"]["ladder"][0].__setitem__(0, 999)),
        "out of bounds",
    ),
    "axis of no kind": (
        edits(MANIFEST, lambda m: m["plan"]["parameters"].update({"up.weight": "abc"})),
        "damaged",
    ),
    "signature of too many": (
        edits(MANIFEST, lambda m: m["signature"]["inputs"].append(m["signature"]["inputs"][0])),
        "inputs",
    ),
    "signature of a class": (
        edits(MANIFEST, lambda m: m["signature"].update(output={"type": "os", "children": []})),
        "has the type 'os'",
    ),
    "operator of the system": (
        edits(GRAPH, lambda g: node_of(g, "call_function").update(target="posix.system")),
        "may not call",
    ),
    "operator that writes": (
        edits(GRAPH, lambda g: node_of(g, "call_function").update(target="aten.save.default")),
        "graph",
    ),
    "builtin eval": (
        edits(GRAPH, lambda g: node_of(g, "call_function").update(target="builtins.eval")),
        "may not call",
    ),
    "namespace of torch's own": (
        edits(MANIFEST, lambda m: m.update(namespaces=["inductor"])),
        "'inductor', which a saved graph may not call",
    ),
    "namespace to import": (
        edits(MANIFEST, lambda m: m.update(namespaces=["antigravity"])),
        "not registered in this process",
    ),
    "code as a name": (
        edits(GRAPH, lambda g: g["nodes"][0].update(name="x; import os")),
        "no identifier",
    ),
    "method as a tensor": (
        edits(GRAPH, lambda g: node_of(g, "get_attr").update(target="register_forward_hook")),
        "was not saved",
    ),
    "tensor of another shape": (
        edits(GRAPH, read_instead("up.weight", "down.weight")),
        "graph reads down.weight at .*with other axes",
    ),
    "tensor that the plan does not know": (
        edits(GRAPH, read_instead("norm.bias", "seen")),
        r"graph reads seen at norm_bias with the shape \(16,\), but the file holds \(3,\)",
    ),
    "tensor for a number": (
        edits(GRAPH, read_instead("scale", "up.bias")),
        "graph reads up.bias at scale, where the plan expects a tensor with other axes",
    ),
    "plan of a strange node": (
        edits(MANIFEST, lambda m: m["plan"]["nodes"].update(nowhere=[[[4]]])),
        "the plan has 'nowhere' among its nodes",
    ),
    "action at a strange node": (
        edits(MANIFEST, lambda m: m["plan"]["actions"].update(nowhere=["mask", 0])),
        "the plan has 'nowhere' among its actions",
    ),
    "scalar of a strange node": (
        edits(MANIFEST, strange_scalar),
        "the plan has 'nowhere' among its scalars",
    ),
    "graph without end": (edits(GRAPH, lambda g: g["nodes"].pop()), "no single output"),
    "graph of nothing": (edits(GRAPH, lambda g: g.update(nodes=[])), "0 nodes"),
    "call of a module": (
        edits(GRAPH, lambda g: node_of(g, "call_function").update(op="call_module")),
        "which is none of",
    ),
    "graph of another model": (
        edits(MANIFEST, lambda m: m["plan"].update(nodes={})),
        "do not fit together",
    ),
}


@pytest.mark.parametrize("size", [None, 8], ids=["whole", "size"])
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_checkpoint_is_refused(sound, tmp_path, capsys, name, size):
    folder = tmp_path / "c"
    shutil.copytree(sound, folder)
    damage, message = CASES[name]
    damage(folder)
    before = set(sys.modules)
    with pytest.raises(MatryoshkafyError, match=f"(?s){message}"):
        mk.load(folder, size=size)
    assert "antigravity" not in set(sys.modules) - before
    assert not capsys.readouterr().out


ESCAPE = "\x1b[2J\u202e\nsize"


def hostile_names(manifest: dict) -> None:
    plan = manifest["plan"]
    plan["groups"][0]["name"] = plan["unknown"][0]["op"] = plan["whole"][0]["axis"] = ESCAPE
    plan["remarks"] = [f"specialised: {ESCAPE}"]
    manifest["versions"] = {ESCAPE: ESCAPE}
    manifest["signature"]["guards"]["names"] = [ESCAPE]


def test_names_out_of_a_file_are_shown_as_escapes(tmp_path):
    class Bessel(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(super().forward(x))

    model = Bessel(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    mk.save(mk.convert(model, (torch.ones(2, 3),), sizes=[4, 8]), tmp_path / "c")
    edits(MANIFEST, hostile_names)(tmp_path / "c")
    doll = mk.load(tmp_path / "c")
    assert isinstance(doll, mk.Doll)
    with pytest.warns(UserWarning) as said:
        doll(torch.ones(2, 3))
    with pytest.raises(MatryoshkafyError) as refused:
        doll(torch.ones(2, 3, 1))
    for text in (str(doll.plan), str(refused.value), *(str(w.message) for w in said)):
        assert r"\x1b[2J" in text and r"\u202e" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    assert doll.plan.groups[0].name == r"\x1b[2J\u202e\nsize"


@pytest.mark.parametrize("name", ["positional", "inputs"])
def test_an_input_whose_name_does_not_print_is_refused(sound, tmp_path, name):
    def change(manifest: dict) -> None:
        given = manifest["signature"][name]
        given[0] = ESCAPE if name == "positional" else {**given[0], "name": ESCAPE}

    shutil.copytree(sound, tmp_path / "c")
    edits(MANIFEST, change)(tmp_path / "c")
    with pytest.raises(MatryoshkafyError) as refused:
        mk.load(tmp_path / "c")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("size", [None, 4])
def test_a_node_that_reads_a_tensor_of_equal_shape_and_other_axes(tmp_path, size):
    layers = [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    mk.save(mk.convert(model, (torch.ones(2, 3),), sizes=[4, 8]), tmp_path / "c")
    edits(GRAPH, read_instead("2.weight", "4.weight"))(tmp_path / "c")
    with pytest.raises(MatryoshkafyError, match=r"reads 4\.weight at _2_weight.*with other axes"):
        mk.load(tmp_path / "c", size=size)


def test_there_are_many_cases():
    assert len(CASES) >= 30


def test_the_sound_one_is_read(sound):
    assert mk.load(sound, size=8) is not None


def test_signing_alone_changes_nothing(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "c")
    sign(tmp_path / "c")
    assert mk.load(tmp_path / "c").sizes == [4, 8, 16]
