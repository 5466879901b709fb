"""What inputs, outputs and dimensions of a file are called: as the user's forward calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

AXES = ("batch", "sequence")


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """Return a name for every output: the keys that lead to it, "output" where there are none."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [_name(path) for path in paths]


def _name(path: tuple[object, ...]) -> str:
    words = [str(getattr(part, "key", getattr(part, "idx", part))) for part in path]
    named = any(isinstance(part, pytree.MappingKey) for part in path)
    return "_".join(words if named else ["output", *words])


def name_axes(path: Path) -> None:
    """Call the free dimensions of an ONNX file batch and sequence instead of numbered symbols.

    The first free dimension of an input is its batch, the second its sequence; what stands before
    that sequence in another input (a mask that is read by index) is the batch, too. A symbol that
    names neither keeps its own name.
    """
    import onnx

    files: Any = onnx
    model = files.load(str(path), load_external_data=False)
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, dim in zip(AXES, value.type.tensor_type.shape.dim, strict=False):
            if dim.dim_param and dim.dim_param not in names and axis not in names.values():
                names[dim.dim_param] = axis
    for value in model.graph.input:
        first, *rest = [dim.dim_param for dim in value.type.tensor_type.shape.dim] or [""]
        if first and names.get(rest[0] if rest else "") == "sequence":
            names.setdefault(first, "batch")
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    files.save(model, str(path))
