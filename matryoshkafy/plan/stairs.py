"""stairs_of(): widths that are nested already, laid out as the units that each size adds.

The published fMRLRec (EMNLP Findings 2024) is such a model. A row of layers stands for one: layer i
reads the units of the first i + 1 pieces and writes those of its own piece, and what all of them
write is laid side by side.

    pieces      8          8             16
    layer 0   [ 8 x 8 ]
    layer 1   [ 8 x (8 + 8)    ]
    layer 2   [ 16 x (8 + 8 + 16)          ]

Such a width has sizes of its own: at a size that is a sum of its pieces the first of them stay
whole and the others go, instead of a share of each. A dense net is no such row: its layers read
what was there before them, and not what they write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from matryoshkafy.axes.dims import Dim, Nested, Sum, Widths
from matryoshkafy.sizes import width_at

Stair = tuple[int, ...]


def stairs_of(
    parameters: Mapping[str, tuple[Dim, ...]], values: Iterable[Dim]
) -> tuple[Stair, ...]:
    """Return the rows of pieces, each as its groups in order.

    Args:
        parameters: the solved dims of every parameter.
        values: the solved dims of every value of the graph.
    """
    weights = {
        (out[0], into)
        for shape in parameters.values()
        if len(shape) == 2
        for out, into in [tuple(map(_pieces, shape))]
        if len(out) == 1 and into
    }
    rows = list(dict.fromkeys(row for row in map(_pieces, values) if len(row) > 1))
    rows.sort(key=len, reverse=True)  # the first pieces of a row are a row as well
    found: list[Stair] = []
    for row in rows:
        # A group goes with one row: the longest that it stands in.
        taken = {group for stair in found for group in stair}
        if not taken & set(row) and any(_feeds(other, row, weights) for other in rows):
            found.append(row)
    return tuple(found)


def _feeds(source: Stair, row: Stair, weights: set[tuple[int, Stair]]) -> bool:
    """Tell whether each piece of a row has a weight that reads a source up to its own place."""
    steps = enumerate(row)
    return len(source) == len(row) and all((g, source[: i + 1]) in weights for i, g in steps)


def _pieces(dim: Dim) -> Stair:
    """Return the groups that a dim lays side by side, each whole and once; () where it does not."""
    parts = dim[0].segments if len(dim) == 1 and isinstance(dim[0], Sum) else (dim,)
    groups = [p[0].group for p in parts if len(p) == 1 and isinstance(p[0], Nested)]
    return tuple(groups) if len(set(groups)) == len(parts) else ()


def steps_taken(stair: Stair, full: Widths, size: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (group, units) of a row at a size: piece after piece, as far as the units go.

    Args:
        stair: the groups of the row.
        full: the units of every group.
        size: the size.
        width: the width of the model, of which the size is a part.
    """
    left = width_at(sum(full[g] for g in stair), size, width)
    for group in stair:
        yield group, min(left, full[group])
        left -= min(left, full[group])
