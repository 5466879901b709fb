"""A local folder of transformers or sentence-transformers: never pickle, no code unless trusted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from matryoshkafy.dolls.libraries import made_inputs
from matryoshkafy.errors import TraceError
from matryoshkafy_cli.loaded import RANDOM, Loaded
from matryoshkafy_cli.screen import CommandError


def from_folder(place: str | Path, *, trusted: bool = False) -> Loaded:
    """Return the model of a folder, in the class that its config names, and inputs for it.

    `trusted` runs the code that the folder brings with it.
    """
    folder = Path(place)
    _require("transformers", folder, "transformers")
    try:
        model = _build(folder, trusted=trusted)
    except READING as error:
        raise _unreadable(folder, "transformers", error) from error
    weights = str(folder) if any(folder.glob("*.safetensors")) else RANDOM
    return Loaded(model, *_made(model, folder), weights=weights)


READING = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def _require(module: str, folder: Path, library: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise CommandError(
            f"{folder} is a {library} folder, but {library} is not installed: "
            "pip install 'matryoshkafy[hf]'"
        )


def _unreadable(folder: Path, library: str, error: Exception) -> CommandError:
    if "trust_remote_code" in str(error):
        flag = "convert with --trust-remote-code, or " if library == "transformers" else ""
        return CommandError(
            f"{folder} names code of its own in config.json, which is not run. Expected a class of "
            f"the library itself. Where you trust that code, {flag}load the model in a Python file "
            "of yours and convert that: model.py."
        )
    return CommandError(
        f"{folder} cannot be loaded by {library}: {str(error).strip()[:400]}\nExpected a "
        "config.json of a known architecture and its weights as safetensors. Save the model "
        "again with save_pretrained."
    )


def _build(folder: Path, *, trusted: bool) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": trusted}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    name = (config.architectures or [""])[0]
    code = _own_code(config) if trusted else {}
    own = [auto for auto, where in code.items() if where.endswith(f".{name}")]
    maker: Any = getattr(transformers, own[0] if own else name, transformers.AutoModel)
    if any(folder.glob("*.safetensors")):
        model = maker.from_pretrained(folder, config=config, use_safetensors=True, **local)
    else:
        _refuse_pickle(folder)
        auto = name == "" or own
        model = maker.from_config(config, trust_remote_code=trusted) if auto else maker(config)
    return model


def _own_code(config: Any) -> dict[str, str]:
    """Return {class of transformers: file.Class} of the code that a folder brings with it."""
    return {
        k: v for k, v in (getattr(config, "auto_map", None) or {}).items() if isinstance(v, str)
    }


def _refuse_pickle(folder: Path) -> None:
    pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.rglob(s))
    if pickles:
        raise ValueError(f"{pickles[0]} is a pickle, which is not read")


def from_sentence_folder(folder: Path) -> Loaded:
    """Return the SentenceTransformer of a folder, pooling and normalisation among it."""
    _require("sentence_transformers", folder, "sentence-transformers")
    try:
        _refuse_pickle(folder)
        _refuse_foreign(folder)
        import sentence_transformers as st

        model = st.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False
        )
    except READING as error:
        raise _unreadable(folder, "sentence-transformers", error) from error
    return Loaded(model, *_made(model, folder), weights=str(folder))


def _refuse_foreign(folder: Path) -> None:
    """A folder names the classes of its modules; only those of the library itself are built."""
    for row in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        if not str(row["type"]).startswith("sentence_transformers."):
            raise ValueError(
                f"modules.json names the class {row['type']}, which is not of sentence_transformers"
            )


def _made(model: Any, folder: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return made_inputs(model)
    except TraceError as error:
        raise CommandError(f"{folder}: {error}") from error
