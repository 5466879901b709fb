"""Namespaces of torch.ops beyond torch's own that graphs call, and which a file may name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.graph_json import NAMESPACES
from matryoshkafy.files.json_text import shown

# What must be imported for a namespace of a well known library to exist.
KNOWN: Mapping[str, str] = {"transformers": "transformers.integrations.moe"}
# torch's own namespaces with operators that do more than compute: never out of a file.
REFUSED = {
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_native", "_native_aot",
    "_quantized", "_test", "c10d", "coor", "cuda", "debug_mode_ops", "debugprims", "export",
    "flex_gemm", "fsdp", "higher_order", "inductor", "inductor_prims", "mkl", "mkldnn",
    "mkldnn_prepacked", "onednn", "prepacked", "profiler", "quantization", "quantized", "rngprims",
    "sparse", "static_runtime", "streams", "symm_mem", "tensorexpr", "triton", "vulkan_prepack",
    "xnnpack",
}  # fmt: skip


class OperatorError(MatryoshkafyError):
    """A saved graph calls operators of a library that is not there or not trusted."""


def namespaces_of(graph: fx.Graph) -> tuple[str, ...]:
    """Return the namespaces of the operators that a graph calls, without those always allowed."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    names = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
    return tuple(sorted(names - set(NAMESPACES)))


def allowed(names: Iterable[object], what: str) -> tuple[str, ...]:
    """Return the namespaces that a checkpoint names, where each is registered in this process.

    what: how an error calls the checkpoint. Raises OperatorError for the others. Nothing is
    imported by a name that the file chose, except the known libraries.
    """
    return tuple(_allowed(name, what) for name in names)


def _allowed(name: object, what: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name in REFUSED:
        raise OperatorError(
            f"{what} calls operators of {shown(name)}, which a saved graph may not call. Save the "
            "model again from a source that you trust."
        )
    if name in KNOWN and importlib.util.find_spec(KNOWN[name].partition(".")[0]):
        importlib.import_module(KNOWN[name])
    if not _registered(name):
        library = f"install {name}" if name in KNOWN else "import the module that registers them"
        raise OperatorError(
            f"{what} calls operators of torch.ops.{name}, which is not registered in this process: "
            f"{library} before loading (on the command line: --import MODULE)."
        )
    return name


def _registered(name: str) -> bool:
    return any(op.startswith(f"{name}::") for op in torch._C._dispatch_get_all_op_names())
