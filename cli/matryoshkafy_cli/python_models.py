"""Models out of Python code: a file, or a module that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from matryoshkafy_cli.loaded import Loaded
from matryoshkafy_cli.screen import CommandError

HERE = str(Path(__file__).parent)
INNER = re.compile("^<|/torch/|/importlib/")


def from_file(path: Path, name: str) -> Loaded:
    """Run a Python file and return its model and example_inputs."""
    if not path.is_file():
        raise CommandError(
            f"the model file {path} was given, but there is no such file; expected a Python file "
            "that defines model and example_inputs. Check the path."
        )
    return _loaded(_run(path), name, str(path))


def from_module(module: str, name: str) -> Loaded:
    """Import a module and return what its factory makes, and its example_inputs."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  the user's code may raise anything
        raise _import_error(module, error) from error
    return _loaded(found, name, module)


def _run(path: Path) -> ModuleType:
    name = f"_matryoshkafy_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code may raise anything
        raise _import_error(str(path), error) from error
    return module


def _import_error(what: str, error: BaseException) -> CommandError:
    return CommandError(
        f"{what} cannot be imported: {type(error).__name__}: {str(error)[:400]}{place_of(error)}\n"
        "Expected Python code that runs by itself and defines a model. Correct it, or install what "
        "it imports."
    )


def place_of(error: BaseException) -> str:
    """Return " at file:line" of the innermost frame outside torch and this package, or ""."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    kept = [f for f in frames if not INNER.search(f.filename) and not f.filename.startswith(HERE)]
    return f" at {kept[-1].filename}:{kept[-1].lineno}" if kept else ""


def _loaded(module: ModuleType, name: str, where: str) -> Loaded:
    made = _model(module, name, where)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{where}:{name} is a {type(model).__name__}; expected a torch.nn.Module, a function "
            "that returns one, or one that returns (module, example_inputs)."
        )
    inputs = _inputs(module, where) if inputs is None else inputs
    return Loaded(model, *_call(inputs, where))


def _model(module: ModuleType, name: str, where: str) -> Any:
    if not hasattr(module, name):
        names = [n for n, v in vars(module).items() if isinstance(v, nn.Module)]
        found = f"it has {', '.join(names)}: give {where}:{names[0]}" if names else "define one"
        raise CommandError(
            f"{where} defines no {name!r}; expected a torch.nn.Module of that name, or a function "
            f"that returns one; {found}."
        )
    made = getattr(module, name)
    if isinstance(made, nn.Module) or not callable(made):
        return made
    try:
        return made()
    except Exception as error:  # noqa: BLE001  the user's code may raise anything
        raise CommandError(
            f"{where}:{name}() fails: {type(error).__name__}: {str(error)[:400]}{place_of(error)}\n"
            "Expected a function without arguments that returns a torch.nn.Module. Correct it."
        ) from error


def _inputs(module: ModuleType, where: str) -> Any:
    if not hasattr(module, "example_inputs"):
        raise CommandError(
            f"{where} defines no example_inputs; expected a tensor, a tuple (positional), a "
            "dictionary (by name), or a function that returns one of them. Define them."
        )
    inputs = module.example_inputs
    if not callable(inputs) or isinstance(inputs, Tensor):
        return inputs
    try:
        return inputs()
    except Exception as error:  # noqa: BLE001  the user's code may raise anything
        raise CommandError(
            f"{where}:example_inputs() fails: {type(error).__name__}: {str(error)[:400]}"
            f"{place_of(error)}\nExpected a function without arguments. Correct it."
        ) from error


def _call(inputs: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise CommandError(
        f"the example_inputs of {where} are a {type(inputs).__name__}; expected a tensor, a tuple "
        "(positional), or a dictionary (by name). Change them."
    )
