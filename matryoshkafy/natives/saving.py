"""save(): a model as a checkpoint, or a slice as the folder of a stock model."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import parts_of, state_of
from matryoshkafy.files import checkpoint
from matryoshkafy.files.folders import MANIFEST, whole_folder
from matryoshkafy.graph.quiet import silent
from matryoshkafy.natives import huggingface, sentences
from matryoshkafy.natives.dimensions import dimensions
from matryoshkafy.natives.inputs import Call
from matryoshkafy.natives.like import recipe_of
from matryoshkafy.natives.native import Native, NativeWarning, find, unchecked
from matryoshkafy.natives.places import check_free
from matryoshkafy.natives.recipe import NativeError, Recipe, library
from matryoshkafy.natives.source import SOURCE, Source, source_from_json, source_of
from matryoshkafy.natives.writing import WRITERS, Package, write
from matryoshkafy.plan.plan import Plan

MOST_SOURCE = 256 * 2**20


def save(  # noqa: PLR0913  the public signature
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    to: str | None = None,
    like: object = None,
    source: str | os.PathLike[str] | Source | None = None,
    tables: bool = False,
    inputs: Call | None = None,
    force: bool = False,
) -> Path:
    """Write a model whole or not at all: as a checkpoint, or a slice as a stock model's folder.

    Args:
        model: a doll or a sub-model; with `to`, a doll becomes one folder of every size, each of
            which `from_pretrained(folder, quantization_config=MatryoshkaConfig(size=m))` loads.
        folder: where to write; it must not exist, be empty, or `force`.
        to: None for a checkpoint; "hf", "st" (sentence-transformers), "timm", "open_clip" or
            "class" for the user's own class at the smaller configuration (see `native`).
        like: with `to`, the model that was converted, what builds it, its folder, or a checkpoint
            that keeps its source.
        source: the folder that the model was loaded from; a checkpoint keeps its configuration
            and side files (tokenizer, pooling, licence), so that its sizes can be written later.
        tables: with `to`, whether hidden tables that the class makes from its own width may be
            kept beside the weights; only `natives.loading.load_native` puts them in place.
        inputs: with `to`, (args, kwargs) to compare on, where random ones of the traced shapes do
            not run: boxes, places of pictures in a text. Their floats are drawn anew.
        force: replace what stands there, if it is of the same kind.

    Returns:
        The absolute path of the folder.

    Raises:
        FolderError, CheckpointError, JsonError: where a checkpoint cannot be written.
        NativeError: where no configuration of the class computes the slice, or the folder is
            taken.
    """
    kept = _source(source)
    if to is None:
        side = {} if kept is None else {SOURCE: kept.to_json().encode()}
        return checkpoint.save(model, folder, force=force, side=side)
    compared = Compared(tables, inputs)
    return save_native(model, folder, to=to, like=like, source=kept, compared=compared, force=force)


@dataclass(frozen=True)
class Compared:
    """How a native size is compared with its slice: whether tables may be kept, inputs given."""

    tables: bool = False
    inputs: Call | None = None


def save_native(  # noqa: PLR0913  the public signature
    small: nn.Module,
    folder: str | os.PathLike[str],
    *,
    to: str,
    like: object,
    source: Source | None = None,
    compared: Compared = Compared(),
    force: bool = False,
) -> Path:
    """Write a slice as the folder of a stock model, compared before it stands; see `save`.

    A doll becomes one folder that holds every size.
    """
    if to not in WRITERS:
        raise NativeError(f"to={to!r} was given; expected one of {', '.join(WRITERS)}")
    if like is None:
        raise NativeError(
            f"to={to!r} was given without like; expected the model that was converted, what builds "
            "it, or its folder. Give like=model."
        )
    target = check_free(folder, force=force)
    built, known = _like(like)
    source = source or known
    if isinstance(small, Doll):
        from matryoshkafy.natives import every

        whole = every.Whole(small, recipe_of(built), source, _spare(like), compared.inputs)
        every.check(to, whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with whole_folder(target) as fresh:
                every.write(whole, fresh)
        return target
    inside = source is not None and source.library == "st" and sentences.is_whole(state_of(small))
    recipe = sentences.recipe(source) if inside and source else recipe_of(built)
    package = _package(small, (recipe, source, _spare(like)), compared, inside=inside)
    if package.native.unread:
        warnings.warn(unchecked(package.native.unread), NativeWarning, stacklevel=3)
    with silent(), warnings.catch_warnings(), whole_folder(target) as fresh:
        warnings.simplefilter("ignore")
        write(package, fresh, to)
    return target


def _package(
    small: nn.Module,
    made: tuple[Recipe, Source | None, Callable[[], Mapping[str, Tensor]] | None],
    compared: Compared,
    *,
    inside: bool,
) -> Package:
    """Find the native model of a slice; inside: of a SentenceTransformer the encoder is written."""
    recipe, source, spare = made
    _, plan = parts_of(small)
    tables, inputs = compared.tables, compared.inputs
    native = find(small, recipe, tables=tables, inputs=inputs, spare=spare, shared=True)
    parameters = _parameters(plan, native)
    native = sentences.inside(native) if inside else native
    return Package(native, plan, source, parameters, dimensions(small), tables)


def _source(given: Source | str | os.PathLike[str] | None) -> Source | None:
    if given is None or isinstance(given, Source):
        return given
    return source_of(os.fspath(given))


def _like(like: object) -> tuple[Any, Source | None]:
    """Return what `find` takes, and the side files that come with it."""
    if isinstance(like, (str, os.PathLike)):
        source = source_at(Path(cast("str | os.PathLike[str]", like)))
        return recipe_of_source(source), source
    where = getattr(getattr(like, "config", None), "_name_or_path", "")
    local = bool(where) and (Path(where) / "config.json").is_file()
    return like, source_of(where) if local else None


def _spare(like: object) -> Callable[[], Mapping[str, Tensor]] | None:
    """A checkpoint holds the full model's tensors, those too that the slice's graph leaves out."""
    if not isinstance(like, (str, os.PathLike)):
        return None
    folder = Path(cast("str | os.PathLike[str]", like))
    return (lambda: state_of(checkpoint.load(folder))) if (folder / MANIFEST).is_file() else None


def source_at(folder: Path) -> Source:
    """Return the source that a checkpoint keeps, or of a model's own folder."""
    if not (folder / MANIFEST).is_file():
        return source_of(folder)
    with checkpoint.open_checkpoint(folder) as found:
        return source_in(found)


def source_in(found: checkpoint.Checkpoint) -> Source:
    """Return the source that an open checkpoint keeps; raises NativeError where it keeps none."""
    if SOURCE not in found.held.names:
        raise NativeError(
            f"{found.folder} does not keep where its model came from; expected a checkpoint that "
            "`matryoshkafy convert` wrote from a folder or a library's name. Convert again, or "
            "name what builds the model (--class package.module:build)."
        )
    return source_from_json(found.held.read(SOURCE, MOST_SOURCE))


def recipe_of_source(source: Source) -> Recipe:
    """Return the recipe of a source; raises NativeError for a class of the user's own."""
    if source.library in ("hf", "st"):
        return huggingface.from_source(source)
    if source.library == "timm":
        return recipe_of(functools.partial(library("timm").create_model, source.name))
    if source.library == "open_clip":
        return recipe_of(functools.partial(library("open_clip").create_model, source.name))
    raise NativeError(
        f"the model came from {source.name}, code that is run only if you name it; expected "
        f"--class {source.name}, with a value for every argument."
    )


def _parameters(plan: Plan, native: Native) -> dict[int, int]:
    """Return how many parameters each size up to this one has."""
    named = dict(native.module.named_parameters())
    fixed = sum(p.numel() for name, p in named.items() if name not in plan.parameters)
    nested = [name for name in named if name in plan.parameters]
    return {
        size: fixed + sum(math.prod(plan.shape_at(name, level)) for name in nested)
        for level, size in enumerate(plan.sizes)
    }
