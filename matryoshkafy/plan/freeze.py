"""freeze(): solved axes become the frozen plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Factor, Nested
from matryoshkafy.axes.terms import COPIES, Axis, Sum, Term
from matryoshkafy.errors import NothingNests
from matryoshkafy.graph.nodes import (
    op_key,
    source_of,
)
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.held import free, held, is_reparametrised, nests
from matryoshkafy.plan.masking import Masking
from matryoshkafy.plan.numbers import output_remarks
from matryoshkafy.plan.plan import (
    Action,
    Group,
    Options,
    Plan,
    Shape,
    Unknown,
    Whole,
    ladder_of,
    on_stairs,
)
from matryoshkafy.plan.policies import ByName, heaviest, input_remarks, table_remarks, trainable
from matryoshkafy.plan.scalars import find_scalars
from matryoshkafy.plan.snapping import snapped
from matryoshkafy.plan.stairs import stairs_of
from matryoshkafy.plan.stored import decided
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import Terms, op_of
from matryoshkafy.sizes import Rungs, parse_sizes

DEFAULT_LADDER = [0.25, 0.5, 1.0]


@dataclass(frozen=True)
class Request:
    """What the user asked of the analysis."""

    options: Options
    sizes: Rungs | None = None
    overrides: Mapping[str, Sequence[int]] | None = None
    multiple_of: int = 1


def freeze(trace: Trace, found: Findings, request: Request, solved: Solved) -> Plan:
    parameters, masking = solved.parameters, solved.masking
    main = heaviest(trainable(trace, parameters))
    if main is None:
        raise NothingNests(_nothing(trace, parameters, found, request))
    order = list(dict.fromkeys(free(*(t for terms in parameters.values() for t in terms))))
    index = {axis: i for i, axis in enumerate(order)}
    dim_of = freezer(index)
    solved_parameters = {name: tuple(map(dim_of, terms)) for name, terms in parameters.items()}
    groups = tuple(_named(order, parameters, _tables(trace)))
    nodes = {n.name: frozen(found.terms[n], dim_of) for n in found.terms if n.op != "output"}
    stairs = stairs_of(solved_parameters, (d for s in nodes.values() for t in s for d in t))
    row = next((s for s in stairs if index[main] in s), None)
    unit = 1 if row else _main_unit(solved_parameters, index[main])
    width = sum(order[g].size for g in row) if row else main.size * unit
    sizes = sizes_of(request, width)
    options = request.options
    full = held(found, masked=options.nesting == "masked" and options.scope == "full")
    plan = Plan(
        options=options,
        sizes=sizes,
        main=index[main],
        unit=unit,
        groups=groups,
        ladder=ladder_of(groups, sizes, width),
        parameters=solved_parameters,
        nodes=nodes,
        notes={n.name: {k: dim_of(t) for k, t in v.items()} for n, v in found.notes.items()},
        actions={
            n: Action(c.kind, tuple(index[a] for a in c.axes if a in index))
            for n, c in masking.choices.items()
        },
        tail=masking.tail,
        full=frozenset(n.name for n in full),
        whole=tuple(_whole(trace, parameters)),
        unknown=tuple(Unknown(*u) for u in found.unknown),
        remarks=tuple(dict.fromkeys(_remarks(trace, found, parameters, masking, full))),
    )
    plan = on_stairs(plan, stairs) if stairs else plan
    plan = snapped(plan, request.multiple_of).with_widths(request.overrides or {})
    return decided(trace, find_scalars(trace, plan, _summed(found, dim_of)))


def _remarks(
    trace: Trace, found: Findings, parameters: ByName, masking: Masking, full: Iterable[fx.Node]
) -> Iterator[str]:
    yield from (*trace.notes, *masking.remarks, *map(_held_remark, full))
    yield from (*input_remarks(trace, parameters), *table_remarks(trace, parameters))
    terms = (term for shape in parameters.values() for term in shape)
    yield from output_remarks(trace, {axes.size(term) for term in terms if nests(term)})
    for node, notes in found.notes.items():
        if nests(notes.get("across", ())):
            yield (
                f"groups: those of {op_key(node)} at {source_of(node) or node.name} hold units of "
                "several values; every size has as many groups as divide its channels, each of "
                "other units"
            )


def _summed(found: Findings, dim_of: Callable[[Term], Dim]) -> dict[str, tuple[Dim, ...]]:
    """Return the dims that products, sums, means and distances are taken over."""
    sums = {n: t for n, t in found.mixed.items() if op_of(n).totals}
    return {n.name: tuple(map(dim_of, t)) for n, t in (sums | found.contracted).items()}


@dataclass(frozen=True)
class Solved:
    """Axes of which it is known whether they nest, and what masked nesting does at each node."""

    parameters: ByName
    masking: Masking


def sizes_of(request: Request, width: int) -> tuple[int, ...]:
    """Return the ladder that was asked for, or the default one."""
    default = DEFAULT_LADDER if width >= 4 else [width]
    return parse_sizes(request.sizes if request.sizes is not None else default, width)


def _nothing(trace: Trace, parameters: ByName, found: Findings, request: Request) -> str:
    """Say why no axis is a width: each reason with its first place, and what may help."""
    if not parameters:
        return "the model has no parameters, so there is nothing to nest; give a model with weights"
    every = axes.leaves(*(term for terms in parameters.values() for term in terms))
    reasons = [leaf.fixed for leaf in every if leaf.fixed]
    sources = {node.name: source_of(node) for node in trace.graph.nodes}
    first = {r.kind: sources.get(r.place) for r in reversed(reasons)}
    counts = Counter(reason.kind for reason in reasons).most_common(5)
    why = ", ".join(
        f"{kind} ({count} axes{f', first at {first[kind]}' if first[kind] else ''})"
        for kind, count in counts
    )
    ops = ", ".join(f"{op} at {source or node}" for op, node, source in found.unknown[:3])
    remedies = [
        remedy
        for remedy, fits in (
            ('nesting="sliced"', request.options.nesting == "masked"),
            ("fewer keep patterns", request.options.keep),
            ("mk.rule for the op without a rule", ops),
            ('scope="output", which nests the last axis of the output alone', True),
        )
        if fits
    ]
    return (
        f"no axis of the model is a width that can nest: {why}"
        + (f"; ops without a rule: {ops}" if ops else "")
        + f". Try {' or '.join(remedies)}."
    )


def freezer(index: Mapping[Axis, int]) -> Callable[[Term], Dim]:
    """Return what turns terms into dims in which the given axes nest."""

    def dim_of(term: Term) -> Dim:
        out: list[Factor] = []
        for factor in axes.resolve(term):
            if isinstance(factor, Sum):
                out.append(_sum([dim_of(s) for s in factor.segments]))
            elif factor in index and factor.fixed is None:
                out.append(Nested(index[factor], factor.size))
            else:
                out.append(factor.size)
        return _simple(out)

    return dim_of


def _sum(segments: list[Dim]) -> Factor:
    whole = sum(map(dims.size, segments))
    return dims.Sum(tuple(segments)) if any(map(dims.is_nested, segments)) else whole


def _simple(factors: Iterable[Factor]) -> Dim:
    """Adjacent whole factors are one."""
    out: list[Factor] = []
    for factor in factors:
        last = out[-1] if out else None
        if isinstance(factor, int) and isinstance(last, int):
            out[-1] = last * factor
        else:
            out.append(factor)
    return tuple(out) or (1,)


def frozen(outputs: tuple[Terms, ...], dim_of: Callable[[Term], Dim]) -> tuple[Shape, ...]:
    """Return the dims of each output of a node."""
    return tuple(tuple(map(dim_of, terms)) for terms in outputs)


PLACES = {"0": "out", "1": "in"}


def _tables(trace: Trace) -> set[str]:
    """Return the weights whose rows are looked up: their columns are what comes out."""
    reads = (n for n in trace.graph.nodes if op_of(n).lookup)
    return {str(a.target) for n in reads for a in n.all_input_nodes[:1] if a.op == "get_attr"}


def _named(order: Sequence[Axis], parameters: ByName, tables: Collection[str]) -> Iterator[Group]:
    """Yield the groups, each under a name of its own: plans are read and changed by names."""
    taken: set[str] = set()
    by_axis = _members(parameters)
    for axis in order:
        members = tuple(by_axis.get(axis, ()))
        # A part that several axes share was born in no parameter: its first one stands for it.
        places = (axis.name, *members) if ":" in axis.name else members
        wanted = [_group_name(place, tables) for place in places]
        name = next((n for n in wanted if n not in taken), f"{wanted[0]}#{len(taken)}")
        taken.add(name)
        yield Group(name, axis.size, members)


def _group_name(place: str, tables: Collection[str]) -> str:
    """Name a group after where it was born: `encoder.layer.0.output.dense.out`."""
    name, _, rest = place.partition(":")
    position = rest.partition("[")[0]
    piece = place[place.index("[") :] if "[" in place else ""
    owner, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias") and position:
        side = PLACES.get(position, f"dim{position}") if leaf == "weight" else "out"
        if name in tables and position == "1":
            side = "out"
        return f"{owner}.{side}{piece}" if owner else f"{side}{piece}"
    return f"{name}.{position}{piece}" if position else name + piece


def _members(parameters: ByName) -> dict[Axis, list[str]]:
    """Return the dims of parameters in which each axis stands."""
    found: dict[Axis, list[str]] = {}
    for name, terms in parameters.items():
        for i, term in enumerate(terms):
            for axis in dict.fromkeys(axes.leaves(term)):
                found.setdefault(axis, []).append(f"{name}:{i}")
    return found


def _main_unit(parameters: Mapping[str, tuple[Dim, ...]], main: int) -> int:
    """What one unit of the main group spans where it stands: 1, or head_dim; times 4, where it
    stands as four equal parts side by side wherever it does (heads that are split and stacked).
    """
    spans: Counter[int] = Counter()
    parts: set[int] = set()
    for shape in parameters.values():
        for dim in shape:
            at = next(
                (i for i, f in enumerate(dim) if isinstance(f, Nested) and f.group == main), None
            )
            if at is not None:
                spans[dims.size(dim[at + 1 :])] += dims.size(sum(shape, ()))
                parts.add(math.prod(f for f in dim[:at] if isinstance(f, int)))
    side_by_side = parts.pop() if len(parts) == 1 else 1
    return side_by_side * spans.most_common(1)[0][0] if spans else 1


def _held_remark(node: fx.Node) -> str:
    what = "g v / |v|" if is_reparametrised(node) else "a statistic of a weight that nests"
    return f"held at full width: {op_key(node)} at {source_of(node) or node.name} is {what}"


def _whole(trace: Trace, parameters: ByName) -> Iterable[Whole]:
    """What stays whole, at the user's line where a node asked for it."""
    places = {node.name: _place(node) for node in trace.graph.nodes}
    first: dict[Axis, str] = {}
    dims_of = (
        (f"{n}:{i}", term) for n, terms in parameters.items() for i, term in enumerate(terms)
    )
    for where, term in dims_of:
        for leaf in axes.leaves(term):
            first.setdefault(leaf, where)
    for leaf, where in first.items():
        if leaf.fixed and leaf.fixed is not COPIES:
            place = _told(leaf.fixed.place, places)
            yield Whole(where, leaf.size, leaf.fixed.kind, place)


def _told(asked: str, places: Mapping[str, str]) -> str:
    """Where a person finds what asked: a node, an axis called "node.name", or words as they are."""
    born = asked.partition(".")[0] if ":" not in asked else asked
    return places.get(asked, places.get(born, asked))


def _place(node: fx.Node) -> str:
    """The user's line that made a node, else the module; an input or a tensor by its own name."""
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    stack = cast("Mapping[str, tuple[str, object]] | None", node.meta.get("nn_module_stack"))
    modules = [path for path, _ in (stack or {}).values()]
    return source_of(node) or (modules[-1] if modules else "")
