"""What the user calls a model on the command line, as a module with example inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from matryoshkafy.files.tensors import TensorFolder
from matryoshkafy.natives.source import Source, source_of
from matryoshkafy_cli.library_models import from_open_clip, from_timm
from matryoshkafy_cli.loaded import Loaded
from matryoshkafy_cli.python_models import from_file, from_module, place_of
from matryoshkafy_cli.screen import CommandError
from matryoshkafy_cli.transformers_models import from_folder, from_sentence_folder

FORMS = (
    "expected model.py, model.py:build, package.module:factory, a folder with config.json "
    "(transformers) or modules.json (sentence-transformers), timm:NAME or open_clip:NAME"
)


def load_model(spec: str, weights: Path | None = None, *, trusted: bool = False) -> Loaded:
    """Return the model of a spec in evaluation mode, after one forward pass on its inputs.

    `trusted` runs the code that a folder of transformers names in its config.json. Raises
    CommandError that says what was given, what was expected and what to do.
    """
    loaded = _trusted(spec) if trusted else _reader(spec)(spec)
    if weights is not None:
        _load_weights(loaded.model, weights)
        loaded = replace(loaded, weights=str(weights))
    loaded.model.eval()
    _try(loaded, spec)
    return loaded


def _trusted(spec: str) -> Loaded:
    if _reader(spec) is not from_folder:
        raise CommandError(
            f"--trust-remote-code was given for {spec}; expected it with a folder of transformers. "
            "Leave it out: a Python file or module is run anyway, no other model has code of its "
            "own."
        )
    return from_folder(spec, trusted=True)


def _reader(spec: str) -> Callable[[str], Loaded]:
    for matches, reader in READERS:
        if matches(spec):
            return reader
    raise CommandError(f"the model {spec!r} was given; {FORMS}. {_hint(spec)}")


def _hint(spec: str) -> str:
    if "/" in spec or Path(spec).exists():
        here = (
            "it exists, but has no config.json" if Path(spec).is_dir() else "there is no such file"
        )
        return f"{here[0].upper()}{here[1:]}: check the path."
    return "Check the spelling."


def _file(spec: str) -> Loaded:
    path, _, name = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "model")
    return from_file(Path(path), name)


READERS: tuple[tuple[Callable[[str], Any], Callable[[str], Loaded]], ...] = (
    (lambda spec: spec.startswith("timm:"), lambda spec: from_timm(spec.partition(":")[2])),
    (
        lambda spec: spec.startswith("open_clip:"),
        lambda spec: from_open_clip(spec.partition(":")[2]),
    ),
    (re.compile(r".+\.py(:\w+)?").fullmatch, _file),
    (
        lambda spec: (Path(spec) / "modules.json").is_file(),
        lambda spec: from_sentence_folder(Path(spec)),
    ),
    (lambda spec: (Path(spec) / "config.json").is_file(), from_folder),
    (
        re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*").fullmatch,
        lambda spec: from_module(*spec.split(":")),
    ),
)


def source_of_spec(spec: str) -> Any:
    """Return what a checkpoint keeps of a spec: a folder's configuration and side files, a name."""
    library, _, name = spec.partition(":")
    if library in ("timm", "open_clip") and name:
        return Source(library, name, {})
    if (Path(spec) / "config.json").is_file():
        return source_of(spec)
    return Source("class", spec, {})


def _load_weights(model: Any, path: Path) -> None:
    if not path.exists():
        raise CommandError(
            f"--weights {path} was given, but there is no such file; expected a .safetensors file, "
            "a sharded index or a folder of them. Check the path."
        )
    state = model.state_dict()
    with TensorFolder(path) as found, torch.no_grad():
        names = {*found.names, *found.aliases}
        _check_names(state, names, path)
        for name in names:
            _copy(state[name], found.read(name), name, path)


def _check_names(state: dict[str, Any], names: set[str], path: Path) -> None:
    filled = {state[name].data_ptr() for name in names & state.keys()}
    missing = [n for n, t in state.items() if n not in names and t.data_ptr() not in filled]
    unknown = sorted(names - state.keys())
    if missing or unknown:
        raise CommandError(
            f"--weights {path} does not fit the model: {_few('it lacks', missing)}"
            f"{_few('the model has no', unknown)}expected exactly the names of the model's "
            "state_dict. Give the weights of this very model."
        )


def _few(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; " if names else ""


def _copy(target: Any, tensor: Any, name: str, path: Path) -> None:
    if target.shape != tensor.shape:
        raise CommandError(
            f"--weights {path} holds {name} of shape {tuple(tensor.shape)}, the model expects "
            f"{tuple(target.shape)}. Give the weights of this very model."
        )
    target.copy_(tensor)


def _try(loaded: Loaded, spec: str) -> None:
    try:
        with torch.no_grad():
            loaded.model(*loaded.args, **loaded.kwargs)
    except Exception as error:  # noqa: BLE001  the user's forward may raise anything
        raise CommandError(
            f"the forward of {spec} fails on its example inputs ({describe(loaded)}): "
            f"{type(error).__name__}: {str(error).strip()[:400]}{place_of(error)}\n"
            f"Expected inputs that fit {signature_of(loaded.model)}. Correct the example inputs, "
            "or the model."
        ) from error


def describe(loaded: Loaded) -> str:
    """Return the shapes of example inputs as text."""
    named = [*map(_shown, loaded.args), *(f"{k}={_shown(v)}" for k, v in loaded.kwargs.items())]
    return ", ".join(named) or "none"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def signature_of(model: Any) -> str:
    """Return the signature of a model's forward as text."""
    names = list(inspect.signature(model.forward).parameters)
    return f"forward({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
