"""Fused recurrent layers: gates are copies, the state is one axis shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import info_of, op_key, tensor_info
from matryoshkafy.rules.contraction import LINEAR
from matryoshkafy.rules.table import Args, Result, Walk, Weight, hold, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _matrices(args: Args) -> dict[fx.Node, Weight]:
    """The matrices among the parameters of every layer."""
    return {w: LINEAR for w in args["params"] if len(tensor_info(w).shape) == 2}


def _states(given: fx.Node | Sequence[fx.Node]) -> list[fx.Node]:
    return [given] if isinstance(given, fx.Node) else list(given)


@rule(
    *GATES,
    weights=_matrices,
    parameters=("params",),
    contiguous=("params", "hx"),
)
def recurrent(walk: Walk, node: fx.Node, args: Args) -> Result:
    """[.., in] -> [.., directions . state], with the states of every layer beside it."""
    gates = GATES[op_key(node)]
    states = _states(args["hx"])
    directions = 2 if args["bidirectional"] else 1
    layers = args["num_layers"] * directions
    per_layer = len(args["params"]) // layers
    output = walk.of(states[0])[-1]
    cell = walk.of(states[-1])[-1]
    if per_layer == (4 if args["has_biases"] else 2):  # without a projection they are one width
        output = cell = walk.unify(output, cell)
    x = walk.of(args["data" if "batch_sizes" in args else "input"])
    entering = x[-1]
    for layer in range(layers):
        params = args["params"][layer * per_layer : (layer + 1) * per_layer]
        inner = entering if layer < directions else (*axes.copies(directions), *output)
        _layer(walk, params, (inner, output, (*axes.copies(gates), *cell)), args["has_biases"])
    hold(walk, (*(t for s in states for t in walk.of(s)[:-1]), *x[:-1]), "sequence")
    return ((*x[:-1], (*axes.copies(directions), *output)), *(walk.of(s) for s in states))


@rule("_pack_padded_sequence")
def packed(walk: Walk, node: fx.Node, args: Args) -> Result:
    """[batch, time, ..] -> the steps of all sequences [steps, ..], and how many at each time."""
    x = walk.of(args["input"])
    hold(walk, x[:2], "sequence")
    steps, sizes = (walk.fresh(shape[0], "sequence") for shape in walk.shapes(node))
    return (steps, *x[2:]), (sizes,)


@rule("_pad_packed_sequence")
def padded(walk: Walk, node: fx.Node, args: Args) -> Result:
    """[steps, ..] -> [batch, time, ..] with zeros behind each sequence, and their lengths."""
    shape, lengths = walk.shapes(node)
    rest = walk.of(args["data"])[1:]
    return (
        (*(walk.fresh(n, "sequence") for n in shape[:2]), *rest),
        (walk.fresh(lengths[0], "sequence"),),
    )


@rule(
    *(f"{kind}_cell" for kind in GATES),
    weights={"w_ih": LINEAR, "w_hh": LINEAR},
    parameters=("b_ih", "b_hh"),
)
def cell(walk: Walk, node: fx.Node, args: Args) -> Result:
    """One step: [N, in] and [N, state] -> [N, state] (and the cell state of an LSTM)."""
    kind = op_key(node).removesuffix("_cell")
    states = _states(args["hx"])
    x, output = walk.of(args["input"]), walk.of(states[0])[-1]
    for other in states[1:]:
        walk.unify(walk.of(other)[-1], output)
    params = [args[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh") if args.get(n) is not None]
    _layer(walk, params, (x[-1], output, (*axes.copies(GATES[kind]), *output)), len(params) == 4)
    outs = tuple((*x[:-1], output) for _ in states)
    return outs if isinstance(info_of(node), tuple) else outs[0]


def _layer(
    walk: Walk, params: Sequence[fx.Node], terms: tuple[Term, Term, Term], biases: bool
) -> None:
    """w_ih [gates, in], w_hh [gates, state], biases [gates], projection [state, cell]."""
    inner, output, gates = terms
    for weight, columns in zip(params[:2], (inner, output), strict=True):
        w = walk.of(weight)
        walk.unify(w[0], gates)
        walk.contract(walk.unify(w[1], columns))
        walk.weight(weight, 0, 1)
    for bias in params[2:4] if biases else ():
        walk.unify(walk.of(bias)[0], gates)
    for projection in params[4:] if biases else params[2:]:
        w = walk.of(projection)
        walk.unify(w[0], output)
        walk.contract(walk.unify(w[1], gates[-1:]))
        walk.weight(projection, 0, 1)
