"""hold_tables(), hold_constants(), hold_rows(): features that the model holds but does not learn
stay whole, and so do the rows of a table that are attended.

Text and picture features of items, a graph as a buffer, fixed filter banks: these are inputs that
happen to live in the model. A *table* is a float buffer, or a parameter that does not train in a
model that has others that do, whose rows are looked up or which meets a weight as an activation
does. A frozen linear layer is no table: it is a weight like any other.

What decides is who owns the axis. One that a layer's outputs or the columns of a trained embedding
write, and a layer reads, is a width of the model, though a table may be added to it (sinusoids, the
frozen word embeddings of an encoder that is fine-tuned). One that is only read is data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Reason
from matryoshkafy.graph.literals import computed, stated
from matryoshkafy.graph.nodes import (
    TensorInfo,
    bound_args,
    info_of,
    is_op,
    reached,
    readers_of,
    sources_of,
)
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import Place, weight_places

KIND = "frozen table"
ROWS = "table rows"
Users = dict[Axis, set[str]]


@dataclass(frozen=True)
class Contraction:
    """A contraction with a weight: the weight's axes that it writes and sums over, and the model's
    tensors that the weight is made of.
    """

    node: fx.Node
    written: frozenset[Axis]
    read: frozenset[Axis]
    bases: frozenset[str]


def hold_tables(trace: Trace, found: Findings) -> None:
    """Fix the axes of tables that no layer both writes and reads."""
    tables = _tables(trace, found)
    owned = _Owners(trace, found, tables)
    data = _made_of(found, tables)
    for table in tables:
        for leaf in _leaves(found, table):
            if leaf not in owned.written:
                axes.fix((leaf,), Reason(KIND, str(table.target)))
    for node, terms in found.contracted.items():
        table = next((n for n in node.all_input_nodes if n in data), None)
        for leaf in list(axes.leaves(*terms)) if table else ():
            if leaf not in owned.read and any(leaf in _leaves(found, t) for t in tables):
                axes.fix((leaf,), Reason(KIND, node.name))


def hold_constants(trace: Trace, found: Findings) -> None:
    """Fix what numbers of the model have of their own: centres, knots, steps that a layer reads.

    exp(-(x - centres)^2) has as many features as there are centres. No layer writes them and no
    parameter that trains has such an axis but to read it: a smaller class has as many. So do zeros
    that are laid beside a width, and 1, 2, ... up to a number that the user's code holds, where no
    layer's outputs meet them.
    """
    _hold_written(trace, found)
    state = trace.state()
    filling = (n for n in trace.graph.nodes if op_of(n).fills)
    laid_beside = {a for n in filling for a in axes.leaves(*found.notes.get(n, {}).values())}
    frozen, owned = laid_beside | _counted(trace, found), set[Axis]()
    for node in (n for n in trace.graph.nodes if n.op == "get_attr" and n in found.terms):
        tensor = state.get(str(node.target))
        if isinstance(tensor, nn.Parameter):
            owned.update(axes.leaves(*(found.flat(node)[d] for d in _own_dims(node, found))))
        elif tensor is not None and any(_meets_activations(u, found) for u in node.users):
            frozen.update(_leaves(found, node))
    read = {leaf for terms in found.contracted.values() for leaf in axes.leaves(*terms)}
    for leaf in frozen & read - owned:
        axes.fix((leaf,), Reason(KIND, leaf.name))


def _hold_written(trace: Trace, found: Findings) -> None:
    """Fix constants around a value where the user's code says how many: F.pad(x, (1, 3)).

    A number under a name may come from the widths: (out - into) // 2 zeros of a shortcut.
    """
    for node in (n for n in trace.graph.nodes if op_of(n).fills):
        sides = found.notes.get(node, {}).values()
        if sides and not computed(node, {axes.size(side) for side in sides}):
            for side in sides:
                axes.fix(side, Reason(KIND, node.name))


def _counted(trace: Trace, found: Findings) -> set[Axis]:
    """Return the axes of ranges whose ends the user's code states: arange(1, 7)."""
    ranges = (n for n in trace.graph.nodes if op_of(n).counts and stated(n, _ends(n)))
    return {a for n in ranges for a in _leaves(found, n)}


def _ends(node: fx.Node) -> set[int]:
    return {n for name, n in bound_args(node).items() if name in ("start", "end") if type(n) is int}


def _own_dims(parameter: fx.Node, found: Findings) -> set[int]:
    """Return the dims of a parameter that it does not merely read."""
    places = [weights_read(u, found).get(parameter) for u in parameter.users if is_op(u)]
    read = set[int]().union(*(p.into for p in places if p is not None))
    return set(range(len(found.flat(parameter)))) - read


def _meets_activations(user: fx.Node, found: Findings) -> bool:
    return op_of(user).elementwise and user not in found.pure


def hold_rows(trace: Trace, found: Findings) -> None:
    """Fix the rows of a table that are read as keys and as values, softmax(x K') K.

    They are positions that are attended, as those of a sequence are, and no width: a smaller model
    of the class has as many. Without the softmax it is an autoencoder of tied weights, whose hidden
    axis is a width; so is an axis that is read elsewhere than behind the softmax.
    """
    reads = _reads(found)
    for node in trace.graph.nodes:
        # An op that mixes a dim and keeps it, as softmax does.
        if node not in found.mixed or not _keeps_shape(node):
            continue
        written, read = _users_around(node, reads)
        for leaf in set(axes.leaves(*found.mixed[node])):
            values = read.get(leaf, set()) | set(_met_again(node, leaf, found))
            if written.get(leaf, set()) & values:
                axes.fix((leaf,), Reason(ROWS, node.name))


def _keeps_shape(node: fx.Node) -> bool:
    info, source = info_of(node), info_of(node.all_input_nodes[0])
    if not isinstance(info, TensorInfo) or not isinstance(source, TensorInfo):
        return False
    return not op_of(node).statistic and info.shape == source.shape


def _reads(found: Findings) -> list[Contraction]:
    """Return what every contraction makes of the tensors of the model."""
    return [
        Contraction(
            n, _leaves_at(found, w, p.outs), _leaves_at(found, w, p.into), frozenset(_bases(w))
        )
        for n in found.contracted
        if is_op(n)
        for w, p in weight_places(n).items()
    ]


def _leaves_at(found: Findings, weight: fx.Node, dims: tuple[int, ...]) -> frozenset[Axis]:
    terms = found.flat(weight)
    return frozenset(axes.leaves(*(terms[d] for d in dims)))


def _users_around(node: fx.Node, reads: Iterable[Contraction]) -> tuple[Users, Users]:
    """Return for each axis the tensors that write it before a node, and that read it after."""
    written, read = Users(), Users()
    before = reached([node], sources_of)
    after = reached([node], readers_of)
    for each in reads:
        for leaf in each.written if each.node in before else ():
            written.setdefault(leaf, set()).update(each.bases)
        for leaf in each.read if each.node in after else ():
            read.setdefault(leaf, set()).update(each.bases)
    return written, read


def _met_again(node: fx.Node, leaf: Axis, found: Findings) -> Iterator[str]:
    """Yield the tensors whose rows, as they are or with something added, meet an axis of a node
    after it: a memory of this sample starts as the table that all samples share.
    """

    def carriers(value: fx.Node) -> list[fx.Node]:
        return [n for n in sources_of(value) if n is not node and leaf in _leaves(found, n)]

    def unchanged(value: fx.Node) -> list[fx.Node]:
        return [] if value in found.contracted else carriers(value)  # what a layer writes is new

    for user in reached([node], readers_of) - {node}:
        if leaf in set(axes.leaves(*found.contracted.get(user, ()))):
            behind = reached(carriers(user), unchanged)
            yield from (str(n.target) for n in behind if n.op == "get_attr")


def _bases(node: fx.Node) -> Iterator[str]:
    """Yield the tensors of the model that a value is made of."""
    made_of = reached([node], sources_of)
    return (str(n.target) for n in made_of if n.op == "get_attr")


class _Owners:
    """The axes that layers write (outputs, embedding columns) and those that they read."""

    def __init__(self, trace: Trace, found: Findings, tables: set[fx.Node]) -> None:
        self.written: set[Axis] = set()
        self.read: set[Axis] = set()
        data = _made_of(found, tables)
        for node in trace.graph.nodes:
            if node.op != "call_function" or node not in found.terms:
                continue
            for weight, place in weights_read(node, found).items():
                if weight not in data:
                    terms = found.flat(weight)
                    self.written.update(axes.leaves(*(terms[o] for o in place.outs)))
                    self.read.update(axes.leaves(*(terms[i] for i in place.into)))


def weights_read(node: fx.Node, found: Findings) -> dict[fx.Node, Place]:
    """Return the weights of a layer; a product of parameters with each other is none."""
    if op_of(node).lookup:
        sources = [n for n in node.all_input_nodes[:1] if len(found.of(n)) == 2]
        return {n: Place((1,), ()) for n in sources if n.op == "get_attr"}
    places = weight_places(node) if is_op(node) else {}
    alone = op_of(node).product and len(places) > 1
    return {} if alone else places


def _tables(trace: Trace, found: Findings) -> set[fx.Node]:
    state = trace.state()
    parameters = [t for t in state.values() if isinstance(t, nn.Parameter)]
    trains = any(p.requires_grad for p in parameters)
    out: set[fx.Node] = set()
    for node in found.terms if parameters else ():
        tensor = state.get(str(node.target)) if node.op == "get_attr" else None
        if tensor is None or not _is_frozen(tensor, trains):
            continue
        if any(_table_reads(node, isinstance(tensor, nn.Parameter), found)):
            out.add(node)
    return out


def _is_frozen(tensor: torch.Tensor, trains: bool) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return not isinstance(tensor, nn.Parameter) or (trains and not tensor.requires_grad)


def _table_reads(node: fx.Node, parameter: bool, found: Findings) -> Iterator[bool]:
    """Follow what is made of a frozen tensor alone; True where it is read as a table."""
    seen, queue = {node}, [node]
    while queue:
        value = queue.pop()
        for user in (u for u in value.users if u.op == "call_function"):
            if op_of(user).lookup:
                yield user.all_input_nodes[0] is value
            elif user in found.contracted:
                yield not parameter or _as_data(value, user, found)
            if user in found.pure and user not in seen:
                seen.add(user)
                queue.append(user)


def _as_data(value: fx.Node, user: fx.Node, found: Findings) -> bool:
    """Tell whether a layer reads a value where an activation stands, not as its weight."""
    places = weight_places(user) if is_op(user) else {}
    return value not in places or (user in found.pure and len(places) > 1)


def _made_of(found: Findings, tables: set[fx.Node]) -> set[fx.Node]:
    """Return the tables, and what is computed from tables and numbers alone."""
    out: set[fx.Node] = set()
    for node in found.terms:
        inputs = [n for n in node.all_input_nodes if any(found.terms.get(n, ()))]
        made = node.op == "call_function" and bool(inputs) and all(n in out for n in inputs)
        if node in tables or made:
            out.add(node)
    return out


def _leaves(found: Findings, node: fx.Node) -> set[Axis]:
    return set(axes.leaves(*found.flat(node)))
