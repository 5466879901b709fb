"""pack() and upgrade(): a checkpoint as one file per level, and a larger size out of a smaller."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx, nn

from matryoshkafy.dolls.cuts import take
from matryoshkafy.dolls.slice import parts_of, state_of
from matryoshkafy.files.checkpoint import (
    Checkpoint,
    open_checkpoint,
    parts_to_save,
    side_writers,
    write_checkpoint,
)
from matryoshkafy.files.levels import Place, layout_of, level_writers
from matryoshkafy.files.records import (
    CheckpointError,
    Record,
    aliases_of,
    info_of_tensor,
    sparse_parts,
)
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.held import is_reparametrised
from matryoshkafy.plan.plan import Plan


def pack(
    source: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    side: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model as one file per level, each with only what that level adds; return its path.

    `load(folder, size=m)` then reads the first files only, and needs no others to be there. The
    structural zeros of masked nesting are not stored: what training wrote there, which no size
    reads, is zero afterwards.

    Args:
        source: a doll, a sub-model, or the folder of one; a folder is read tensor by tensor.
        folder: where to write.
        force: replace an earlier checkpoint.
        side: further files that the checkpoint keeps; a folder's own stay.

    Raises:
        FolderError: where the folder is taken or cannot be written.
        CheckpointError: for weight-normalised weights, whose small sizes need the full weight.
    """
    if isinstance(source, nn.Module):
        return _pack_model(source, folder, force=force, side=side)
    with open_checkpoint(source) as found:
        if Path(os.path.realpath(folder)) == found.folder:
            raise CheckpointError(
                f"{folder} is the checkpoint that is to be packed; choose another folder for it."
            )
        return _pack_model(
            found.whole(), folder, force=force, side={**found.side(), **(side or {})}
        )


def _pack_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    force: bool,
    side: Mapping[str, bytes] | None = None,
) -> Path:
    _check_packable(*parts_of(model))
    parts, state = parts_to_save(model)
    _, _, plan, records = parts
    aliases = aliases_of(records, state)
    flat = dict(_flat(records, state, aliases))
    layout = layout_of(plan, {n: info_of_tensor(t) for n, t in flat.items()}, aliases)

    def read(name: str, place: Place | None) -> Tensor:
        return flat[name] if place is None else take(flat[name], place)

    writers = {**level_writers(layout, read), **side_writers(side or {})}
    return write_checkpoint(folder, parts, writers, layout.to_json(), force=force)


def _flat(
    records: list[Record], state: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> list[tuple[str, Tensor]]:
    """The dense tensors to store, by first name, and the parts of the sparse ones."""
    out: list[tuple[str, Tensor]] = []
    for record in records:
        if record.sparse:
            out += sparse_parts(record, state[record.name])
        elif record.name not in aliases:
            out.append((record.name, state[record.name]))
    return out


def _check_packable(trace: Trace, plan: Plan) -> None:
    for node in trace.graph.nodes:
        if node.name in plan.full and is_reparametrised(node):
            raise CheckpointError(
                f"{node.all_input_nodes[0].target} is weight-normalised: a small size needs the "
                "norm of the full weight, so that it cannot be stored apart. Remove the "
                "parametrisation (torch.nn.utils.parametrize.remove_parametrizations) and convert "
                "again."
            )


def upgrade(small: fx.GraphModule, folder: str | os.PathLike[str], size: float) -> fx.GraphModule:
    """Return a larger sub-model out of a smaller one, reading only what the levels between add.

    Args:
        small: a sub-model of the same checkpoint; its weights become part of the result.
        folder: a folder that `pack` wrote; the files up to the smaller size need not be there.
        size: a larger size.

    Raises:
        PlanError: for a size that the model has not.
        CheckpointError: where the sub-model is of another checkpoint, or not smaller.
        FolderError: for a folder that lacks a file, or is damaged.
    """
    _, plan = parts_of(small)
    first = plan.levels
    with open_checkpoint(folder, size=size, first=first) as found:
        level = found.plan.level(size)
        _check_same(found, plan, level, folder)
        return found.larger(level, first, state_of(small))


def _check_same(found: Checkpoint, plan: Plan, level: int, folder: object) -> None:
    if found.layout is None:
        raise CheckpointError(
            f"{folder} is not packed by level; pack it, or load the size from it."
        )
    if plan.levels > level:
        raise CheckpointError(
            f"a sub-model of size {plan.sizes[-1]} was given to have size "
            f"{found.plan.sizes[level]}; expected a larger size. Slice it instead."
        )
    if found.plan.up_to(plan.levels - 1) != plan:
        raise CheckpointError(
            f"the sub-model is not of the checkpoint {folder}: their plans differ. Load the size "
            "from the folder."
        )
