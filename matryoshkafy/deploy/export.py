"""export(): a sub-model as a file of another runtime, which needs neither this library nor source.

The nested operators that a sub-model still calls (norms and statistics by level, masks) are written
as plain ATen first; what comes out is checked against the sub-model before it is put in place.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from matryoshkafy.deploy.names import name_axes, output_names
from matryoshkafy.deploy.plain_ops import write_plainly
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.dolls.measure import tensor_error
from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.dolls.slice import slice as cut
from matryoshkafy.errors import MatryoshkafyError, first_line
from matryoshkafy.graph.paths import checks_of
from matryoshkafy.graph.signature import Signature
from matryoshkafy.graph.trace import attach, tensors_of
from matryoshkafy.kernels import ops as _ops
from matryoshkafy.rewrite.codegen import runnable
from matryoshkafy.rewrite.linears import as_functions

assert _ops

TOLERANCE = 1e-3
# Half precision and eight bits are what was asked for, not an error of the export.
TOLERANCES: Mapping[str, float] = {"onnx-fp16": 2e-2, "onnx-int8": 2e-1}
# protobuf's limit is 2 GiB for one file.
LARGEST_SINGLE = 1_800_000_000


class ExportError(MatryoshkafyError):
    """A sub-model that cannot be exported, or a file that does not compute the same."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file.
        to: its format.
        error: the worst relative error of its outputs against the sub-model's.
    """

    path: Path
    to: str
    error: float


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str = "onnx",
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
    force: bool = False,
) -> Exported:
    """Write a sub-model (of a doll: its full size) as a file, checked before it stands.

    The file takes the model's tensors by name and returns dictionaries for the output classes of
    libraries.

    Args:
        model: a sub-model, or a doll.
        path: the file to write.
        to: "onnx"; "onnx-fp16" (half precision inside, float32 inputs and outputs); "onnx-int8"
            (weights of products in eight bits); "pt2", which takes by keyword what `kwargs` gives.
        args: positional inputs to trace and check with; with neither these nor `kwargs`,
            `example_inputs(model)`.
        kwargs: inputs by name.
        force: replace a file that is there.

    Returns:
        The file, and how far its outputs are off.

    Raises:
        ExportError: a format or path that does not serve, a model that the format cannot hold, or
            a file whose outputs differ by more than 1e-3 (`TOLERANCES`).
    """
    target = check_file(path, to, force=force)
    small = _sub_model(model)
    given = example_inputs(small) if args is None and kwargs is None else (args or (), kwargs or {})
    trace, _ = parts_of(small)
    flat = trace.signature.flatten(*given)
    if checks_of(small.graph):
        _check_path(small, given, to)
    plain = plain_module(small).eval()
    with _beside(target) as folder, torch.no_grad():
        expected = _tensors(plain(*flat))
        named = _keywords(plain, given[1]) if to == "pt2" else ()
        found = FORMATS[to](_program(plain, flat, named), flat, folder / target.name)
        error = _error(expected, found)
        most = TOLERANCES.get(to, TOLERANCE)
        if not error <= most:
            raise ExportError(
                f"the {to} file computes other values than the sub-model (relative error "
                f"{error:.2g}, at most {most} expected), so it was not kept. Export to "
                f"{' or '.join(name for name in FORMATS if name != to)} instead."
            )
        _place(folder, target)
    return Exported(target, to, error)


def _sub_model(model: nn.Module) -> fx.GraphModule:
    if isinstance(model, Doll):
        return cut(model, model.sizes[-1])
    parts_of(model)
    assert isinstance(model, fx.GraphModule)
    return model


def check_file(path: str | os.PathLike[str], to: str, *, force: bool = False) -> Path:
    """Return the file to write; raises ExportError now where `export` would later."""
    if to not in FORMATS:
        raise ExportError(f"to={to!r} was given; expected one of {', '.join(FORMATS)}")
    return _free(Path(path), force)


def _check_path(
    small: nn.Module, given: tuple[Sequence[object], Mapping[str, object]], to: str
) -> None:
    """Refuse a format that cannot check a recorded path, and inputs of another path."""
    if to != "pt2":
        raise ExportError(
            "the forward was recorded along the path of its example inputs, and an ONNX file "
            "cannot check that a call takes it; export to pt2 instead, or convert a forward of "
            "one path (torch.where, masks)"
        )
    with torch.no_grad():
        small(*given[0], **given[1])


def plain_module(model: fx.GraphModule) -> fx.GraphModule:
    """Return a sub-model over ATen alone: flat tensor arguments, plain dictionaries and tuples."""
    trace, _ = parts_of(model)
    root = _copy_of(model)
    graph = fx.Graph()
    flat = graph.graph_copy(model.graph, {})
    as_functions(graph, model)
    for node in list(graph.nodes):
        if node.op == "call_function":
            write_plainly(root, node)
    graph.output(_structured(flat, trace.signature))
    graph.eliminate_dead_code()
    return runnable(root, graph)


def _copy_of(model: nn.Module) -> nn.Module:
    """The same tensors in containers of our own, to which masks may be added."""
    root = nn.Module()
    for name, tensor in tensors_of(model).items():
        attach(root, name, tensor)
    return root.eval()


def _structured(flat: object, signature: Signature) -> Argument:
    leaves = iter(cast("Sequence[Argument]", flat))
    return _built(signature.out_spec, leaves)


def _built(spec: pytree.TreeSpec, leaves: Iterator[Argument]) -> Argument:
    if spec.is_leaf():
        return next(leaves)
    children = [_built(child, leaves) for child in spec.children()]
    keys = _keys(spec.context)
    if len(keys) == len(children) > 0:
        return {str(key): child for key, child in zip(keys, children, strict=True)}
    return tuple(children)


def _keys(context: object) -> list[object]:
    """The keys of a mapping's parts; a default dict says its factory before them."""
    if not isinstance(context, list):
        return []
    keys = cast("list[object]", context)
    return _keys(keys[1]) if len(keys) == 2 and _is_list(keys[1]) else keys


def _is_list(value: object) -> bool:
    return isinstance(value, list)


# --- formats ------------------------------------------------------------------------------------


def _keywords(plain: fx.GraphModule, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the last inputs that are taken by keyword; none where their names are not the call's.

    A keyword that holds several tensors, or none, has no input of its own name.
    """
    given = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    inputs = [str(n.target) for n in plain.graph.find_nodes(op="placeholder")]
    last = inputs[len(inputs) - len(given) :]
    return tuple(last) if set(last) == set(given) else ()


def _program(
    plain: fx.GraphModule, flat: list[Tensor], named: tuple[str, ...] = ()
) -> ExportedProgram:
    """Export with dynamic sizes where they work, else with those of the inputs.

    named: the last inputs, which are taken by keyword.
    """
    dynamic = [{d: torch.export.Dim.AUTO for d in range(min(2, t.dim()))} for t in flat]
    count = len(flat) - len(named)
    args, kwargs = tuple(flat[:count]), dict(zip(named, flat[count:], strict=True))
    names = [str(n.target) for n in plain.graph.find_nodes(op="placeholder")]
    error: Exception | None = None
    for shapes in (dict(zip(names, dynamic, strict=True)), None):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(plain, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as raised:  # noqa: BLE001  torch.export raises errors of every kind
            error = raised
    raise ExportError(f"torch.export refuses this sub-model: {first_line(error)}") from error


def _write_pt2(program: ExportedProgram, flat: list[Tensor], path: Path) -> list[Tensor]:
    torch.export.save(program, path)
    inputs = cast("tuple[tuple[Tensor, ...], dict[str, Tensor]]", program.example_inputs)
    args, kwargs = inputs
    return _tensors(torch.export.load(path).module()(*args, **kwargs))


def _write_onnx(program: ExportedProgram, flat: list[Tensor], path: Path) -> list[Tensor]:
    _need("onnx", "onnxscript", "onnxruntime")
    names = [spec.arg.name for spec in program.graph_signature.input_specs][-len(flat) :]
    held = sum(t.nbytes for t in program.state_dict.values())
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        write = cast(Any, torch.onnx.export)  # pyright: ignore[reportUnknownMemberType]
        write(
            program,
            (),
            path,
            dynamo=True,
            input_names=names,
            output_names=output_names(program.call_spec.out_spec or pytree.treespec_leaf()),
            external_data=held > LARGEST_SINGLE,
            verbose=False,
        )
    name_axes(path)
    return _run_onnx(path, flat)


def _write_half(program: Any, flat: list[Tensor], path: Path) -> list[Tensor]:
    _write_onnx(program, flat, path)
    import onnx
    from onnxruntime.transformers import float16  # pyright: ignore[reportMissingTypeStubs]

    halve = cast("Callable[..., onnx.ModelProto]", float16.convert_float_to_float16)  # pyright: ignore[reportUnknownMemberType]
    half = halve(onnx.load(path), keep_io_types=True)  # pyright: ignore[reportUnknownMemberType]
    _forget(path)
    held = sum(t.nbytes for t in program.state_dict.values()) / 2
    save = cast("Callable[..., None]", onnx.save)  # pyright: ignore[reportUnknownMemberType]
    save(half, path, save_as_external_data=held > LARGEST_SINGLE)
    return _run_onnx(path, flat)


def _write_int8(program: Any, flat: list[Tensor], path: Path) -> list[Tensor]:
    _write_onnx(program, flat, path)
    from onnxruntime import quantization  # pyright: ignore[reportMissingTypeStubs]

    quantize = cast("Callable[..., None]", quantization.quantize_dynamic)  # pyright: ignore[reportUnknownMemberType]
    kind = quantization.QuantType.QInt8
    held = sum(t.nbytes for t in program.state_dict.values()) / 4
    exact = path.with_name(f"exact.{path.name}")
    os.replace(path, exact)
    quantize(exact, path, weight_type=kind, use_external_data_format=held > LARGEST_SINGLE)
    _forget(exact)
    return _run_onnx(path, flat)


def _forget(path: Path) -> None:
    """Remove a file and the weights that stand beside it."""
    for held in (path, path.with_name(f"{path.name}.data")):
        held.unlink(missing_ok=True)


def _run_onnx(path: Path, flat: list[Tensor]) -> list[Tensor]:
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    start: Any = onnxruntime.InferenceSession
    session = start(path, providers=["CPUExecutionProvider"])
    read = [str(item.name) for item in session.get_inputs()]
    fed = dict(zip(read, (t.cpu().numpy() for t in flat), strict=True))
    return [torch.as_tensor(value) for value in session.run(None, fed)]


FORMATS: Mapping[str, Callable[[ExportedProgram, list[Tensor], Path], list[Tensor]]] = {
    "onnx": _write_onnx,
    "onnx-fp16": _write_half,
    "onnx-int8": _write_int8,
    "pt2": _write_pt2,
}


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"export to onnx needs {', '.join(missing)}, which is not installed: "
            "pip install 'matryoshkafy[export]'"
        )


# --- checking and placing -----------------------------------------------------------------------


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    """The worst difference of an output relative to its largest value; inf where shapes differ."""
    if len(expected) != len(found):
        return float("inf")
    pairs = ([t.cpu().double() for t in pair] for pair in zip(found, expected, strict=True))
    return max((tensor_error(a, b, 1e-6) for a, b in pairs), default=0.0)


def _free(target: Path, force: bool) -> Path:
    if target.is_dir():
        raise ExportError(f"{target} is a folder, expected the name of a file to write.")
    if target.exists() and not force:
        raise ExportError(
            f"{target} exists. Choose another name, or replace it with force (--force)."
        )
    return target


@contextmanager
def _beside(target: Path) -> Generator[Path, None, None]:
    """A hidden folder beside the file, so that what is moved into place is whole."""
    fresh = target.parent / f".{target.name}.{secrets.token_hex(6)}.new"
    try:
        fresh.mkdir(parents=True)
        yield fresh
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror or error}. Choose a folder that you may "
            "write to."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _place(folder: Path, target: Path) -> None:
    written = sorted(folder.iterdir(), key=lambda path: path.name == target.name)
    for path in written:
        os.replace(path, target.parent / path.name)
