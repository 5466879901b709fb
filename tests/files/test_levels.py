"""levels.py and packing.py: one file per level, and a size reads its own files only."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import struct

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files import levels
from matryoshkafy.files.folders import FolderError
from matryoshkafy.files.json_text import signed
from matryoshkafy.files.records import CheckpointError
from matryoshkafy.files.tensors import TensorFile
from tests.small_models import Images, Tied, build

SIZES = [4, 8, 16]
NAMES, NESTINGS = ("tied", "images"), ("masked", "sliced")
CASES = list(itertools.product(NAMES, NESTINGS))


@pytest.fixture(scope="module")
def dolls():
    made = {}
    for name, nesting in CASES:
        model, inputs = build(name)
        doll = mk.convert(model, inputs, sizes=SIZES, nesting=nesting)
        with torch.no_grad():
            for parameter in doll.parameters():
                parameter.add_(torch.rand_like(parameter))
        made[name, nesting] = doll, inputs
    return made


@pytest.fixture(scope="module")
def packed(dolls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for (name, nesting), (doll, _) in dolls.items():
        mk.pack(doll, folder / f"{name}-{nesting}")
    return folder


def assert_same_state(one, other):
    one, other = state_of(one), state_of(other)
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert type(tensor) is type(other[name])
        assert tensor.requires_grad == other[name].requires_grad


def only(folder, target, count):
    """A copy of a packed folder with the files of its first levels."""
    shutil.copytree(folder, target)
    for level in range(count, len(SIZES)):
        (target / levels.level_file(level)).unlink(missing_ok=True)
    return target


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_a_size_needs_its_own_files_only(dolls, packed, tmp_path, name, nesting):
    doll, inputs = dolls[name, nesting]
    for level, size in enumerate(SIZES):
        folder = only(packed / f"{name}-{nesting}", tmp_path / str(size), level + 1)
        loaded, expected = mk.load(folder, size=size), mk.slice(doll, size)
        assert_same_state(expected, loaded)
        with torch.no_grad():
            for one, other in zip(leaves(expected, inputs), leaves(loaded, inputs), strict=True):
                assert torch.equal(one, other)


def leaves(model, inputs):
    return torch.utils._pytree.tree_leaves(model(*inputs))


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_the_whole_doll_computes_the_same(dolls, packed, name, nesting):
    doll, inputs = dolls[name, nesting]
    loaded = mk.load(packed / f"{name}-{nesting}")
    assert loaded.plan == doll.plan and list(loaded.state_dict()) == list(doll.state_dict())
    with torch.no_grad():
        assert_same_state(mk.slice(doll, 16), mk.slice(loaded, 16))
        for one, other in zip(leaves(doll, inputs), leaves(loaded, inputs), strict=True):
            assert torch.equal(one, other)
    if nesting == "sliced":
        assert_same_state(doll, loaded)


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_an_upgrade_reads_the_new_files_only(dolls, packed, tmp_path, name, nesting):
    doll, _ = dolls[name, nesting]
    source = packed / f"{name}-{nesting}"
    for low, high in itertools.combinations(range(len(SIZES)), 2):
        folder = tmp_path / f"{low}-{high}"
        shutil.copytree(source, folder)
        for level in range(low + 1):
            (folder / levels.level_file(level)).unlink()
        small = mk.load(source, size=SIZES[low])
        larger = mk.upgrade(small, folder, SIZES[high])
        assert_same_state(mk.slice(doll, SIZES[high]), larger)
        assert_same_state(mk.slice(doll, SIZES[low]), mk.slice(larger, SIZES[low]))


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_packing_a_folder_or_a_slice(dolls, packed, tmp_path, name, nesting):
    doll, _ = dolls[name, nesting]
    mk.save(doll, tmp_path / "dense")
    mk.pack(tmp_path / "dense", tmp_path / "packed")
    one, other = packed / f"{name}-{nesting}", tmp_path / "packed"
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }
    mk.pack(mk.slice(doll, 8), tmp_path / "8")
    assert_same_state(mk.slice(doll, 8), mk.load(tmp_path / "8"))
    assert_same_state(mk.slice(doll, 4), mk.load(only(tmp_path / "8", tmp_path / "4", 1), size=4))


def test_structural_zeros_are_not_stored(tmp_path):
    """Of a square masked weight of 4, 8, 16 units 16 + 32 + 128 of 256 numbers are."""
    layers = nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False)
    model = nn.Sequential(nn.Embedding(5, 16), *layers).eval()
    doll = mk.convert(model, (torch.arange(3),), sizes=SIZES)
    mk.pack(doll, tmp_path / "c")
    counts = [stored(tmp_path / "c", level) for level in range(3)]
    assert counts == [8 * 4 + 4 * 4, 8 * 4 + 4 * 8, 8 * 8 + 8 * 16]


def stored(folder, level):
    with TensorFile(folder / levels.level_file(level)) as file:
        return sum(file.read(name).numel() for name in file.names)


def test_every_number_is_stored_once(dolls, packed):
    doll, _ = dolls["images", "sliced"]
    count = sum(stored(packed / "images-sliced", level) for level in range(3))
    assert count == sum(t.numel() for t in doll.state_dict().values())


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_half_fetched_file_costs_its_own_size_only(dolls, packed, tmp_path, damage):
    doll, _ = dolls["tied", "masked"]
    folder = tmp_path / "c"
    shutil.copytree(packed / "tied-masked", folder)
    path = folder / levels.level_file(2)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": data[:-100], "flip": bytes(data), "empty": b""}[damage])
    for size in (4, 8):
        assert_same_state(mk.slice(doll, size), mk.load(folder, size=size))
    for broken in (lambda: mk.load(folder), lambda: mk.load(folder, size=16)):
        with pytest.raises(FolderError, match=r"level-2\.safetensors"):
            broken()


def test_the_smaller_size_loads_at_every_moment_of_a_fetch(dolls, packed, tmp_path):
    """A fetch that writes in place is killed after each block: the smaller size is unharmed."""
    doll, _ = dolls["images", "masked"]
    folder = only(packed / "images-masked", tmp_path / "c", 2)
    data = (packed / "images-masked" / levels.level_file(2)).read_bytes()
    for stop in range(0, len(data), max(1, len(data) // 12)):
        process = os.fork()
        if process == 0:
            with open(folder / levels.level_file(2), "wb") as file:
                file.write(data[:stop])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(process, 0)
        assert_same_state(mk.slice(doll, 8), mk.load(folder, size=8))
    (folder / levels.level_file(2)).write_bytes(data)
    assert_same_state(mk.slice(doll, 16), mk.load(folder, size=16))


def test_a_quarter_size_reads_its_own_bytes(tmp_path, monkeypatch):
    """What is read beside graph and manifest is the file of the level: its weights plus 2 %."""
    doll = mk.convert(Tied(512).eval(), (torch.arange(6).view(2, 3),), sizes=[128, 256, 512])
    mk.pack(doll, tmp_path / "c")
    touched = {}
    read = TensorFile._read_some

    def counted(self, target, begin):
        count = read(self, target, begin)
        touched.setdefault(self.path.name, set()).update(range(begin, begin + count))
        return count

    monkeypatch.setattr(TensorFile, "_read_some", counted)
    small = mk.load(tmp_path / "c", size=128)
    weights = sum(t.numel() * t.element_size() for t in unique(state_of(small).values()))
    assert set(touched) == {"level-0.safetensors"}
    assert 0.5 * weights < len(touched["level-0.safetensors"]) <= 1.02 * weights


def unique(tensors):
    return list({id(t): t for t in tensors}.values())


def test_weight_normalised_weights_are_refused(tmp_path):
    model, inputs = build("normed")
    doll = mk.convert(model, inputs, sizes=SIZES)
    with pytest.raises(CheckpointError, match="weight-normalised.*remove_parametrizations"):
        mk.pack(doll, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_upgrade_that_is_none(dolls, packed, tmp_path):
    doll, _ = dolls["tied", "masked"]
    small = mk.slice(doll, 8)
    with pytest.raises(CheckpointError, match="expected a larger size"):
        mk.upgrade(small, packed / "tied-masked", 4)
    with pytest.raises(CheckpointError, match="their plans differ"):
        mk.upgrade(small, packed / "tied-sliced", 16)
    mk.save(doll, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is not packed by level"):
        mk.upgrade(small, tmp_path / "dense", 16)
    with pytest.raises(CheckpointError, match="the checkpoint that is to be packed"):
        mk.pack(tmp_path / "dense", tmp_path / "dense", force=True)


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(signed(value) if path.name == "matryoshka.json" else value))


def shift_boxes(folder):
    """Swap the shapes of a box, as an attacker can."""
    import hashlib

    path = folder / levels.level_file(1)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for record in header.values():
        if "shape" in record and len(record["shape"]) == 2:
            record["shape"] = record["shape"][::-1]
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change(folder / "matryoshka.json", lambda m: m["digests"].update({path.name: digest}))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(levels=None),
        lambda m: m["levels"].update(tensors={}),
        lambda m: m["levels"]["aliases"].update(x="y"),
        lambda m: m["levels"]["tensors"].update({"up.weight": ["F32", [2**39, 2**39]]}),
        lambda m: m["levels"]["tensors"].update({"up.weight": ["F64", [32, 16]]}),
        lambda m: m["levels"]["tensors"].update({"up.weight": ["OBJECT", [32, 16]]}),
        lambda m: m["levels"]["tensors"].update({"up.weight": 7}),
        lambda m: m["digests"].pop("level-1.safetensors"),
        lambda m: m["digests"].update({"level-7.safetensors": "0"}) or m.update(format=1.5),
        lambda m: m["plan"]["stored"].clear(),
    ],
)
def test_a_damaged_layout_is_refused(packed, tmp_path, edit):
    folder = tmp_path / "c"
    shutil.copytree(packed / "tied-masked", folder)
    change(folder / "matryoshka.json", edit)
    with pytest.raises(MatryoshkafyError):
        mk.load(folder)


def test_boxes_of_other_shapes_are_refused(packed, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(packed / "images-masked", folder)
    shift_boxes(folder)
    with pytest.raises(MatryoshkafyError, match="the plan expects"):
        mk.load(folder, size=8)
    assert mk.load(folder, size=4) is not None


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("make", [Tied, Images])
def test_slices_hold_the_weights_once(nesting, make):
    model, inputs = build("tied" if make is Tied else "images")
    doll = mk.convert(model, inputs, sizes=SIZES, nesting=nesting)
    found = mk.slices(doll)
    assert list(found) == SIZES
    base = {t.untyped_storage().data_ptr() for t in state_of(found[16]).values()}
    for size, small in found.items():
        assert_same_state(mk.slice(doll, size), small)
        assert {t.untyped_storage().data_ptr() for t in state_of(small).values()} <= base
        with torch.no_grad():
            for one, other in zip(
                leaves(mk.slice(doll, size), inputs), leaves(small, inputs), strict=True
            ):
                torch.testing.assert_close(one, other)
    assert list(mk.slices(doll, [8])) == [8]
    with pytest.raises(MatryoshkafyError, match="this model has the sizes"):
        mk.slices(doll, [5])
