"""A model of pictures (timm, open_clip) as the subject of a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import matryoshkafy
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import Term
from matryoshkafy_cli.families import agreement, computed, split
from matryoshkafy_cli.models import load_model
from matryoshkafy_cli.screen import CommandError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """A file, the folder that it stands in (a label), and what it shows (for two towers)."""

    path: Path
    label: str
    caption: str


def second(output: Any, batch: Any) -> Tensor:
    """Return the text vectors of two towers."""
    del batch
    return output[1]


def first(output: Any, batch: Any = None) -> Tensor:
    """Return the picture's vectors, or its logits."""
    del batch
    return output if isinstance(output, Tensor) else output[0]


@dataclass
class Pictures:
    """A model of timm, or the two towers of open_clip with captions, and pictures."""

    library: str
    model: nn.Module
    prepare: Callable[[Any], Tensor]
    tokenize: Callable[[list[str]], Tensor] | None
    train: Sequence[Picture]
    held: Sequence[Picture]
    lengths: Sequence[int] | None = None

    def batch(self, rows: Sequence[Picture]) -> tuple[Tensor, ...]:
        """Return pictures, and their captions' tokens where there are two towers."""
        from PIL import Image

        images = torch.stack([self.prepare(Image.open(p.path).convert("RGB")) for p in rows])
        if self.tokenize is None:
            return (images,)
        return images, self.tokenize([p.caption for p in rows])

    def terms(self, doll: Doll) -> tuple[Term, ...]:
        """Return the similarity of the pictures; of their captions; and classes, if there are."""
        example = self.batch(self.train[:2])
        with torch.no_grad():
            outputs = doll.outputs(*example)
        if self.tokenize is not None:
            return Term("similarity", of=first), Term("similarity", of=second)
        widths = {first(out).shape[-1] for out in outputs.values()}
        return (Term("similarity"), Term("kl")) if len(widths) == 1 else (Term("similarity"),)

    def quality(self, model: nn.Module, truth: Any) -> tuple[dict[str, float], Any]:
        """Return how the held-out vectors agree with the full model's, and how often the nearest
        other picture is of the same folder.
        """
        outputs = computed(model, self, self.held)
        found = torch.cat([first(out) for out in outputs]).clone()
        spearman, neighbours = agreement(found, found if truth is None else truth)
        labels = [picture.label for picture in self.held]
        task = {"same folder": nearest_alike(found, labels)} if len(set(labels)) > 1 else {}
        return {"spearman": spearman, "neighbours": neighbours, **task}, found

    def write(self, doll: Doll, small: GraphModule, folder: Path) -> nn.Module:
        """Write the folder of a size in the model's own class."""
        from matryoshkafy.natives.loading import load_native

        del doll
        matryoshkafy.save(small, folder, to=self.library, like=self.model, force=True)
        return load_native(folder).eval()


def nearest_alike(found: Tensor, labels: Sequence[str]) -> float:
    """Return how often the nearest other row has the same label."""
    a = F.normalize(found, dim=-1)
    number = {name: i for i, name in enumerate(sorted(set(labels)))}
    label = torch.tensor([number[name] for name in labels])
    return float((label[(a @ a.t()).fill_diagonal_(-2).argmax(1)] == label).double().mean())


def pictures_in(folder: Path) -> list[Picture]:
    """Return the pictures below a folder; a caption stands in NAME.txt, else it is the folder's
    name.
    """
    if not folder.is_dir():
        raise CommandError(
            f"--data {folder} was given; expected a folder of pictures for such a model. Give one."
        )
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS):
        beside = path.with_suffix(".txt")
        label = path.parent.name
        caption = beside.read_text("utf-8").strip() if beside.is_file() else label
        found.append(Picture(path, label, caption))
    return found


def pictures_subject(spec: str, weights: Path | None, folder: Path, seed: int) -> Pictures:
    """Return the subject of a library's model and a folder of pictures."""
    library = spec.partition(":")[0]
    rows = pictures_in(folder)
    model = load_model(spec, weights).model
    prepare, tokenize = _TOOLS[library](model, spec)
    return Pictures(library, model, prepare, tokenize, *split(rows, seed, "pictures"))


def _timm_tools(model: Any, spec: str) -> tuple[Callable[[Any], Tensor], None]:
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    del spec
    config = resolve_model_data_config(model)
    prepare: Any = create_transform(**config, is_training=False)
    return prepare, None


def _open_clip_tools(model: Any, spec: str) -> tuple[Callable[[Any], Tensor], Any]:
    import open_clip

    look = model.visual
    prepare: Any = open_clip.image_transform(
        look.image_size,
        is_train=False,
        mean=getattr(look, "image_mean", None),
        std=getattr(look, "image_std", None),
    )
    return prepare, open_clip.get_tokenizer(spec.split(":")[1])


_TOOLS: dict[str, Callable[[Any, str], tuple[Callable[[Any], Tensor], Any]]] = {
    "timm": _timm_tools,
    "open_clip": _open_clip_tools,
}
