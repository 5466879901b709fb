"""Ops that sum products over an axis: linear, matmul, einsum, embedding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import tensor_info
from matryoshkafy.rules.pointwise import broadcast
from matryoshkafy.rules.table import (
    Args,
    Result,
    Terms,
    Walk,
    Weight,
    dims_of,
    meet,
    rule,
)
from matryoshkafy.rules.weights import is_picked, is_weight

# Outputs first, as in nn.Linear and nn.Conv2d; inputs first, as in nn.ConvTranspose2d; a @ b.
LINEAR, TRANSPOSED = Weight(out=0, into=1), Weight(out=1, into=0)
LEFT, RIGHT = Weight(out=-2, into=-1), Weight(out=-1, into=-2)


def add_bias(walk: Walk, bias: object, out: Term) -> None:
    """A bias has the axis of the outputs."""
    if isinstance(bias, fx.Node) and walk.of(bias):
        walk.unify(walk.of(bias)[-1], out)


@rule("linear", weights={"weight": LINEAR}, parameters=("bias",), nested="linear")
def linear_layer(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """The last axis of x meets the inner axis of the weight and leaves as the outer one."""
    del node
    x, weight = walk.of(args["input"]), walk.of(args["weight"])
    walk.weight(args["weight"], 0, 1)
    walk.contract(walk.unify(x[-1], weight[-1]))
    if len(weight) == 1:
        return x[:-1]
    add_bias(walk, args["bias"], weight[0])
    return (*x[:-1], weight[0])


@rule("matmul", weights={"self": LEFT, "other": RIGHT}, product=True, nested="product")
@rule("mm", weights={"self": LEFT, "mat2": RIGHT}, product=True, nested="product")
@rule("bmm", weights={"self": LEFT, "mat2": RIGHT}, product=True)
@rule("mv", product=True, clamps=True)
@rule("dot", clamps=True)
@rule("_sparse_mm", "vdot", "linalg_vecdot")
def matmul(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Batch dims broadcast, the last of a meets the second last of b."""
    del node
    names = list(args)
    return _product(walk, args[names[0]], args[names[1]])


def _product(walk: Walk, left: fx.Node, right: fx.Node) -> Terms:
    """Return the terms of left @ right."""
    a, b = walk.of(left), walk.of(right)
    inner = b[-2:][0]
    walk.contract(walk.unify(a[-1], inner))
    walk.weight(right, *_features_of(right, left, (max(-2, -len(b)), -1)))
    walk.weight(left, *_features_of(left, right, (-1, -2)))
    batch = _batch(walk, a[:-2], b[:-2])
    rows = a[-2:-1] if len(a) > 1 else ()
    cols = b[-1:] if len(b) > 1 else ()
    return (*batch, *rows, *cols)


def _features_of(value: fx.Node, other: fx.Node, dims: tuple[int, int]) -> tuple[int, ...]:
    """Return which of (summed, leaving) dims of a factor are features, if it is a weight.

    A parameter that meets an activation is a weight on both sides. What is computed from
    parameters (a table of items, learned tokens) has rows that are no width. Of two parameters
    only what is summed over is one (the rank of a factorised weight).
    """
    if not is_weight(other):
        return dims if is_picked(value) else dims[:1]
    return dims[:1] if is_picked(value) and is_picked(other) else ()


def _batch(walk: Walk, a: Terms, b: Terms) -> Terms:
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b
    return tuple(walk.unify(x, y) if x and y else (x or y) for x, y in zip(a, b, strict=True))


@rule(
    "addmm",
    weights={"mat1": LEFT, "mat2": RIGHT},
    product=True,
    nested="product",
    factor="alpha",
)
@rule("baddbmm", weights={"batch1": LEFT, "batch2": RIGHT}, product=True, factor="alpha")
@rule("addbmm_", "addmv")
def addmm(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """A product plus a broadcast bias."""
    del node
    names = list(args)
    out = _product(walk, args[names[1]], args[names[2]])
    meet(walk, walk.of(args["self"]), out)
    return out


@rule("addbmm", weights={"batch1": LEFT, "batch2": RIGHT}, product=True)
def addbmm(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Products summed over the batch, plus a broadcast bias."""
    del node
    batch, rows, cols = _product(walk, args["batch1"], args["batch2"])
    walk.contract(batch)
    meet(walk, walk.of(args["self"]), (rows, cols))
    return (rows, cols)


def _tensordot_weights(args: Args) -> dict[fx.Node, Weight]:
    """What is not summed over is an output."""
    found: dict[fx.Node, Weight] = {}
    for name in ("self", "other"):
        rank = len(tensor_info(args[name]).shape)
        into = tuple(d % rank for d in args[f"dims_{name}"])
        found[args[name]] = Weight(tuple(d for d in range(rank) if d not in into), into)
    return found


@rule("tensordot", weights=_tensordot_weights, product=True)
def tensordot(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Pairs of dims are summed over; the rest of the one, then of the other, leaves."""
    del node
    rest: list[Term] = []
    summed: list[list[Term]] = []
    for name in ("self", "other"):
        terms = walk.of(args[name])
        into = dims_of(args[f"dims_{name}"], len(terms))
        summed.append([terms[d] for d in into])
        rest += [t for d, t in enumerate(terms) if d not in into]
        walk.weight(args[name], *range(len(terms)))
    for mine, theirs in zip(*summed, strict=True):
        walk.contract(walk.unify(mine, theirs))
    return tuple(rest)


@rule("bilinear", weights={"weight": Weight(out=0, into=(1, 2))}, parameters=("bias",))
def bilinear(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """x1' W_o x2 for every output o."""
    del node
    x1, x2, weight = (walk.of(args[n]) for n in ("input1", "input2", "weight"))
    walk.contract(walk.unify(x1[-1], weight[1]))
    walk.contract(walk.unify(x2[-1], weight[2]))
    walk.weight(args["weight"], 0, 1, 2)
    add_bias(walk, args["bias"], weight[0])
    return (*_batch(walk, x1[:-1], x2[:-1]), weight[0])


def _einsum_weights(args: Args) -> dict[fx.Node, Weight]:
    """A letter that leaves is an output, one that does not is summed over."""
    left, _, right = args["equation"].replace(" ", "").partition("->")
    found: dict[fx.Node, Weight] = {}
    for subscripts, tensor in zip(left.split(","), args["tensors"], strict=True):
        if "..." not in subscripts:
            out = tuple(i for i, c in enumerate(subscripts) if c in right)
            found[tensor] = Weight(
                out, tuple(i for i, c in enumerate(subscripts) if c not in right)
            )
    return found


@rule("einsum", weights=_einsum_weights, product=True)
def einsum(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Equal letters are one axis; letters missing from the output are summed over."""
    equation = args["equation"].replace(" ", "")
    if "..." in equation:
        equation = _spell_ellipsis(equation, [len(walk.of(t)) for t in args["tensors"]])
    left, _, right = equation.partition("->")
    if "->" not in equation:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    letters = _letters(walk, left.split(","), args["tensors"])
    for letter in set(left) - {","} - set(right):
        walk.contract(letters[letter])
    operands = left.split(",")
    batch = {c for c in right if len(operands) > 1 and all(c in o for o in operands)}
    for subscripts, tensor in zip(operands, args["tensors"], strict=True):
        summed = [i for i, c in enumerate(subscripts) if c not in right]
        leaving = [i for i, c in enumerate(subscripts) if c in right and c not in batch]
        walk.weight(tensor, *_letter_features(tensor, args["tensors"], (summed, leaving)))
    del node
    return tuple(letters[c] for c in right)


def _letter_features(
    value: fx.Node, tensors: Sequence[fx.Node], dims: tuple[list[int], list[int]]
) -> list[int]:
    """As for a product: an operand that is no weight makes both sides of a parameter features."""
    if not all(map(is_weight, tensors)):
        return [*dims[0], *dims[1]] if is_picked(value) else dims[0]
    return dims[0] if all(map(is_picked, tensors)) else []


def _letters(walk: Walk, subscripts: list[str], tensors: Sequence[fx.Node]) -> dict[str, Term]:
    letters: dict[str, Term] = {}
    for text, tensor in zip(subscripts, tensors, strict=True):
        for letter, term in zip(text, walk.of(tensor), strict=True):
            known = letters.get(letter, ())
            letters[letter] = walk.unify(known, term) if known and term else (known or term)
    return letters


def _spell_ellipsis(equation: str, ranks: list[int]) -> str:
    """Give the dims behind `...` letters of their own (upper case from Z down)."""
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    hidden = [
        r - len(o.replace("...", "")) if "..." in o else 0
        for o, r in zip(operands, ranks, strict=True)
    ]
    used = set(equation)
    spare = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in used][: max(hidden)]
    names = [
        o.replace("...", "".join(spare[len(spare) - h :]))
        for o, h in zip(operands, hidden, strict=True)
    ]
    if not arrow:
        free = "".join(
            sorted(c for c in set("".join(names)) - set(spare) if "".join(names).count(c) == 1)
        )
        return ",".join(names) + "->" + "".join(spare) + free
    return ",".join(names) + "->" + right.replace("...", "".join(spare))


@rule("embedding", parameters=("weight",), lookup=True)
def embedding(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Rows are looked up and stay, columns are features."""
    del node
    weight = walk.of(args["weight"])
    walk.fix(weight[0], "vocabulary")
    walk.weight(args["weight"], 1)
    return (*walk.of(args["indices"]), weight[1])


@rule("embedding_bag", "_embedding_bag", parameters=("weight",), lookup=True)
def embedding_bag(walk: Walk, node: fx.Node, args: Args) -> Result:
    """As an embedding, summed over each bag."""
    weight = walk.of(args["weight"])
    walk.fix(weight[0], "vocabulary")
    walk.weight(args["weight"], 1)
    shapes = walk.shapes(node)
    bags = walk.fresh(shapes[0][0], "input")
    rest = [tuple(walk.fresh(n, "input") for n in s) for s in shapes[1:]]
    if args.get("mode") == LARGEST:  # and the row that each unit was found in
        rest[-1] = (*rest[-1][:1], weight[1])
    return ((bags, weight[1]), *rest)


# torch's word for a bag of which each unit's largest value is taken.
LARGEST = 2


@rule("_weight_norm", reparametrises=True)
def weight_norm(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """g v / |v|: a parameter-only statistic over all dims but one."""
    del node
    v = walk.of(args["v"])
    for i, term in enumerate(v):
        if i != args["dim"]:
            walk.mix(term)
    broadcast(walk, [args["v"], args["g"]])
    return v
