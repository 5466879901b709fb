"""tensor_files.py, tensor_header.py: safetensors is the oracle; damaged files are refused."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matryoshkafy.files.tensors as tensor_files
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.header import DTYPES, EXTRA, PAIRS, Entry, TensorFileError
from matryoshkafy.files.tensors import (
    TensorFile,
    TensorFolder,
    entry_of,
    write_tensors,
)
from matryoshkafy.graph.nodes import TensorInfo

SHAPES = [(), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4), (1, 1, 1, 9)]


def tensor_of(shape, dtype):
    """Random bytes as the dtype: every bit pattern counts, NaNs too."""
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def as_bytes(tensor):
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert as_bytes(found) == as_bytes(expected)


def write(path, tensors, **options):
    write_tensors(path, [entry_of(name, tensor) for name, tensor in tensors.items()], **options)
    return path


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *PAIRS.values()], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype):
    tensors = {f"t{i}": tensor_of(shape, dtype) for i, shape in enumerate(SHAPES)}
    path = write(tmp_path / "m.safetensors", tensors)
    with TensorFile(path) as file:
        assert set(file.names) == set(tensors)
        for name, tensor in tensors.items():
            assert file.info(name) == TensorInfo(tuple(tensor.shape), dtype)
            assert_same(file.read(name), tensor)
    theirs = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        pair = dtype in PAIRS.values()
        assert_same(theirs[name], torch.view_as_real(tensor) if pair else tensor)


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {f"{d}": tensor_of((3, 5), d) for d in DTYPES.values() if d.itemsize != 16}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", metadata={"a": "b"})
    with TensorFile(tmp_path / "m.safetensors") as file:
        assert file.aliases == {}
        for name, tensor in tensors.items():
            assert_same(file.read(name), tensor)


def test_ties_are_written_once_and_any_view_may_be_given(tmp_path):
    weight = torch.randn(6, 8)
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    tensors = {
        "embed.weight": torch.nn.Parameter(weight),
        "transposed": weight.T,
        "strided": weight[::2, 1::3],
        "expanded": weight[:1].expand(4, 8),
        "conjugate": conjugate,
    }
    aliases = {"lm_head.weight": "embed.weight"}
    path = write(tmp_path / "m.safetensors", tensors, aliases=aliases)
    assert set(safetensors.torch.load_file(path)) == set(tensors)
    with safetensors.safe_open(path, "pt") as theirs:
        assert theirs.metadata()["format"] == "pt"
    with TensorFile(path) as file:
        assert file.aliases == aliases and "lm_head.weight" not in file.names
        assert_same(file.read("lm_head.weight"), weight)
        assert file.info("lm_head.weight") == TensorInfo((6, 8), torch.float32)
        for name, tensor in tensors.items():
            assert_same(file.read(name), tensor.detach().resolve_conj().contiguous())


def test_tensors_are_asked_for_one_at_a_time_and_not_kept(tmp_path):
    import weakref

    alive = []

    def supply(i):
        assert all(ref() is None for ref in alive)
        tensor = torch.full((4,), float(i))
        alive.append(weakref.ref(tensor))
        return tensor

    entries = [Entry(f"t{i}", (4,), torch.float32, lambda i=i: supply(i)) for i in range(5)]
    write_tensors(tmp_path / "m.safetensors", entries)
    assert len(alive) == 5
    assert safetensors.torch.load_file(tmp_path / "m.safetensors")["t3"].tolist() == [3.0] * 4


ONE = torch.ones(2)
UNWRITABLE = {
    "alias of nothing": ([entry_of("a", ONE)], {"b": "c"}, "no such tensor"),
    "alias that is taken": ([entry_of("a", ONE)], {"a": "a"}, "same name"),
    "name twice": ([entry_of("a", ONE), entry_of("a", ONE)], {}, "same name"),
    "name empty": ([entry_of("", ONE)], {}, "not allowed"),
    "name reserved": ([entry_of("__metadata__", ONE)], {}, "not allowed"),
    "other shape": ([Entry("a", (3,), torch.float32, lambda: ONE)], {}, r"announced"),
    "other dtype": ([Entry("a", (2,), torch.float64, lambda: ONE)], {}, r"announced"),
    "meta": ([entry_of("a", torch.ones(2, device="meta"))], {}, "dense tensors with values"),
    "sparse": ([entry_of("a", torch.eye(2).to_sparse())], {}, "dense tensors with values"),
    "dtype": ([entry_of("a", torch.ones(2, dtype=torch.uint8).view(torch.bits8))], {}, "hold"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_refused(tmp_path, case):
    entries, aliases, message = UNWRITABLE[case]
    with pytest.raises(TensorFileError, match=message):
        write_tensors(tmp_path / "m.safetensors", entries, aliases=aliases)


@st.composite
def cuts(draw):
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=4))
    cut = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        bounds = st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: tuple(sorted(p)))
        cut.append(draw(st.none() | st.lists(bounds, max_size=4)))
    return tuple(shape), cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuts")


@given(case=cuts(), chunk=st.sampled_from([1, 8, 40, 200, 2**24]), seed=st.integers(0, 99))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_slice_is_what_indexing_gives(folder, case, chunk, seed):
    shape, cut = case
    dtype = (torch.float32, torch.bfloat16, torch.complex128, torch.uint16)[seed % 4]
    tensor, other = tensor_of(shape, dtype), tensor_of((3,), torch.float64)
    path = write(folder / "m.safetensors", {"x": tensor, "other": other})
    expected = tensor
    for dim, segments in enumerate(cut):
        if segments is not None:
            index = torch.tensor([i for a, b in segments for i in range(a, b)], dtype=torch.long)
            expected = torch.movedim(torch.movedim(expected, dim, 0)[index], 0, dim)
    with pytest.MonkeyPatch.context() as patch, TensorFile(path) as file:
        patch.setattr(tensor_files, "CHUNK", chunk)
        found = file.read_slice("x", cut)
    assert_same(found, expected)
    assert found.is_contiguous() and found.untyped_storage().nbytes() == found.nbytes


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ([None, None, None], "2 dims"),
        ([[(0, 5)]], "4 indices"),
        ([[(-1, 2)]], "asked for"),
        ([[(3, 2)]], "asked for"),
        ([None, [(0, 1), (2, 7)]], "asked for"),
    ],
)
def test_a_slice_outside_the_tensor_is_refused(tmp_path, cut, message):
    path = write(tmp_path / "m.safetensors", {"x": torch.ones(4, 6)})
    with TensorFile(path) as file:
        with pytest.raises(TensorFileError, match=message):
            file.read_slice("x", cut)
        with pytest.raises(TensorFileError, match="no tensor 'y'"):
            file.read("y")


def test_shards_and_single_files_read_alike(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2)}
    write(tmp_path / "one-00001.safetensors", {"a": tensors["a"]}, aliases={"tied": "a"})
    write(tmp_path / "one-00002.safetensors", {"b": tensors["b"], "c": tensors["c"]})
    shards = {"a": "one-00001.safetensors", "b": "one-00002.safetensors"}
    index = {"metadata": {}, "weight_map": {**shards, "c": "one-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with TensorFolder(path) as folder:
            assert set(folder.names) == set(tensors) and folder.aliases == {"tied": "a"}
            for name, tensor in {**tensors, "tied": tensors["a"]}.items():
                assert_same(folder.read(name), tensor)
    write(tmp_path / "model.safetensors", tensors)
    with TensorFolder(tmp_path) as folder, TensorFolder(tmp_path / "model.safetensors") as file:
        assert set(folder.names) == set(file.names) == set(tensors) and not folder.aliases


def header_file(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def record(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def extra(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return header_file({"__metadata__": {EXTRA: text}, "x": record()})


class Payload:
    def __reduce__(self):
        return (open, ("/nonexistent/pickle-was-run", "w"))


SOUND = header_file({"x": record()})
HOSTILE = {
    "empty": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "only a length": (struct.pack("<Q", 2), "copied whole"),
    "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", "9223372036854775808 bytes"),
    "header of 2**64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "copied whole"),
    "header beyond the end": (struct.pack("<Q", 100) + b'{"x":1}', "copied whole"),
    "header empty": (struct.pack("<Q", 0) + b"{}", "header"),
    "truncated header": (SOUND[:30], "copied whole"),
    "truncated data": (SOUND[:-1], "it is cut off"),
    "no data": (SOUND[:-8], "it is cut off"),
    "data added": (SOUND + b"\0", "something was added"),
    "big endian length": (struct.pack(">Q", len(SOUND) - 16) + SOUND[8:], "copied whole"),
    "pickle": (pickle.dumps(Payload(), protocol=2) + b" " * 20, "a pickle"),
    "pickle protocol 4": (pickle.dumps(Payload(), protocol=4) + b" " * 20, "a pickle"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "a pickle archive of torch.save"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\x07" * 60, "a GGUF file"),
    "numpy": (b"\x93NUMPY\x01\0" + b" " * 60, "a NumPy file"),
    "text": (b"these are no weights at all", "copied whole"),
    "header no json": (header_file(b"{x: 1}"), "no sound JSON"),
    "header a list": (header_file(b"[1]"), "copied whole"),
    "header not utf-8": (header_file(b'{"\xff": 1}'), "no sound JSON"),
    "json after json": (header_file(b"{}{}"), "no sound JSON"),
    "deep json": (header_file(b'{"x":' + b"[" * 200_000), "nested too deeply"),
    "deep objects": (header_file(b'{"x":' * 200_000), "nested too deeply"),
    "long number": (header_file(b'{"x":' + b"9" * 100_000 + b"}"), "no sound JSON"),
    "name twice": (
        header_file(b'{"x":%b,"x":%b}' % ((json.dumps(record()).encode(),) * 2)),
        "repeats a key",
    ),
    "nan in the header": (header_file(b'{"x": NaN}'), "NaN"),
    "record a list": (header_file({"x": [1]}), "has not just"),
    "record null": (header_file({"x": None}), "has not just"),
    "field missing": (header_file({"x": {"dtype": "F32", "shape": [2]}}), "has not just"),
    "field too many": (header_file({"x": record(code="import os")}), "has not just"),
    "dtype unknown": (header_file({"x": record("F128")}), "unknown dtype"),
    "dtype a list": (header_file({"x": record(["F32"])}), "unknown dtype"),
    "dtype null": (header_file({"x": record(None)}), "unknown dtype"),
    "shape negative": (header_file({"x": record(shape=(-2,))}), "has the shape"),
    "shape of floats": (header_file({"x": record(shape=(2.0,))}), "has the shape"),
    "shape of booleans": (header_file({"x": record(shape=(True, 2))}), "has the shape"),
    "shape of text": (header_file({"x": record(shape=("2",))}), "has the shape"),
    "shape null": (header_file({"x": {**record(), "shape": None}}), "has the shape"),
    "shape too long": (header_file({"x": record(shape=(1,) * 65)}), "has the shape"),
    "shape that overflows": (header_file({"x": record(shape=(2**62, 4))}), "has the shape"),
    "shape that wraps to 8 bytes": (header_file({"x": record(shape=(2**62, 2**62, 0))}), "shape"),
    "shape too large": (header_file({"x": record(shape=(2**40,))}), "needs 4398046511104 bytes"),
    "shape too small": (header_file({"x": record(shape=(1,))}), "needs 4 bytes"),
    "scalar of 8 bytes": (header_file({"x": record(shape=())}), "needs 4 bytes"),
    "dtype too wide": (header_file({"x": record("F64")}), "needs 16 bytes"),
    "offsets swapped": (header_file({"x": record(offsets=(8, 0))}), "needs 8 bytes"),
    "offsets negative": (header_file({"x": record(offsets=(-8, 0))}), "data_offsets"),
    "offsets of floats": (header_file({"x": record(offsets=(0.0, 8.0))}), "data_offsets"),
    "offsets huge": (header_file({"x": record(offsets=(2**63, 2**63 + 8))}), "data_offsets"),
    "offsets of three": (header_file({"x": record(offsets=(0, 8, 8))}), "data_offsets"),
    "offsets null": (header_file({"x": {**record(), "data_offsets": None}}), "data_offsets"),
    "out of range": (header_file({"x": record(offsets=(8, 16))}), "leaves a hole"),
    "beyond the end": (header_file({"x": record(shape=(4,), offsets=(0, 16))}), "cut off"),
    "overlapping": (
        header_file({"x": record(), "y": record(offsets=(4, 12))}, b"\0" * 12),
        "overlaps",
    ),
    "the same bytes twice": (header_file({"x": record(), "y": record()}), "overlaps"),
    "a hole": (header_file({"x": record(), "y": record(offsets=(12, 20))}, b"\0" * 20), "hole"),
    "metadata a list": (header_file({"__metadata__": [1], "x": record()}), "__metadata__"),
    "metadata of numbers": (header_file({"__metadata__": {"a": 1}, "x": record()}), "__metadata__"),
    "extra no json": (extra("{"), "no sound JSON"),
    "extra a list": (extra([]), "expected"),
    "extra unknown": (extra({"exec": {}}), "expected"),
    "aliases a list": (extra({"aliases": ["x"]}), "expected"),
    "aliases of numbers": (extra({"aliases": {"y": 1}}), "expected"),
    "alias of nothing": (extra({"aliases": {"y": "z"}}), "alias"),
    "alias of itself": (extra({"aliases": {"x": "x"}}), "alias"),
    "alias of an alias": (extra({"aliases": {"y": "x", "z": "y"}}), "alias"),
    "complex of nothing": (extra({"complex": {"y": "complex128"}}), "cannot be"),
    "complex of float32": (extra({"complex": {"x": "complex128"}}), "cannot be"),
    "complex unknown": (extra({"complex": {"x": "object"}}), "cannot be"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_their_name(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for opened in (path, tmp_path):
        with pytest.raises(MatryoshkafyError, match=message) as caught:
            TensorFolder(opened)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_the_sound_file_that_the_hostile_ones_damage_is_read(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(SOUND)
    with TensorFile(tmp_path / "m.safetensors") as file:
        assert file.read("x").tolist() == [0.0, 0.0]


def test_damage_that_only_the_data_shows_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(header_file({"x": record("BOOL", (8,))}, bytes([0, 1, 2, 0, 0, 0, 0, 0])))
    with TensorFile(path) as file, pytest.raises(TensorFileError, match="other than 0 and 1"):
        file.read("x")
    path.write_bytes(SOUND)
    with TensorFile(path) as file:
        path.write_bytes(SOUND[:-4])
        with pytest.raises(TensorFileError, match="ended early"):
            file.read("x")


INDEXES = {
    "out of the folder": ({"weight_map": {"x": "../model.safetensors"}}, "plain name"),
    "absolute": ({"weight_map": {"x": "/etc/passwd"}}, "plain name"),
    "two dots": ({"weight_map": {"x": ".."}}, "plain name"),
    "backslashes": ({"weight_map": {"x": "..\\model.safetensors"}}, "plain name"),
    "another drive": ({"weight_map": {"x": "C:model.safetensors"}}, "plain name"),
    "zero byte": ({"weight_map": {"x": "a\0.safetensors"}}, "plain name"),
    "a number": ({"weight_map": {"x": 1}}, "plain name"),
    "a pickle": ({"weight_map": {"x": "pytorch_model.bin"}}, "no .safetensors file"),
    "missing file": ({"weight_map": {"x": "missing.safetensors"}}, "is no file"),
    "missing tensor": ({"weight_map": {"y": "s.safetensors"}}, "no tensor 'y'"),
    "empty map": ({"weight_map": {}}, "no weight_map"),
    "map a list": ({"weight_map": ["s.safetensors"]}, "no weight_map"),
    "no map": ({}, "no weight_map"),
    "a list": ([], "no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_indexes_are_refused(tmp_path, case):
    index, message = INDEXES[case]
    (tmp_path / "s.safetensors").write_bytes(SOUND)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MatryoshkafyError, match=message):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1, "a": 1}', "\x80\x04"])
def test_indexes_that_are_no_json_are_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(MatryoshkafyError, match="JSON"):
        TensorFolder(tmp_path)


def test_a_folder_without_tensors_says_what_it_holds(tmp_path):
    with pytest.raises(TensorFileError, match="holds neither"):
        TensorFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TensorFileError, match="pytorch_model.bin is a pickle"):
        TensorFolder(tmp_path)
    with pytest.raises(TensorFileError, match="is no file"):
        TensorFolder(tmp_path / "missing")
    (tmp_path / "theirs.safetensors").write_bytes(SOUND)
    with TensorFolder(tmp_path) as folder:
        assert folder.names == ("x",)
