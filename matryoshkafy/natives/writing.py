"""Native sizes as folders: written, loaded again by their own library, and compared."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from matryoshkafy.errors import first_line
from matryoshkafy.files.tensors import TensorFolder
from matryoshkafy.graph.trace import tensors_of
from matryoshkafy.natives import card, huggingface, open_clip_models, sentences, timm_models
from matryoshkafy.natives.native import Native
from matryoshkafy.natives.places import MARK
from matryoshkafy.natives.plain import as_json, from_json, is_json
from matryoshkafy.natives.recipe import Foreign, NativeError, library, tables_of
from matryoshkafy.natives.source import Source
from matryoshkafy.natives.tree import changed, named, value_at
from matryoshkafy.plan.plan import Plan

FORMAT = 1
LARGE = 2**28
TABLES = "tables.safetensors"
WEIGHTS = "model.safetensors"
Told = Mapping[str, Any]  # what a folder says of itself
Build = Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Package:
    """A native size with all that its folder tells: the plan up to it, its source, its sizes.

    dimensions: of its vector, those whose prefix stands for itself; tables: whether what the
    library's own loader does not keep may stand beside the weights.
    """

    native: Native
    plan: Plan
    source: Source | None
    parameters: Mapping[int, int]
    dimensions: tuple[int, ...] = ()
    tables: bool = False

    @property
    def kind(self) -> str:
        """The class by its own name."""
        return type(self.native.module).__name__

    @property
    def widths(self) -> tuple[int, int]:
        """The width of the full model, and of this one."""
        return self.plan.width, self.plan.sizes[-1]


def write(package: Package, folder: Path, to: str) -> None:
    """Write a native size into an empty folder and compare what its library loads from it.

    Raises NativeError where the library cannot write it, or loads something else.
    """
    WRITERS[to](package, folder)
    _describe(package, folder, to)
    native = package.native
    large = sum(p.nbytes for p in native.module.parameters()) > LARGE
    if to in ("hf", "st") and large and _is_written(native, folder):
        return
    off = _differing(native, _loaded(native, folder))
    if off and package.tables:
        native = dataclasses.replace(native, tables=(*native.tables, *off))
        _describe(dataclasses.replace(package, native=native), folder, to)
        off = _differing(native, _loaded(native, folder))
    if off:
        raise NativeError(
            f"{package.kind} was written, but its library loads other values of "
            f"{', '.join(off[:3])}: the class fills them anew. Expected the same, bit for bit. "
            "Keep them beside the weights with tables=True (natives.loading.load_native puts them "
            "in place), save with to='class', or keep the slice as a graph."
        )


def _describe(package: Package, folder: Path, to: str) -> None:
    """Write what a folder says of itself, and the tables that its library would not keep."""
    original = package.source.files.get("README.md", b"").decode() if package.source else None
    (folder / MARK).write_text(json.dumps(_described(package, to), indent=1))
    if package.native.tables:
        _write_tables(package.native, folder)
    (folder / "README.md").write_text(card.card(_facts(package, to), original))


def _loaded(native: Native, folder: Path) -> Any:
    recipe = native.recipe
    try:
        return load(folder, build=lambda given: recipe.make({**recipe.tree, **given}))
    except NativeError:
        raise
    except Exception as error:
        raise NativeError(
            f"{type(native.module).__name__} was written, but its library does not load it again "
            f"({type(error).__name__}: {first_line(error)}). Expected every side "
            "file that it reads. Give source=FOLDER with them, or save with to='class'."
        ) from error


def _described(package: Package, to: str) -> dict[str, object]:
    native = package.native
    full, size = package.widths
    return {
        "format": FORMAT,
        "library": to,
        "class": f"{type(native.module).__module__}:{package.kind}",
        "size": size,
        "of": full,
        "changes": {k: list(v) for k, v in _changes(native).items()},
        "error": native.error,
        "tables": list(native.tables),
        "unread": list(native.unread),
        "keywords": dict(native.recipe.keywords),
        "versions": _versions(),
        **({"arguments": _arguments(native)} if to == "class" else {}),
    }


def _changes(native: Native) -> Mapping[str, tuple[Any, Any]]:
    return card.changes_of(native.changes, native.recipe.tree)


def _versions() -> dict[str, str]:
    names = ("matryoshkafy", "torch", "transformers", "sentence-transformers", "timm")
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _facts(package: Package, to: str) -> card.About:
    native = package.native
    notes: list[str] = []
    if native.tables:
        notes.append(
            f"The class makes {', '.join(native.tables)} from its own width, or anew as it loads; "
            f"the values of the full model are in `{TABLES}`. "
            "`matryoshkafy.natives.loading.load_native` puts them in place; the library's own "
            "loader does not."
        )
    if native.unread:
        notes.append(
            f"Not covered by the comparison: {', '.join(native.unread[:5])}"
            f"{' ...' if len(native.unread) > 5 else ''}."
        )
    full, _ = package.widths
    return card.About(
        to,
        package.kind,
        package.plan,
        full,
        package.parameters,
        _changes(native),
        native.error,
        tuple(notes),
        native.recipe.keywords,
    )


def _write_hf(package: Package, folder: Path) -> None:
    huggingface.write(package.native.module, folder, package.source, package.native.recipe.source)
    if package.dimensions:
        huggingface.mark(folder, package.dimensions)


def _write_st(package: Package, folder: Path) -> None:
    sentences.check(package.source)
    _write_hf(package, folder)
    sentences.resize(folder, package.widths)


def _write_timm(package: Package, folder: Path) -> None:
    native = package.native
    given = getattr(native.recipe.source, "_model_args", {})
    tree = native.recipe.tree
    new = changed(tree, native.changes)
    arguments = {**given, **timm_models.asked(new, tree)}
    save = library("timm.models").save_for_hf
    save(native.module, str(folder), model_args=arguments, safe_serialization=True)


def _write_open_clip(package: Package, folder: Path) -> None:
    native = package.native
    config = open_clip_models.config_of(native.module, changed(native.recipe.tree, native.changes))
    tensors = library("safetensors.torch")
    tensors.save_model(native.module, str(folder / "open_clip_model.safetensors"))
    given = getattr(native.recipe.source, "visual", None)
    pictures = getattr(given, "preprocess_cfg", None) or dataclasses.asdict(
        library("open_clip.transform").PreprocessCfg()
    )
    held = {"model_cfg": config, "preprocess_cfg": pictures}
    (folder / "open_clip_config.json").write_text(json.dumps(held, indent=2))


def _write_class(package: Package, folder: Path) -> None:
    library("safetensors.torch").save_model(package.native.module, str(folder / WEIGHTS))


def _arguments(native: Native) -> object:
    """The arguments as JSON; what no JSON holds and no size changes, the builder has itself."""
    new = changed(native.recipe.tree, native.changes)
    touched = {field[0] for field in native.changes}
    return as_json({key: v for key, v in new.items() if key in touched or is_json(v)})


WRITERS: Mapping[str, Callable[[Package, Path], None]] = {
    "hf": _write_hf,
    "st": _write_st,
    "timm": _write_timm,
    "open_clip": _write_open_clip,
    "class": _write_class,
}


def _write_tables(native: Native, folder: Path) -> None:
    held = tables_of(native.module) | tensors_of(native.module)
    once = {id(held[name]): name for name in native.tables}  # a tie is stored by one name
    tables = {name: held[name].detach().contiguous() for name in once.values()}
    library("safetensors.torch").save_file(tables, str(folder / TABLES))


def load(folder: str | Path, *, build: Build | None = None) -> Any:
    """Return the model of a folder, by its own library, tables in place.

    build: for "class", the function that makes the module from its dictionary of arguments.
    """
    path = Path(folder)
    described = json.loads((path / MARK).read_text())
    model = _READERS[described["library"]](path, described, build)
    if described["tables"]:
        _read_tables(sentences.encoder_of(model), path)
    return model.eval()


def _load_class(path: Path, described: Told, build: Build | None) -> nn.Module:
    if build is None:
        raise NativeError(
            f"{path} holds a {described['class']}, which no library makes; expected build, the "
            "class or function that makes it from its arguments. Give build=YOUR_CLASS."
        )
    model = build(from_json(described["arguments"]))
    library("safetensors.torch").load_model(model, str(path / WEIGHTS))
    return model


_READERS: Mapping[str, Callable[[Path, Told, Build | None], Any]] = {
    "hf": lambda path, told, build: huggingface.load(
        path, told["class"].rpartition(":")[2], told.get("keywords", {})
    ),
    "st": lambda path, told, build: sentences.load(path),
    "timm": lambda path, told, build: library("timm").create_model(
        f"local-dir:{path}", pretrained=True
    ),
    "open_clip": lambda path, told, build: library("open_clip").create_model(f"local-dir:{path}"),
    "class": _load_class,
}


def _read_tables(model: nn.Module, path: Path) -> None:
    held = tables_of(model) | tensors_of(model)
    for name, table in library("safetensors.torch").load_file(str(path / TABLES)).items():
        held[name].data.copy_(table)


def _is_written(native: Native, folder: Path) -> bool:
    """Compare the files of a large model one tensor at a time: a second model would not fit.

    Its configuration must say what it was built from. False where the library writes other names
    than its class has; then the model is loaded after all.
    """
    module: Any = native.module
    state = module.state_dict(keep_vars=True)
    with TensorFolder(folder) as held:
        if not set(held.names) <= state.keys():
            return False
        there = {id(state[name]) for name in held.names}
        off = [name for name in held.names if not torch.equal(held.read(name), state[name])]
        off += [name for name, tensor in state.items() if id(tensor) not in there]
    kind = cast("Foreign", type(module.config))
    tree = kind.from_pretrained(folder).to_dict()
    off += [named(field) for field, v in native.changes.items() if value_at(tree, field) != v]
    if off:
        raise NativeError(
            f"{type(module).__name__} was written, but its files hold other values: "
            f"{', '.join(off[:3])}. Keep the slice as a graph."
        )
    return True


def _differing(native: Native, loaded: object) -> list[str]:
    """Return the tensors of which the library does not load the values that were written.

    Raises NativeError where it makes another class.
    """
    written, found = native.module, sentences.encoder_of(loaded)
    if _class(found) != _class(written):
        raise NativeError(
            f"{type(written).__name__} was written, but its library makes a "
            f"{type(found).__name__} of it. Save with to='class', or keep the slice as a graph."
        )
    # Hidden buffers follow from the configuration; some classes fill them as they run.
    names = {*written.state_dict(), *native.tables}
    ours, theirs = (tables_of(m) | tensors_of(m) for m in (written, found))
    return sorted(n for n in names & ours.keys() if not _same(ours[n], theirs.get(n)))


def _class(module: nn.Module) -> tuple[str, str]:
    """By name: a builder may define its class anew at each call."""
    return type(module).__module__, type(module).__qualname__


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)
