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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from matryoshkafy.doll import Doll
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.examples import example_inputs
from matryoshkafy.kernels import ops as _ops
from matryoshkafy.kernels.levels import levels_of
from matryoshkafy.kernels.reductions import level_reduce, reduction
from matryoshkafy.slicing import parts_of
from matryoshkafy.slicing import slice as cut
from matryoshkafy.tracing import Signature, attach

nested = torch.ops.matryoshkafy
assert _ops

# The dims of a statistic, the one that nests, its runs, and whether a prefix is taken.
Place = tuple[list[int], int, list[int], bool]
TOLERANCE = 1e-3
# protobuf's limit is 2 GiB for one file.
LARGEST_SINGLE = 1_800_000_000


class ExportError(MatryoshkafyError):
    """A sub-model that cannot be exported, or a file that does not compute the same."""


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its format, the worst relative error against the sub-model."""

    path: Path
    to: str
    error: float


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str = "onnx",
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Exported:
    """Write a sub-model (of a doll: its full size) as "onnx" or "pt2", checked before it stands.

    args, kwargs: inputs to trace and check with; without them, `example_inputs(model)`. The file
    takes the model's tensors by name and returns dictionaries for the output classes of libraries.
    Raises ExportError, also where the file's outputs differ by more than 1e-3.
    """
    target = check_target(path, to, force=force)
    small = _sub_model(model)
    given = example_inputs(small) if args is None and kwargs is None else (args or (), kwargs or {})
    trace, _ = parts_of(small)
    flat = trace.signature.flatten(*given)
    plain = plain_module(small).eval()
    with _beside(target) as folder, torch.no_grad():
        expected = _tensors(plain(*flat))
        found = FORMATS[to](_program(plain, flat), flat, folder / target.name)
        error = _error(expected, found)
        if not error <= TOLERANCE:
            raise ExportError(
                f"the {to} file computes other values than the sub-model (relative error "
                f"{error:.2g}, at most {TOLERANCE} expected), so it was not kept. Export to "
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


def check_target(path: str | os.PathLike[str], to: str, *, force: bool = False) -> Path:
    """Return the file to write; raises ExportError now where `export` would later."""
    if to not in FORMATS:
        raise ExportError(f"to={to!r} was given; expected one of {', '.join(FORMATS)}")
    return _free(Path(path), force)


def plain_module(model: fx.GraphModule) -> fx.GraphModule:
    """Return a sub-model over ATen alone: flat tensor arguments, plain dictionaries and tuples."""
    trace, _ = parts_of(model)
    root = _copy_of(model)
    graph = fx.Graph()
    flat = graph.graph_copy(model.graph, {})
    for node in list(graph.nodes):
        if node.op == "call_function":
            _write_plainly(root, node)
    graph.output(_structured(flat, trace.signature))
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph)


def _copy_of(model: nn.Module) -> nn.Module:
    """The same tensors in containers of our own, to which masks may be added."""
    root = nn.Module()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        attach(root, name, tensor)
    for name, tensor in model.named_buffers(remove_duplicate=False):
        attach(root, name, tensor)
    return root.eval()


def _structured(flat: Any, signature: Signature) -> Any:
    leaves = iter(flat)
    return _built(signature.out_spec, leaves)


def _built(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    if spec.is_leaf():
        return next(leaves)
    children = [_built(child, leaves) for child in spec.children()]
    keys = spec.context
    if isinstance(keys, list) and len(keys) == 2 and isinstance(keys[1], list):
        keys = keys[1]
    if isinstance(keys, list) and len(keys) == len(children):
        return {str(key): child for key, child in zip(keys, children, strict=True)}
    return tuple(children)


# --- nested operators as plain ones -------------------------------------------------------------


def _moments(x: Tensor, place: Place, *, centred: bool) -> tuple[Any, Tensor]:
    """Mean (0 where not centred) and mean square deviation of each unit's level."""
    dims, dim, runs, prefix = place
    if not centred:
        return 0, reduce_levels(x.square(), dims, dim, runs, "mean", prefix)
    mean = reduce_levels(x, dims, dim, runs, "mean", prefix)
    return mean, reduce_levels(x, dims, dim, runs, "var0", prefix)


def _normalised(x: Tensor, place: Place, eps: float, *, centred: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    mean, square = _moments(wide, place, centred=centred)
    return (wide - mean) * torch.rsqrt(square + eps)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def layer_norm(
    x: Tensor, weight: Any, bias: Any, eps: float, runs: list[int], prefix: bool
) -> Tensor:
    """matryoshkafy::layer_norm in plain ATen."""
    if _single(runs):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = _normalised(x, ([-1], -1, runs, prefix), eps, centred=True)
    return _affine(y, weight, bias, [-1]).to(x.dtype)


def rms_norm(x: Tensor, weight: Any, eps: float, runs: list[int], prefix: bool) -> Tensor:
    """matryoshkafy::rms_norm in plain ATen."""
    y = _normalised(x, ([-1], -1, runs, prefix), eps, centred=False)
    return _affine(y, weight, None, [-1]).to(x.dtype)


def group_norm(
    x: Tensor, weight: Any, bias: Any, eps: float, runs: list[int], prefix: bool
) -> Tensor:
    """matryoshkafy::group_norm in plain ATen."""
    y = _normalised(x, (list(range(1, x.ndim)), 1, runs, prefix), eps, centred=True)
    return _affine(y, weight, bias, [-1] + [1] * (x.ndim - 2)).to(x.dtype)


def reduce_levels(  # noqa: PLR0913  the operator's schema
    x: Tensor, over: list[int], dim: int, runs: list[int], kind: str, prefix: bool
) -> Tensor:
    """matryoshkafy::level_reduce in plain ATen."""
    reduce, dims = reduction(kind), [d % x.ndim for d in over]
    return level_reduce(
        x, lambda part: reduce(part, dims), dim % x.ndim, tuple(runs), prefix=prefix
    )


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """matryoshkafy::linear in plain ATen; keep [out, in] instead of the runs."""
    return F.linear(x, masked_weight(weight, 0, 1, keep), bias)


def masked_conv(x: Tensor, weight: Tensor, bias: Any, keep: Tensor, *geometry: Any) -> Tensor:
    """matryoshkafy::conv in plain ATen; keep [out, in] within a group instead of the runs."""
    *_, transposed, _, groups = geometry
    turned = (keep.t() if transposed else keep).repeat(groups, 1)
    return torch.convolution(x, masked_weight(weight, 0, 1, turned), bias, *geometry)


def masked_weight(weight: Tensor, out: int, into: int, keep: Tensor) -> Tensor:
    """matryoshkafy::mask in plain ATen; keep [out, in] instead of the runs."""
    out, into = out % weight.ndim, into % weight.ndim
    shape = [n if dim in (out, into) else 1 for dim, n in enumerate(weight.shape)]
    turned = (keep if out < into else keep.t()).reshape(shape)
    return torch.where(turned, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _single(runs: list[int]) -> bool:
    return len({level for count, level in zip(runs[::2], runs[1::2], strict=True) if count}) <= 1


def _write_keep(root: nn.Module, node: fx.Node) -> list[Any]:
    """Replace the runs at the end of the arguments by the matrix of kept entries, a buffer."""
    *rest, out_runs, in_runs = node.args
    out, into = (torch.tensor(levels_of(tuple(r))) for r in (out_runs, in_runs))  # type: ignore
    name = f"keep_{node.name}"
    root.register_buffer(name, out[:, None] >= into[None, :], persistent=False)
    with node.graph.inserting_before(node), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*rest, node.graph.get_attr(name)]


def _last(values: list[Any]) -> list[Any]:
    return values


def _fourth(values: list[Any]) -> list[Any]:
    *rest, keep = values
    return [*rest[:3], keep, *rest[3:]]


MASKED: Mapping[Any, tuple[Callable[..., Tensor], Callable[[list[Any]], list[Any]]]] = {
    nested.linear.default: (masked_linear, _last),
    nested.conv.default: (masked_conv, _fourth),
    nested.mask.default: (masked_weight, _last),
}
PLAIN: Mapping[Any, Callable[..., Tensor]] = {
    nested.layer_norm.default: layer_norm,
    nested.rms_norm.default: rms_norm,
    nested.group_norm.default: group_norm,
    nested.level_reduce.default: reduce_levels,
}


def _write_plainly(root: nn.Module, node: fx.Node) -> None:
    if node.target in MASKED:
        function, order = MASKED[node.target]
        node.args = tuple(order(_write_keep(root, node)))
        node.target = function
    elif node.target in PLAIN:
        node.target = PLAIN[node.target]


# --- formats ------------------------------------------------------------------------------------


def _program(plain: fx.GraphModule, flat: list[Tensor]) -> torch.export.ExportedProgram:
    """Export with dynamic sizes where they work, else with those of the inputs."""
    dynamic = tuple({d: torch.export.Dim.AUTO for d in range(min(2, t.dim()))} for t in flat)
    error: Exception | None = None
    for shapes in (dynamic, None):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(plain, tuple(flat), dynamic_shapes=shapes, strict=False)
        except Exception as raised:  # noqa: BLE001  torch.export raises errors of every kind
            error = raised
    raise ExportError(f"torch.export refuses this sub-model: {_first_line(error)}") from error


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0][:300]


def _write_pt2(program: Any, flat: list[Tensor], path: Path) -> list[Tensor]:
    torch.export.save(program, path)
    return _tensors(torch.export.load(path).module()(*flat))


def _write_onnx(program: Any, flat: list[Tensor], path: Path) -> list[Tensor]:
    _need("onnx", "onnxscript", "onnxruntime")
    names = [spec.arg.name for spec in program.graph_signature.input_specs][-len(flat) :]
    held = sum(t.nbytes for t in program.state_dict.values())
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            input_names=names,
            external_data=held > LARGEST_SINGLE,
            verbose=False,
        )
    return _run_onnx(path, flat)


def _run_onnx(path: Path, flat: list[Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    read = [item.name for item in session.get_inputs()]
    fed = dict(zip(read, (t.cpu().numpy() for t in flat), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, fed)]


FORMATS: Mapping[str, Callable[[Any, list[Tensor], Path], list[Tensor]]] = {
    "onnx": _write_onnx,
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


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    """The worst difference of an output relative to its largest value; inf where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    return max((_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)


def _difference(expected: Tensor, found: Tensor) -> float:
    if not expected.numel():
        return 0.0
    a, b = expected.cpu().to(torch.float64), found.cpu().to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, torch.zeros_like(a), (a - b).abs())
    scale = a[a.isfinite()].abs().amax() if a.isfinite().any() else a.new_tensor(1.0)
    return float(apart.amax() / scale.clamp_min(1e-6))


def _free(target: Path, force: bool) -> Path:
    if target.is_dir():
        raise ExportError(f"{target} is a folder, expected the name of a file to write.")
    if target.exists() and not force:
        raise ExportError(
            f"{target} exists. Choose another name, or replace it with force (--force)."
        )
    return target


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
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
