"""native(): the user's own class at the smaller configuration, equal to the slice."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.natives.loading import load_native
from matryoshkafy.natives.native import NativeWarning, find
from matryoshkafy.natives.recipe import NativeError
from tests.natives.likes import like_of
from tests.zoo.registry import entries

QUICK = "bert gpt2 llama_gqa clip timm_vit".split()
MUST = """
    mistral qwen2 qwen3 gemma2 gemma3 phi3 opt roberta distilbert modernbert t5 bart whisper vit
    dinov2 siglip timm_convnext timm_efficientnet open_clip
    """.split()


class Net(nn.Module):
    """A user's own class: two widths, heads, and a layer that the forward does not read."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        hidden: int = 48,
        classes: int = 5,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.hidden, self.classes = width, heads, hidden, classes
        self.table = nn.Embedding(11, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.spare = nn.Linear(width, 2)
        self.head = nn.Linear(width, classes)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.table(ids))
        batch, length, _ = h.shape
        parts = self.qkv(h).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        h = h + mixed.transpose(1, 2).reshape(batch, length, -1)
        return self.head(h + self.down(torch.relu(self.up(h))))


def sliced(model: nn.Module, args: Any, sizes: Any, size: int, **more: Any) -> Any:
    return mk.slice(mk.convert(model, args, sizes=sizes, nesting="sliced", **more), size)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IDS = (torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in MUST)])
@pytest.mark.filterwarnings("ignore")
def test_half_of_a_library_model_is_its_class_at_a_smaller_configuration(name: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    (entry,) = entries([name])
    model, args, kwargs = entry.build()
    small = mk.slice(doll := _halved(model, args, kwargs), doll.sizes[0])
    native = mk.native(small, like=like_of(entry, model))
    assert entry.rebuild is not None
    truth = entry.rebuild(0.5)
    assert type(native) is type(truth)
    shapes = {n: t.shape for n, t in truth.state_dict().items()}
    assert {n: t.shape for n, t in native.state_dict().items()} == shapes
    truth.load_state_dict(native.state_dict())
    with torch.no_grad():
        ours, theirs = small(*args, **kwargs), truth(*args, **kwargs)
    torch.testing.assert_close(_first(ours), _first(theirs), rtol=1e-5, atol=1e-5)


def _halved(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting="sliced")


def _first(value: Any) -> torch.Tensor:
    return next(v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor))


def test_a_class_of_the_user_is_read_from_its_attributes(net: Net) -> None:
    small = sliced(net, IDS, [16, 32], 16)
    with pytest.warns(NativeWarning, match=r"spare\.\w+.* does not read"):
        native = mk.native(small, like=net)
    assert isinstance(native, Net)
    assert (native.width, native.heads, native.hidden, native.classes) == (16, 2, 24, 5)
    torch.testing.assert_close(native(IDS[0]), small(IDS[0]))
    assert torch.equal(native.spare.weight, net.spare.weight[:, :16])


@pytest.mark.filterwarnings("ignore::matryoshkafy.natives.native.NativeWarning")
def test_a_partial_tells_what_the_attributes_do_not(net: Net) -> None:
    small = sliced(net, IDS, [16, 32], 16)
    found = find(small, functools.partial(Net, width=32))
    named = {field[-1]: value for field, value in found.changes.items()}
    assert named == {"width": 16, "heads": 2, "hidden": 24}


@pytest.mark.filterwarnings("ignore::matryoshkafy.natives.native.NativeWarning")
def test_nothing_that_happens_to_hold_the_width_is_changed() -> None:
    class Crowded(Net):
        def __init__(
            self,
            width: int = 32,
            heads: int = 4,
            hidden: int = 48,
            classes: int = 32,
            period: int = 32,
            seed: int = 4,
        ) -> None:
            super().__init__(width, heads, hidden, classes)
            self.period, self.seed = period, seed

    torch.manual_seed(0)
    net = Crowded().eval()
    found = find(sliced(net, IDS, [16, 32], 16), net)
    assert {f[0] for f in found.changes} == {"width", "heads", "hidden"}


def test_the_model_and_the_random_state_are_left_as_they_were(net: Net) -> None:
    small = sliced(net, IDS, [16, 32], 16)
    before, state = torch.random.get_rng_state(), net.state_dict()
    with pytest.warns(NativeWarning):
        native = mk.native(small, like=net)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        native.head.weight.zero_()
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in state.items())
    assert bool(small.state_dict()["head.weight"].any())


def test_weights_that_differ_are_refused(net: Net) -> None:
    """A slice that computes something else than its weights say: the check must see it."""
    small = sliced(net, IDS, [16, 32], 16)
    relu = next(n for n in small.graph.nodes if "relu" in str(n.target))
    relu.target = torch.ops.aten.gelu.default
    small.recompile()
    with pytest.raises(NativeError, match="other values than the slice.*1e-5"):
        mk.native(small, like=net)


def test_masked_nesting_is_refused_with_the_way_out(net: Net) -> None:
    normed = functools.partial(Net, norm=True)
    small = mk.slice(mk.convert(normed().eval(), IDS, sizes=[8, 16, 32]), 16)
    with pytest.raises(NativeError, match='nesting="sliced"'):
        mk.native(small, like=normed)


def test_widths_that_no_field_expresses_are_refused_by_tensor_group_and_remedy(net: Net) -> None:
    class Fixed(Net):
        def __init__(self, width: int = 32) -> None:
            super().__init__(width, hidden=48)

    fixed = Fixed().eval()
    small = sliced(fixed, IDS, [16, 32], 16)
    with pytest.raises(NativeError, match=r"Fixed has the shapes.*up.*multiple_of") as caught:
        mk.native(small, like=fixed)
    assert "the group" in str(caught.value)


def test_a_constructor_that_the_attributes_do_not_tell_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(4, width)
            self.head = nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.layer(x)))

    model = Hidden(8).eval()
    small = sliced(model, (torch.randn(2, 4),), [4, 8], 4)
    with pytest.raises(NativeError, match=r"takes width.*functools.partial"):
        mk.native(small, like=model)
    assert mk.native(small, like=functools.partial(Hidden, width=8)).layer.out_features == 4


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(NativeError, match="like is a int"):
        mk.native(sliced(Net().eval(), IDS, [16, 32], 16), like=3)


def bert(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config, **more).eval()


@pytest.mark.filterwarnings("ignore")
def test_what_the_constructor_took_beside_its_configuration_is_found(tmp_path: Path) -> None:
    model = bert(add_pooling_layer=False)
    small = sliced(model, IDS, [16, 32], 16)
    assert mk.native(small, like=model).pooler is None
    folder = mk.save(small, tmp_path / "half", to="hf", like=model)
    loaded = load_native(folder)
    assert loaded.pooler is None
    torch.testing.assert_close(loaded(*IDS)[0], small(*IDS)[0], rtol=1e-5, atol=1e-5)
    assert "add_pooling_layer=False" in (folder / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_heads_shrink_also_where_attention_is_flat(tmp_path: Path) -> None:
    """With small random weights 2 heads of 4 and 4 heads of 2 agree to 1e-5: the error decides."""
    model = bert()
    found = find(sliced(model, IDS, [16, 32], 16), model)
    assert {f[-1]: v for f, v in found.changes.items()} == {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }


def test_a_class_that_reads_its_weights_as_it_is_built_is_built_with_them(net: Net) -> None:
    class Scaled(Net):
        def __init__(self, width: int = 32, heads: int = 4, hidden: int = 48) -> None:
            super().__init__(width, heads, hidden)
            self.scale = float(self.head.weight.detach().abs().sum())

    model = Scaled().eval()
    with pytest.warns(NativeWarning):
        native = mk.native(sliced(model, IDS, [16, 32], 16), like=model)
    assert native.head.in_features == 16
    assert not any(p.is_meta for p in native.parameters())


@pytest.mark.filterwarnings("ignore::matryoshkafy.natives.native.NativeWarning")
def test_a_native_size_owns_its_memory_unless_it_is_only_written(net: Net) -> None:
    small = sliced(net, IDS, [16, 32], 16)
    own = {p.data_ptr() for p in find(small, net).module.parameters()}
    shared = {p.data_ptr() for p in find(small, net, shared=True).module.parameters()}
    held = {p.data_ptr() for p in small.parameters()}
    assert not own & held
    assert held <= shared
