"""A call signature (structures, constants, ranges of example inputs) as JSON, and back."""

from __future__ import annotations

from typing import Any

import torch

from matryoshkafy.files.json_text import JsonError, escaped, is_list, is_object, shown
from matryoshkafy.files.tree_json import spec_from_json, spec_to_json
from matryoshkafy.files.values_json import MAX_TEXT, Values
from matryoshkafy.graph.guards import Guards
from matryoshkafy.graph.signature import Filled, Input, Signature

PLACE = "the call signature"
FILLED_TYPES = {str(t): t for t in (torch.int64, torch.int32, torch.bool, torch.float32)}


def signature_to_json(signature: Signature) -> dict[str, object]:
    """Return a signature as JSON values; raises JsonError, with the argument, for other values."""
    return {
        "positional": list(signature.positional),
        "inputs": [_input_to_json(item) for item in signature.inputs],
        "output": spec_to_json(signature.out_spec),
        "guards": signature.guards.to_dict(),
        "filled": [[f.name, f.like, f.value, str(f.dtype)] for f in signature.filled],
    }


def signature_from_json(saved: object) -> Signature:
    """Return the signature that signature_to_json wrote; raises JsonError for anything else."""
    if not is_object(saved) or not is_list(saved.get("inputs")):
        raise JsonError(f"{PLACE} is {shown(saved)}, expected an object with inputs: damaged.")
    positional = saved.get("positional")
    if not is_list(positional) or not all(map(_is_text, positional)):
        raise JsonError(f"{PLACE} has no list of argument names; the file is damaged.")
    inputs = tuple(_input_from_json(item) for item in saved["inputs"])
    # Files of format 1 that were written before there were guards say nothing of them.
    guards = Guards.from_dict(escaped(saved["guards"])) if "guards" in saved else Guards()
    filled = tuple(map(_filled_from_json, saved.get("filled", [])))
    return Signature(tuple(positional), inputs, spec_from_json(saved.get("output")), guards, filled)


def _filled_from_json(saved: object) -> Filled:
    if not is_list(saved) or len(saved) != 4 or not all(map(_is_text, saved[:2])):
        raise JsonError(f"{PLACE} fills an input by {shown(saved)}; the file is damaged.")
    if type(saved[2]) is not int or saved[3] not in FILLED_TYPES:
        raise JsonError(f"{PLACE} fills an input by {shown(saved)}; the file is damaged.")
    return Filled(saved[0], saved[1], saved[2], FILLED_TYPES[saved[3]])


def _input_to_json(item: Input) -> dict[str, object]:
    values = Values(f"the example input {item.name!r}", {})
    known = item.bounds or (None,) * len(item.leaves)
    bounds = [None if b is None else [values.write(n) for n in b] for b in known]
    return {
        "name": item.name,
        "spec": spec_to_json(item.spec),
        "leaves": [values.write(leaf) for leaf in item.leaves],
        "is_tensor": list(item.is_tensor),
        "bounds": bounds,
        "optional": item.optional,
    }


def _input_from_json(saved: object) -> Input:
    if not is_object(saved) or not _is_text(saved.get("name")):
        raise JsonError(f"{PLACE} has the input {shown(saved)}, which has no name: damaged.")
    values = Values(f"the input {shown(saved['name'])}", {})
    spec = spec_from_json(saved.get("spec"))
    keys = ("is_tensor", "leaves", "bounds")
    flags, leaves, bounds = (_listed(saved.get(key), spec.num_leaves, values) for key in keys)
    if not all(type(flag) is bool for flag in flags):
        raise JsonError(f"{values.place} has the flags {shown(flags)}, expected true or false.")
    # Files that were written before it was asked say nothing of it.
    optional = saved.get("optional", True)
    if type(optional) is not bool:
        raise JsonError(f"{values.place} is optional: {shown(optional)}, expected true or false.")
    read, ranges = map(values.read, leaves), (_bounds(b, values) for b in bounds)
    return Input(saved["name"], spec, tuple(read), tuple(flags), tuple(ranges), optional)


def _listed(saved: object, count: int, values: Values) -> list[Any]:
    if is_list(saved) and len(saved) == count:
        return saved
    raise JsonError(
        f"{values.place} has {count} leaves, but {shown(saved)} about them; the file is damaged."
    )


def _bounds(saved: object, values: Values) -> tuple[float, float] | None:
    if saved is None:
        return None
    read = values.read(saved)
    sound = is_list(read) and len(read) == 2 and all(type(n) in (int, float) for n in read)
    if not is_list(read) or not sound or not read[0] <= read[1]:
        raise JsonError(f"{values.place} has the range {shown(saved)}, expected [least, most].")
    return read[0], read[1]


def _is_text(value: object) -> bool:
    # Errors of a call show the names of its inputs.
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()
