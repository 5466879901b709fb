"""export.py: the file computes what the sub-model does, and needs nothing of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import matryoshkafy as mk
from matryoshkafy.deploy import export as exporting
from matryoshkafy.deploy import plain_ops
from matryoshkafy.deploy.export import ExportError, export, plain_module
from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.graph.trace import trace
from matryoshkafy.kernels import ops as _ops
from tests.kernels import reference
from tests.small_models import MODELS, WORDS, build

assert _ops
ALONE = """
import sys
sys.modules["matryoshkafy"] = None
import torch
inputs, expected = torch.load(sys.argv[2])
if sys.argv[1].endswith(".pt2"):
    found = torch.export.load(sys.argv[1]).module()(*inputs)
    found = list(found.values()) if isinstance(found, dict) else [found]
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1])
    names = [item.name for item in session.get_inputs()]
    fed = dict(zip(names, [t.numpy() for t in inputs]))
    found = [torch.from_numpy(v) for v in session.run(None, fed)]
assert len(found) == len(expected)
for a, b in zip(found, expected):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert not [m for m in sys.modules if m.startswith("matryoshkafy.")]
print("alone", [n for n in names] if not sys.argv[1].endswith(".pt2") else "")
"""


def sub_model(name, nesting="masked", norm="block"):
    model, inputs = build(name)
    doll = mk.convert(model, inputs, sizes=[4, 8, 16], nesting=nesting, norm=norm)
    return mk.slice(doll, 8), inputs


def tensors(value):
    return [t.detach() for t in pytree.tree_leaves(value)]


@pytest.mark.parametrize("norm", ["block", "prefix"])
@pytest.mark.parametrize("name", MODELS)
def test_the_plain_module_computes_the_same_without_our_operators(name, norm):
    small, inputs = sub_model(name, norm=norm)
    plain = plain_module(small)
    for a, b in zip(tensors(small(*inputs)), tensors(plain(*inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    program = torch.export.export(plain, inputs)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not [target for target in targets if "matryoshkafy" in target]


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("pt2", "tied"),
        ("onnx", "tied"),
        pytest.param("pt2", "images", marks=pytest.mark.slow),
        pytest.param("onnx", "images", marks=pytest.mark.slow),
    ],
)
def test_the_file_runs_where_the_library_cannot_be_imported(tmp_path, to, name):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    small, inputs = sub_model(name)
    done = export(small, tmp_path / f"m.{to}", to=to)
    assert (done.path, done.to) == (tmp_path / f"m.{to}", to)
    assert done.error < 1e-5
    other = [torch.cat([t, t.flip(0)]) for t in inputs]
    torch.save((other, tensors(small(*other))), tmp_path / "case.pt")
    words = [sys.executable, "-c", ALONE, str(done.path), str(tmp_path / "case.pt")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "alone" in ran.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.pt", f"m.{to}"]


def test_a_doll_is_exported_at_full_size(tmp_path):
    model, inputs = build("images")
    doll = mk.convert(model, inputs, sizes=[8, 16], nesting="sliced")
    export(doll, tmp_path / "m.pt2", to="pt2", args=inputs)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


LEVELS = [3, 0, 2, 1, 4, 2, 1, 0]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("runs", [LEVELS, [10, 0]], ids=["levels", "single"])
def test_norms_against_the_reference(runs, prefix):
    x, weight, bias = torch.randn(2, 10, 3), torch.randn(10), torch.randn(10)
    last = x.transpose(1, 2)
    pairs = [
        (plain_ops.plain_layer_norm(last, weight, bias, 1e-5, runs, prefix),
         reference.layer_norm(last, weight, bias, 1e-5, runs, prefix)),
        (plain_ops.plain_rms_norm(last, weight, 1e-5, runs, prefix),
         reference.rms_norm(last, weight, 1e-5, runs, prefix)),
        (plain_ops.plain_group_norm(x, weight, bias, 1e-5, runs, prefix),
         reference.group_norm(x, weight, bias, 1e-5, runs, prefix)),
        (plain_ops.level_reduce(x, [1], 1, runs, "std0", prefix),
         reference.level_reduce(x, [1], 1, runs, "std0", prefix)),
    ]  # fmt: skip
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", ["linear", "conv", "conv_transposed", "mask"])
def test_masked_operators_against_our_own(call):
    out_runs, in_runs = [2, 0, 4, 1], [3, 0, 1, 1]
    rows = {
        "linear": (torch.randn(2, 4), torch.randn(6, 4), torch.randn(6)),
        "conv": (torch.randn(2, 4, 5), torch.randn(6, 4, 3), torch.randn(6)),
        "conv_transposed": (torch.randn(2, 4, 5), torch.randn(4, 6, 3), torch.randn(6)),
        "mask": (torch.randn(3, 4, 6), 2, 1),
    }
    transposed = call == "conv_transposed"
    geometry = ([1], [0], [1], transposed, [0], 1) if "conv" in call else ()
    target = getattr(torch.ops.matryoshkafy, call.partition("_")[0]).default
    operands = [*rows[call], *geometry]
    expected = target(*operands, out_runs, in_runs)
    root, graph = nn.Module(), torch.fx.Graph()
    node = graph.call_function(target, (*operands, out_runs, in_runs))
    graph.output(node)
    plain_ops.write_plainly(root, node)
    assert "matryoshkafy" not in str(node.target).partition(" ")[0]
    found = torch.fx.Interpreter(root, graph=graph).run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_another_format_is_refused(tmp_path):
    small, _ = sub_model("tied")
    with pytest.raises(
        ExportError, match=r"to='gguf' was given; expected one of onnx, onnx-fp16, onnx-int8, pt2"
    ):
        export(small, tmp_path / "m.gguf", to="gguf")
    assert not any(tmp_path.iterdir())


def test_a_file_that_exists_is_replaced_only_with_force(tmp_path):
    small, _ = sub_model("tied")
    (tmp_path / "m.pt2").write_text("mine")
    with pytest.raises(ExportError, match=r"exists. Choose another name, .*--force"):
        export(small, tmp_path / "m.pt2", to="pt2")
    assert (tmp_path / "m.pt2").read_text() == "mine"
    export(small, tmp_path / "m.pt2", to="pt2", force=True)
    assert (tmp_path / "m.pt2").stat().st_size > 1000


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    small, _ = sub_model("tied")
    formats = {"pt2": lambda program, flat, path: [t + 1 for t in tensors(program.module()(*flat))]}
    monkeypatch.setattr(exporting, "FORMATS", formats)
    with pytest.raises(ExportError, match="computes other values.*relative error"):
        export(small, tmp_path / "m.pt2", to="pt2")
    assert not any(tmp_path.iterdir())


def test_what_is_no_sub_model_is_refused(tmp_path):
    with pytest.raises(MatryoshkafyError, match="Convert it first"):
        export(nn.Linear(2, 2), tmp_path / "m.pt2", to="pt2")


def test_example_inputs_keep_shapes_dtypes_and_ranges():
    small, (ids,) = sub_model("tied")
    (drawn,), kwargs = example_inputs(small, seed=3)
    assert not kwargs
    assert (drawn.shape, drawn.dtype) == (ids.shape, ids.dtype)
    assert int(ids.min()) <= int(drawn.min()) <= int(drawn.max()) <= int(ids.max()) < WORDS
    assert not torch.equal(drawn, ids)


def test_example_inputs_rebuild_structures_and_constants():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, pair, flag=None, *, mask):
            x = self.b(torch.relu(self.a(pair["x"] + pair["y"])))
            return x.masked_fill(~mask, 0) if flag else x

    args = ({"x": torch.ones(2, 6), "y": torch.rand(2, 6) + 3}, True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    doll = mk.convert(Net(), args, {"mask": mask}, sizes=[4, 8])
    (pair, flag), kwargs = example_inputs(doll)
    assert flag is True
    assert torch.equal(kwargs["mask"], mask)
    assert torch.equal(pair["x"], args[0]["x"])
    assert bool(((pair["y"] >= 3) & (pair["y"] <= 4)).all())
    assert doll(pair, flag, **kwargs).shape == (2, 2)


def test_ranges_are_those_of_the_example():
    traced = trace(nn.Linear(3, 2), (torch.tensor([[-2.0, 0.0, 5.0]]).expand(2, 3),))
    assert traced.signature.inputs[0].bounds == ((-2.0, 5.0),)


class Named(nn.Module):
    """Called by keyword, as models of transformers are."""

    def __init__(self):
        super().__init__()
        self.words, self.up = nn.Embedding(50, 64), nn.Linear(64, 256)
        self.down, self.head = nn.Linear(256, 64), nn.Linear(64, 50)

    def forward(self, input_ids, attention_mask):
        h = self.words(input_ids) * attention_mask[..., None]
        return self.head(h + self.down(torch.relu(self.up(h))))


def named_model():
    torch.manual_seed(0)
    ids = torch.randint(50, (2, 7))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    doll = mk.convert(Named().eval(), (), call, sizes=[32, 64], nesting="sliced")
    return mk.slice(doll, 64), call


def test_a_program_takes_the_keywords_of_the_example(tmp_path):
    small, call = named_model()
    export(small, tmp_path / "m.pt2", to="pt2", kwargs=call)
    program = torch.export.load(tmp_path / "m.pt2").module()
    longer = {name: torch.cat([t, t], 1) for name, t in call.items()}
    for given in (call, longer, dict(reversed(call.items()))):
        torch.testing.assert_close(program(**given), small(**given))


@pytest.mark.parametrize(
    ("to", "share", "error"), [("onnx-fp16", 0.6, 5e-3), ("onnx-int8", 0.45, 0.1)]
)
def test_fewer_bits_are_smaller_and_near(tmp_path, to, share, error):
    pytest.importorskip("onnxruntime")
    small, _ = named_model()
    exact = export(small, tmp_path / "m.onnx")
    rough = export(small, tmp_path / "r.onnx", to=to)
    assert exact.error < 1e-5 < rough.error < error
    assert rough.path.stat().st_size < share * exact.path.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r.onnx"]
