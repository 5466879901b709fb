"""unify(): two terms become one, from the right; cut, concatenate, regroup."""

from __future__ import annotations

from collections.abc import Iterable

from matryoshkafy.axes.terms import (
    COPIES,
    Axis,
    Factor,
    Reason,
    Sum,
    Term,
    copies,
    fix,
    is_fixed,
    leaves,
    resolve,
    size,
)


def unify(a: Term, b: Term, reason: Reason) -> bool:
    """Make two terms of one size the same term; where they cannot be aligned, fix both.

    Terminates because each step removes a factor or binds an axis to strictly smaller ones.
    """
    # Both whole already: how their factors align decides nothing any more.
    if is_fixed(a) and is_fixed(b):
        return True
    if _unify(resolve(a), resolve(b)):
        return True
    fix(a, reason)
    fix(b, reason)
    return False


def _unify(a: Term, b: Term) -> bool:
    while a and b:
        if _same(a[-1], b[-1]):
            a, b = a[:-1], b[:-1]
            continue
        # From here on a ends in the larger factor: it is the one that is split.
        if a[-1].size < b[-1].size:
            a, b = b, a
        before = a[-1], b[-1]
        if isinstance(before[0], Sum) and isinstance(before[1], Sum):
            # Aligned segment by segment they are one, even where they are cut up differently.
            if a[-1].size != b[-1].size or not _meet_sums(before[0], before[1]):
                return False
            a, b = resolve(a[:-1]), resolve(b[:-1])
            continue
        if _is_copies(a[-1]) and a[-1].size != b[-1].size:
            a = _split_copies(a, b[-1].size)
        elif not _meet(*before):
            return False
        a, b = resolve(a), resolve(b)
        # No step was made (an axis that stands in the other's own term): it would never end.
        if a and b and (a[-1], b[-1]) == before and not _same(*before):
            return False
    return size(a) == size(b)


def _is_copies(factor: Factor) -> bool:
    return isinstance(factor, Axis) and factor.fixed is COPIES


def _split_copies(term: Term, n: int) -> Term:
    """copies(6) is copies(2).copies(3) wherever an axis of 3 asks for it."""
    quotient, rest = divmod(term[-1].size, n)
    return term if rest else (*term[:-1], *copies(quotient), *copies(n))


def _same(x: Factor, y: Factor) -> bool:
    """Two Sum objects are the same when their resolved segments are, factor by factor."""
    if x == y:
        return True
    if not (isinstance(x, Sum) and isinstance(y, Sum)) or len(x.segments) != len(y.segments):
        return False
    pairs = zip(map(resolve, x.segments), map(resolve, y.segments), strict=True)
    return all(len(s) == len(t) and all(map(_same, s, t)) for s, t in pairs)


def _meet(x: Factor, y: Factor) -> bool:
    """Bind the rightmost factors x and y (x not smaller) so that they share their last factor."""
    if isinstance(x, Axis) and isinstance(y, Axis):
        return _meet_axes(x, y)
    if isinstance(x, Axis):
        assert isinstance(y, Sum)
        return _meet_axis_sum(x, y)
    assert isinstance(y, Axis)
    return _meet_axis_sum(y, x) if x.size == y.size else _factor_out(x, y)


def _bind(axis: Axis, term: Term) -> bool:
    # An axis that is part of itself would resolve without end.
    if any(leaf is axis for leaf in leaves(term)):
        return False
    if axis.fixed:
        fix(term, axis.fixed)
    axis.bound = term
    return True


def _meet_axes(x: Axis, y: Axis) -> bool:
    if x.size == y.size:
        # The elder keeps its name, which is that of the parameter that was met first.
        keep, give = (x, y) if x.serial < y.serial else (y, x)
        return _bind(give, (keep,))
    if x.size % y.size:
        return False
    # 768 meets 64: it is 12 of them, row-major, so that the smaller one is the last factor.
    return _bind(x, (x.part(x.size // y.size), y))


def _meet_axis_sum(x: Axis, y: Sum) -> bool:
    if _is_copies(x) or x.size % y.size:
        return False  # copies stand for no units of their own
    if x.size == y.size:
        return _bind(x, (y,))
    return _bind(x, (x.part(x.size // y.size), y))


def _factor_out(x: Sum, y: Axis) -> bool:
    """Every segment of x ends with y as a factor, or nothing aligns."""
    if any(size(s) % y.size for s in x.segments):
        return False
    # Resolved for each segment anew: an elder axis of the one before may have taken the place of y.
    return all(
        _unify(resolve(s), resolve((Axis(size(s) // y.size, y.name, None, y.births), y)))
        for s in x.segments
    )


def _meet_sums(x: Sum, y: Sum) -> bool:
    left, right = [list(x.segments)[::-1], list(y.segments)[::-1]]
    while left and right:
        s, t = resolve(left.pop()), resolve(right.pop())
        if size(s) == size(t):
            if not _unify(s, t):
                return False
            continue
        # The longer segment is cut at the shorter one's end; its rest waits for the next segment.
        if size(s) < size(t):
            left, right, s, t = right, left, t, s
        pieces = _cut_front(s, size(t))
        if pieces is None:
            return False
        right.append(t)
        left.extend(pieces[::-1])
    return not left and not right


def _cut_front(term: Term, count: int) -> tuple[Term, Term] | None:
    """Split a term into its first `count` units and the rest, binding its axis if it must."""
    pieces = cut(term, [count, size(term) - count])
    return None if pieces is None else (pieces[0], pieces[1])


def cut(term: Term, lengths: list[int]) -> list[Term] | None:
    """Split a term into consecutive pieces of the given lengths; None when it does not come apart.

    An axis becomes the Sum of its pieces, so that a later cat of them is the axis again.
    """
    term = resolve(term)
    if len(lengths) == 1:
        return [term]
    first, rest = (term[0], term[1:]) if term else (None, ())
    if first is None:
        return None
    # A cut of a product falls between units of its first factor, or through the middle of one.
    unit = size(rest)
    if any(n % unit for n in lengths):
        return None
    counts = [n // unit for n in lengths]
    heads = _cut_factor(first, counts)
    return None if heads is None else [resolve((*h, *rest)) for h in heads]


def _cut_factor(factor: Factor, counts: list[int]) -> list[Term] | None:
    if isinstance(factor, Axis):
        if factor.fixed is COPIES:
            return [copies(n) if n else (Axis(0, "empty", COPIES),) for n in counts]
        # The axis is bound to its own pieces: later cuts elsewhere, and a cat, meet the same ones.
        pieces: list[Term] = [
            (factor.part(n, f"{factor.name}[{i}]"),) for i, n in enumerate(counts)
        ]
        factor.bound = (Sum(p for p in pieces if size(p)),)
        return pieces
    return _cut_segments(list(factor.segments), counts)


def _cut_segments(segments: list[Term], counts: list[int]) -> list[Term] | None:
    out: list[Term] = []
    queue = segments[::-1]
    for count in counts:
        taken = _taken_front(queue, count)
        if taken is None:
            return None
        out.append(concatenate(taken))
    return out


def _taken_front(queue: list[Term], count: int) -> list[Term] | None:
    """Take so many units off a queue of segments, the last of which may be cut."""
    taken: list[Term] = []
    while count:
        segment = resolve(queue.pop())
        if size(segment) > count:
            pieces = _cut_front(segment, count)
            if pieces is None:
                return None
            segment, rest = pieces
            queue.append(rest)
        taken.append(segment)
        count -= size(segment)
    return taken


def concatenate(terms: Iterable[Term]) -> Term:
    """Return the term of the given terms laid one after the other."""
    return resolve((Sum(terms),))


def regroup(term: Term, sizes: list[int]) -> list[Term] | None:
    """View one dimension as several (row-major) of the given sizes; None if it does not come
    apart.
    """
    out: list[Term] = []
    term = resolve(term)
    for n in reversed(sizes):
        taken = _take_right(term, n)
        if taken is None:
            return None
        term, piece = taken
        out.append(piece)
    return out[::-1]


def _take_right(term: Term, n: int) -> tuple[Term, Term] | None:
    """Split off the rightmost factors of product n, splitting one at a divisor where needed."""
    taken: Term = ()
    while size(taken) < n:
        term = resolve(term)
        want = n // size(taken)
        if want % term[-1].size == 0:
            term, taken = term[:-1], (term[-1], *taken)
        elif term[-1].size % want or n % size(taken):
            return None
        elif _is_copies(term[-1]):
            term = _split_copies(term, want)
        elif not _split_factor(term[-1], want) or resolve(term)[-1].size >= term[-1].size:
            return None
    return term, taken


def _split_factor(factor: Factor, n: int) -> bool:
    if isinstance(factor, Axis):
        return _bind(factor, (factor.part(factor.size // n), factor.part(n)))
    births = next((leaf.births for leaf in leaves((factor,)) if not _is_copies(leaf)), None)
    return _factor_out(factor, Axis(n, "part", None, births))
