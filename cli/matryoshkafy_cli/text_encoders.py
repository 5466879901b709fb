"""A folder with a text encoder: the model with its pooling, its tokenizer, and a size's folder."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matryoshkafy_cli.screen import CommandError

POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


class Embedder(nn.Module):
    """Texts' tokens -> one vector each: the encoder, its pooling, and its length set to one."""

    def __init__(self, model: nn.Module, pooling: str, *, normalised: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.normalised = model, pooling, normalised

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [texts, width]."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = found.last_hidden_state
        if self.pooling == "cls":
            vector = hidden[:, 0]
        else:
            mask = attention_mask[..., None].to(hidden.dtype)
            vector = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        return torch.nn.functional.normalize(vector, dim=-1) if self.normalised else vector


@dataclass(frozen=True)
class TextEncoder:
    """An embedder, its tokenizer, how many tokens of a text it reads, and its folder."""

    embedder: Embedder
    tokenizer: Any
    length: int
    folder: Path

    def batch(self, texts: Sequence[str], multiple: int = 1) -> dict[str, Tensor]:
        """Return the tokens of texts, padded to the longest, its length up to a multiple."""
        options = {"padding": True, "truncation": True, "max_length": self.length}
        options["pad_to_multiple_of"] = multiple
        found = self.tokenizer(list(texts), return_tensors="pt", **options)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    @property
    def builder(self) -> Callable[..., nn.Module]:
        """What builds the encoder's class, with the whole numbers of its configuration."""
        config: Any = self.embedder.model.config
        numbers = {k: v for k, v in config.to_dict().items() if type(v) is int}
        return functools.partial(_bare, type(self.embedder.model), config, **numbers)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the encoder at a smaller size, with all that stands beside the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            weights = path.suffix in (".safetensors", ".bin", ".onnx", ".h5", ".msgpack")
            if path.is_dir() and (path / "config.json").is_file():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.is_file() and not weights and path.name not in ("config.json", "README.md"):
                shutil.copy(path, folder / path.name)
        model.save_pretrained(folder)  # type: ignore[operator]
        self._narrow_pooling(folder, model.config.hidden_size)  # type: ignore[union-attr]

    def _narrow_pooling(self, folder: Path, width: Any) -> None:
        path = folder / "1_Pooling" / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "word_embedding_dimension": width}, indent=2))
        if (folder / "modules.json").is_file():
            (folder / "2_Normalize").mkdir(exist_ok=True)


def _bare(kind: type, config: Any, **numbers: int) -> nn.Module:
    """Build an encoder without its pooler, at a changed configuration."""
    changed = copy.deepcopy(config)
    changed.update(numbers)
    return kind(changed, **_without_pooler(kind))


def _without_pooler(kind: type) -> dict[str, bool]:
    """A pooler that nothing reads would not follow the order of the units."""
    bare = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if bare else {}


def load_encoder(folder: Path, length: int) -> TextEncoder:
    """Return the text encoder of a transformers or sentence-transformers folder.

    Raises:
        CommandError: no such folder, no tokenizer, a pooling or a part that is not known.
    """
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"{folder} holds no config.json; expected the folder of a transformers or "
            "sentence-transformers text encoder. Give the folder that save_pretrained wrote; "
            "`hf download NAME --local-dir FOLDER` fetches one by its name on the hub."
        )
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    kind: Any = transformers.AutoModel._model_mapping[type(config)]
    model = kind.from_pretrained(folder, use_safetensors=True, **local, **_without_pooler(kind))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    embedder = Embedder(model, _pooling(folder), normalised=_normalised(folder)).eval()
    return TextEncoder(embedder, tokenizer, length, folder)


def _pooling(folder: Path) -> str:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = json.loads(path.read_text(encoding="utf-8"))
    chosen = [name for name, on in config.items() if name.startswith("pooling_mode") and on is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise CommandError(
            f"{path} asks for {', '.join(chosen) or 'no pooling'}; expected the mean of the tokens "
            "or the first one. Convert your own forward in Python and call training.distil."
        )
    return POOLINGS[chosen[0]]


def _normalised(folder: Path) -> bool:
    path = folder / "modules.json"
    if not path.is_file():
        return False
    kinds = [part["type"].rpartition(".")[2] for part in json.loads(path.read_text("utf-8"))]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise CommandError(
            f"{path} lists {', '.join(kinds)}; expected Transformer, Pooling and perhaps "
            "Normalize. Convert your own forward in Python and call training.distil."
        )
    return kinds[2:] == ["Normalize"]
