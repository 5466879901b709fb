"""Cross entropy at all sizes for the price of one, with its gradient, in bounded memory.

With E the table and block j the units that size j adds,

    logits_j = logits_{j-1} + x[:, block j] E[:, block j]^T,

so the logits of all sizes cost one full-size product. A unit of block j enters every size i >= j,
so the gradients of x[:, block j] and E[:, block j] need only the suffix sum over i >= j of
w_i (softmax(logits_i) - onehot): again one full-size product each. Scores may be multiplied by a
scale s_i of each size: then softmax(s_i logits_i), and w_i s_i in the sum. All is computed in the
forward, over chunks of rows (and tiles of classes, where one row is too long), so that nothing of
sizes x rows x classes is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from matryoshkafy.kernels.cross_entropy_problem import Chunk, Gradients, LossOptions, Problem
from matryoshkafy.kernels.norms import accumulation_dtype
from matryoshkafy.kernels.tiling import Range, span_of
from matryoshkafy.kernels.untyped import vecdot

# Bytes of working memory; a GPU needs longer chunks to be busy.
BUDGET = {"cpu": 56_000_000, "cuda": 512_000_000}
# A chunk passes over its scratch a dozen times, so on a CPU it should stay near the core; but each
# chunk passes over the table and its gradient, too, so it has at least as many rows as units.
NEAR = {"cpu": 14_000_000}
# Below so many rows a chunk's products are memory-bound: tile the classes and do the logits twice.
FEWEST_ROWS = 24
TILED_ROWS = 384
# A tall product with 8 columns takes MKL six times as long as one with 16.
NARROW = 16
TINY = 1e-30


def evaluate(
    problem: Problem,
    options: LossOptions,
    *,
    scale: float | Tensor = 1.0,
    needs: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, Gradients]:
    """Losses [sizes, N] (0 where ignored) and the gradients of sum(weights * losses * scale).

    scale is a number or one number per row [N].
    """
    dtype = accumulation_dtype(problem.hidden.dtype)
    grads = allocate(problem, needs, dtype, sizes=len(options.widths))
    kept, recorded = problem.target != options.ignore_index, is_recorded(problem.hidden)
    if recorded:
        # The rows that count cannot be asked for: all are computed, the others times 0.
        real, scale = torch.arange(len(kept), device=kept.device), kept * scale
        problem = replace(problem, target=problem.target * kept)
    else:
        real = torch.nonzero(kept).squeeze(1)
    losses = problem.hidden.new_zeros(len(options.widths), len(problem.target), dtype=dtype)
    tiles, rows = layout(problem, options, len(real), needed=grads.needed)
    scratch = allocate_scratch(problem, options, rows, tiles, needed=grads.needed)
    for index in torch.split(real, rows) if len(real) else ():
        chunk = _take(problem, index, scale, scratch, sizes=len(options.widths))
        losses[:, index] = one_chunk(chunk, problem, options, tiles=tiles, grads=grads)
        if grads.scales is not None:
            grads.scales.add_((chunk.moments * chunk.scale).sum(1))
        if grads.hidden is not None:
            dx = chunk.dx.mul_(chunk.column_scale).to(grads.hidden.dtype)
            grads.hidden.index_copy_(0, index, dx)
    losses = losses * kept if recorded else losses
    return losses, cast_back(grads, problem, options)


def is_recorded(tensor: Tensor) -> bool:
    """Whether what is computed of a tensor now is being recorded as a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def allocate(
    problem: Problem, needs: tuple[bool, ...], dtype: torch.dtype, *, sizes: int
) -> Gradients:
    """Zeros for the gradients that are needed; sums over rows are kept in dtype."""
    hidden = torch.zeros_like(problem.hidden) if needs[0] else None
    table = torch.zeros_like(problem.table, dtype=dtype) if needs[1] else None
    bias = problem.table.new_zeros(len(problem.table), dtype=dtype) if needs[2] else None
    scales = problem.table.new_zeros(sizes, dtype=dtype) if needs[3:] == (True,) else None
    return Gradients(hidden, table, bias, scales)


def cast_back(grads: Gradients, problem: Problem, options: LossOptions) -> Gradients:
    """The gradients in the dtypes of what they belong to."""
    table = None if grads.table is None else grads.table.to(problem.table.dtype)
    bias = None if grads.bias is None or problem.bias is None else grads.bias.to(problem.bias.dtype)
    scales = grads.scales
    if scales is not None and options.scales is not None:
        factors = zip(scales, options.weights, options.scales, strict=True)
        scales = torch.stack([grad * weight / scale for grad, weight, scale in factors])
    return Gradients(grads.hidden, table, bias, scales)


def layout(
    problem: Problem, options: LossOptions, rows: int, *, needed: bool
) -> tuple[list[Range], int]:
    """The tiles of classes and the rows of a chunk that keep the scratch within the budget."""
    classes = len(problem.table)
    slots = 1 + (len(options.widths) if needed else 1)
    size = accumulation_dtype(problem.hidden.dtype).itemsize
    device = problem.hidden.device.type
    budget = BUDGET.get(device, BUDGET["cpu"])
    cells, near = (bound // (slots * size) for bound in (budget, NEAR.get(device, budget)))
    most = cells // max(classes, 1)
    if most >= min(FEWEST_ROWS, rows):
        most = min(most, max(near // max(classes, 1), problem.hidden.shape[-1]))
        return [(0, classes)], even(rows, max(most, 1))
    height = even(rows, TILED_ROWS)
    width = max(cells // height, 1)
    return [(lo, min(lo + width, classes)) for lo in range(0, classes, width)], height


def even(total: int, most: int) -> int:
    """The length of the fewest equal parts of at most `most`."""
    parts = max(-(-total // most), 1)
    return max(-(-total // parts), 1)


def allocate_scratch(
    problem: Problem, options: LossOptions, rows: int, tiles: list[Range], *, needed: bool
) -> list[Tensor]:
    """The running logits and one slot per size (a single one without gradients)."""
    width = max(hi - lo for lo, hi in tiles)
    dtype = accumulation_dtype(problem.hidden.dtype)
    count = 1 + (len(options.widths) if needed else 1)
    return [problem.hidden.new_empty(rows, width, dtype=dtype) for _ in range(count)]


def _take(
    problem: Problem,
    index: Tensor,
    scale: float | Tensor,
    scratch: list[Tensor],
    *,
    sizes: int,
) -> Chunk:
    """The rows of the index."""
    logits, *slots = [part[: len(index)] for part in scratch]
    x = problem.hidden.index_select(0, index)
    return Chunk(
        x=x,
        dx=torch.zeros_like(x, dtype=logits.dtype),
        target=problem.target.index_select(0, index),
        scale=scale.index_select(0, index) if isinstance(scale, Tensor) else scale,
        logits=logits,
        slots=slots,
        moments=logits.new_zeros(sizes, len(index)),
    )


def one_chunk(
    chunk: Chunk, problem: Problem, options: LossOptions, *, tiles: list[Range], grads: Gradients
) -> Tensor:
    """Losses [sizes, R] of a chunk; leaves dx without its scale, adds the rest to grads."""
    if len(tiles) == 1:
        losses = one_sweep(chunk, problem, options)
        if grads.needed:
            add_gradients(chunk, problem, options, tile=tiles[0], grads=grads)
        return losses
    norms, losses = two_sweeps(chunk, problem, options, tiles)
    if options.scales is not None:
        chunk.moments.copy_(losses - torch.stack(norms))
    for tile in tiles if grads.needed else ():
        view = narrowed(chunk, tile)
        for j, logits in enumerate(running_logits(view, problem, options, tile)):
            scores, slot = options.scaled(logits, j), view.slots[j]
            torch.exp(torch.sub(scores, norms[j][:, None], out=slot), out=slot)
            if options.scales is not None:
                chunk.moments[j] += vecdot(slot, scores)
        add_gradients(view, problem, options, tile=tile, grads=grads)
    return losses


def narrowed(chunk: Chunk, tile: Range) -> Chunk:
    """The chunk with scratch as wide as the tile."""
    width = tile[1] - tile[0]
    slots = [slot[:, :width] for slot in chunk.slots]
    return replace(chunk, logits=chunk.logits[:, :width], slots=slots)


def running_logits(
    chunk: Chunk, problem: Problem, options: LossOptions, tile: Range
) -> Iterator[Tensor]:
    """The logits [R, tile] of each size in turn, in one buffer."""
    logits, table = chunk.logits, span_of(problem.table, 0, tile)
    for number, block in enumerate(options.blocks):
        part, rows = span_of(chunk.x, 1, block), span_of(table, 1, block).t()
        if number:
            accumulate(logits, part, rows)
        else:
            begin(logits, part, rows)
            if problem.bias is not None:
                logits.add_(span_of(problem.bias, 0, tile))
        yield logits


def begin(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in the dtype of a and b; out may be wider."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, in the dtype of a and b; out may be wider."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


def accumulate_block(out: Tensor, a: Tensor, b: Tensor, block: Range) -> None:
    """out[:, block] += a @ b[:, block], computed wider than a narrow block."""
    (lo, hi), total = block, b.shape[1]
    if hi - lo >= NARROW or total < NARROW:
        accumulate(span_of(out, 1, block), a, span_of(b, 1, block))
        return
    start = min(lo, total - NARROW)
    product = a @ span_of(b, 1, (start, start + NARROW))
    span_of(out, 1, block).add_(span_of(product, 1, (lo - start, hi - start)))


def one_sweep(chunk: Chunk, problem: Problem, options: LossOptions) -> Tensor:
    """Losses [sizes, R]; leaves the probabilities of size j in slot j."""
    losses: list[Tensor] = []
    classes = (0, len(problem.table))
    for j, logits in enumerate(running_logits(chunk, problem, options, classes)):
        probabilities, scores = chunk.slots[j % len(chunk.slots)], options.scaled(logits, j)
        torch.softmax(scores, -1, out=probabilities)
        picked = scores.gather(1, chunk.target[:, None]).squeeze(1)
        norm = normalizer(scores, probabilities, picked, chunk.target)
        # A sum is a pass over all scores: 8 % of a step of SASRec, for smoothing alone.
        total = scores.sum(1) if options.smoothing else picked
        loss = smoothed(norm, picked, total, options, len(problem.table))
        losses.append(loss)
        if options.scales is not None:
            chunk.moments[j] = loss - norm + vecdot(probabilities, scores)
    return torch.stack(losses)


def normalizer(logits: Tensor, probabilities: Tensor, picked: Tensor, target: Tensor) -> Tensor:
    """logsumexp of each row, from the softmax that is at hand unless the target's underflows.

    On a CUDA device from its largest, which never does: whether any underflows is not asked.
    """
    if logits.is_cuda:
        return logits.amax(1) - probabilities.amax(1).log()
    chance = probabilities.gather(1, target[:, None]).squeeze(1)
    norm = picked - chance.log()
    small = chance < TINY
    if bool(small.any()):
        norm = torch.where(small, logits.logsumexp(1), norm)
    return norm


def smoothed(
    norm: Tensor, picked: Tensor, total: Tensor, options: LossOptions, classes: int
) -> Tensor:
    """The loss from logsumexp, the target's logit and the sum of logits, read where it counts."""
    if not options.smoothing:
        return norm - picked
    return norm - (1 - options.smoothing) * picked - options.smoothing * total / classes


def two_sweeps(
    chunk: Chunk, problem: Problem, options: LossOptions, tiles: list[Range]
) -> tuple[list[Tensor], Tensor]:
    """logsumexp of each size and losses [sizes, R], tile by tile."""
    shape = (len(options.widths), len(chunk.x))
    norms = chunk.logits.new_full(shape, -torch.inf)
    picked, totals = chunk.logits.new_zeros(shape), chunk.logits.new_zeros(shape)
    for tile in tiles:
        column, inside = located(chunk.target, tile)
        for j, logits in enumerate(running_logits(narrowed(chunk, tile), problem, options, tile)):
            scores = options.scaled(logits, j)
            norms[j] = torch.logaddexp(norms[j], scores.logsumexp(1))
            picked[j] += torch.where(inside, scores.gather(1, column).squeeze(1), 0)
            if options.smoothing:
                totals[j] += scores.sum(1)
    parts = zip(norms, picked, totals, strict=True)
    losses = [smoothed(*part, options, len(problem.table)) for part in parts]
    return list(norms), torch.stack(losses)


def located(target: Tensor, tile: Range) -> tuple[Tensor, Tensor]:
    """The column [R, 1] of each target in a tile (any, if outside), and whether it is inside."""
    inside = (target >= tile[0]) & (target < tile[1])
    return (target - tile[0]).clamp(0, tile[1] - tile[0] - 1)[:, None], inside


def add_gradients(
    chunk: Chunk, problem: Problem, options: LossOptions, *, tile: Range, grads: Gradients
) -> None:
    """Turns the slots into suffix sums of dlogits and multiplies them out."""
    table = span_of(problem.table, 0, tile)
    scale = chunk.column_scale
    dtable = None if grads.table is None else span_of(grads.table, 0, tile)
    scaled = (chunk.x * scale).to(chunk.x.dtype)
    for block, slope in suffixes(chunk, options, tile, len(problem.table)):
        slope = slope.to(chunk.x.dtype)
        if dtable is not None:
            accumulate_block(dtable, slope.t(), scaled, block)
        if grads.hidden is not None:
            accumulate_block(chunk.dx, slope, table, block)
    if grads.bias is not None:
        slopes, rows = chunk.slots[0], chunk.scale
        found = slopes.t() @ rows.to(slopes) if isinstance(rows, Tensor) else slopes.sum(0) * rows
        span_of(grads.bias, 0, tile).add_(found)


def suffixes(
    chunk: Chunk, options: LossOptions, tile: Range, classes: int
) -> Iterator[tuple[Range, Tensor]]:
    """Each block, last first, with the sum over its and all larger sizes of w dlogits [R, tile].

    The slots hold probabilities and are overwritten.
    """
    column, inside = located(chunk.target, tile)
    hit = inside[:, None].to(chunk.logits.dtype) * (options.smoothing - 1)
    above = None
    steps = zip(options.blocks, options.slopes, chunk.slots, strict=True)
    for block, weight, slot in reversed(list(steps)):
        add_weighed(above, slot, weight)
        slot.scatter_add_(1, column, hit * weight)
        if options.smoothing:
            slot.sub_(weight * options.smoothing / classes)
        above = slot
        yield block, slot


def add_weighed(above: Tensor | None, slot: Tensor, weight: float | Tensor) -> None:
    """slot = above + weight * slot; a weight that is a tensor costs a pass of its own."""
    if isinstance(weight, Tensor):
        slot.mul_(weight)
        weight = 1.0
    if above is not None:
        torch.add(above, slot, alpha=weight, out=slot)
    elif weight != 1:
        slot.mul_(weight)


def weighted(losses: Tensor, options: LossOptions) -> Tensor:
    """The losses [sizes, N] of a row added up by weight, [N]."""
    return torch.stack([w * row for w, row in zip(options.weights, losses, strict=True)]).sum(0)


def row_scale(target: Tensor, ignore_index: int, *, mean: bool) -> float | Tensor:
    """1, or 1 / the number of real rows (nan if there are none, as torch has it)."""
    if not mean:
        return 1.0
    real = (target != ignore_index).sum()
    if is_recorded(target):
        return 1 / real
    count = int(real)
    return 1 / count if count else float("nan")
