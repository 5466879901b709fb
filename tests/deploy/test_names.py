"""Files for other runtimes speak the names of the user's forward, at sizes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.deploy.export import export
from matryoshkafy.deploy.names import output_names

pytestmark = pytest.mark.filterwarnings("ignore")


def test_outputs_are_called_by_their_keys() -> None:
    def names(value: object) -> list[str]:
        return output_names(torch.utils._pytree.tree_structure(value))

    assert names(0) == ["output"]
    assert names((0, 1)) == ["output_0", "output_1"]
    assert names({"logits": 0, "states": (1, 2)}) == ["logits", "states_0", "states_1"]


def test_onnx_takes_and_gives_names_at_any_batch_and_length(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=1,
        max_position_embeddings=40,
    )
    model = transformers.BertModel(config).eval()
    call = {"input_ids": torch.randint(3, 97, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    doll = mk.convert(model, (), call, sizes=[16, 32], nesting="sliced")
    small = mk.slice(doll, 16)
    path = export(small, tmp_path / "bert.onnx").path
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in graph.output] == ["last_hidden_state", "pooler_output"]
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["last_hidden_state"] == ["batch", "sequence", 16]
    other = {"input_ids": torch.randint(3, 97, (3, 11)), "attention_mask": torch.ones(3, 11).long()}
    session = runtime.InferenceSession(str(path))
    (states,) = session.run(["last_hidden_state"], {k: v.numpy() for k, v in other.items()})
    with torch.no_grad():
        wanted = small(**other).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(states), wanted, rtol=1e-3, atol=1e-4)


def test_a_plain_output_has_a_plain_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    doll = mk.convert(net, (torch.randn(2, 6),), sizes=[4, 8], nesting="sliced")
    path = export(mk.slice(doll, 4), tmp_path / "net.onnx").path
    assert [o.name for o in onnx.load(path).graph.output] == ["output"]


class Masked(nn.Module):
    """A mask that is read by index, so that its graph knows no batch that it shares."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        seen = attention_mask[torch.arange(x.shape[0])]
        scores = x @ x.transpose(1, 2) + seen[:, None].log().clamp_min(-1e4)
        return self.head(scores.softmax(-1) @ x)


def test_a_mask_that_is_read_by_index_has_the_same_batch(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    call = {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": torch.ones(2, 7)}
    doll = mk.convert(Masked().eval(), call, sizes=[8, 16], nesting="sliced")
    graph = onnx.load(export(mk.slice(doll, 8), tmp_path / "masked.onnx").path).graph
    for value in graph.input:
        named = [d.dim_param for d in value.type.tensor_type.shape.dim]
        assert named == ["batch", "sequence"], value.name
