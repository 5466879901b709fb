"""Ops that treat every element alike: dimensions broadcast and become one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import info_of, is_tensor
from matryoshkafy.rules.table import Args, Result, Terms, Walk, hold, op_of, rule

ACTIVATIONS = """
    tanh relu gelu silu elu mish leaky_relu hardswish relu6 selu
    """.split()
UNARY = """
    abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sign sgn floor ceil
    round
    trunc frac sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv sigmoid
    logit celu hardsigmoid hardtanh softplus
    softsign hardshrink softshrink threshold log_sigmoid tanhshrink rrelu
    clamp clamp_min clamp_max clip nan_to_num isnan isinf isfinite logical_not bitwise_not
    alias detach positive dropout alpha_dropout bernoulli poisson
    uniform exponential geometric cauchy log_normal normal_functional random
    zeros_like ones_like rand_like randn_like zero
    conj resolve_conj _conj resolve_neg conj_physical real imag angle deg2rad rad2deg lgamma digamma
    requires_grad_ lift_fresh lift_fresh_copy polygamma i0 sinc heaviside float
    """.split()
NARY = """
    copy
    remainder fmod pow maximum minimum fmax fmin atan2
    eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    __and__ __or__ __xor__ __lshift__ __rshift__ lerp
    copysign hypot logaddexp logaddexp2 xlogy polar complex greater less
    greater_equal less_equal not_equal float_power bitwise_left_shift bitwise_right_shift
    floor_divide
    tanh_backward sigmoid_backward softplus_backward silu_backward gelu_backward elu_backward
    leaky_relu_backward threshold_backward hardtanh_backward mish_backward
    """.split()


def broadcast(walk: Walk, values: Sequence[object]) -> Terms:
    """Return the terms of values broadcast together, from the right."""
    terms = [walk.of(v) for v in values]
    rank = max((len(t) for t in terms), default=0)
    out: list[Term] = [()] * rank
    for value in terms:
        for i, term in enumerate(value, rank - len(value)):
            if term:
                out[i] = walk.unify(out[i], term) if out[i] else term
    return tuple(out)


def _tensors(node: fx.Node) -> list[fx.Node]:
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    nodes += [a for a in node.kwargs.values() if isinstance(a, fx.Node)]
    return [n for n in nodes if is_tensor(n)]


@rule(*UNARY, *NARY, elementwise=True)
@rule(*ACTIVATIONS, elementwise=True, nonlinear=True)
@rule("mul", "div", "true_divide", "multiply", "divide", elementwise=True, scaling=True)
@rule("add", "sub", "rsub", "subtract", elementwise=True, factor="alpha")
@rule("addcmul", "addcdiv", elementwise=True, factor="value")
@rule("to", "_to_copy", elementwise=True, casts=True, picks=True)
@rule("contiguous", "clone", elementwise=True, picks=True)
@rule("where", "masked_fill", "fill", elementwise=True, fills=True)
@rule("full_like", elementwise=True, fills=True, factor="fill_value")
@rule("_prelu_kernel", elementwise=True, parameters=("weight",))
def pointwise(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Every tensor argument broadcasts with every other."""
    del args
    if isinstance(info_of(node), tuple):  # where(condition): as many rows as it holds
        return None
    return broadcast(walk, _tensors(node))


@rule("type_as", elementwise=True, casts=True, picks=True)
@rule("feature_dropout", "feature_alpha_dropout")
def first_alone(walk: Walk, node: fx.Node, args: Args) -> Result:
    """The first tensor gives its dims; another tells its type alone."""
    del node
    return walk.of(next(iter(args.values())))


@rule("broadcast_tensors")
def broadcast_tensors(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Every tensor gets the dims of all."""
    del node
    return (broadcast(walk, list(args["tensors"])),) * len(args["tensors"])


@rule("meshgrid")
def meshgrid(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A dim for each vector; in "xy" the first two change places."""
    del node
    terms = [walk.of(t)[0] if walk.of(t) else () for t in args["tensors"]]
    if args.get("indexing") == "xy":
        terms[:2] = terms[1::-1]
    return (tuple(terms),) * len(terms)


@rule("outer", "ger")
def outer(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Every element with every other."""
    del node
    names = list(args)
    return (*walk.of(args[names[0]]), *walk.of(args[names[1]]))


@rule("kron")
def kron(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Every element of the one with every element of the other: a product, dim by dim."""
    del node
    a, b = walk.of(args["self"]), walk.of(args["other"])
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b
    return tuple((*x, *y) for x, y in zip(a, b, strict=True))


@rule("expand_as", elementwise=True)
def like_other(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A dim of size 1 is repeated to the other's."""
    del node
    other, mine = walk.of(args["other"]), walk.of(args["self"])
    offset = len(other) - len(mine)
    return tuple(
        walk.unify(mine[i - offset], t) if i >= offset and mine[i - offset] else t
        for i, t in enumerate(other)
    )


@rule("prelu", parameters=("weight",))
def prelu(walk: Walk, node: fx.Node, args: Args) -> Result:
    """The slopes belong to the channels (dim 1)."""
    del node
    x, slopes = walk.of(args["self"]), walk.of(args["weight"])
    if slopes and slopes[0] and len(x) > 1:
        walk.unify(x[1], slopes[0])
    return x


@rule("view_as_real")
def view_as_real(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A complex dim gains (re, im) at the end."""
    del node
    return (*walk.of(args["self"]), walk.fresh(2, "complex parts"))


@rule("view_as_complex")
def view_as_complex(walk: Walk, node: fx.Node, args: Args) -> Result:
    """The trailing (re, im) goes away."""
    del node
    terms = walk.of(args["self"])
    walk.fix(terms[-1], "complex parts")
    return terms[:-1]


@rule("tril", "triu", fills=True)
def triangle(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Which elements stay depends on the position in the last two dims."""
    del node
    terms = walk.of(args["self"])
    hold(walk, terms[-2:], "indexed")
    return terms


def _constant_along(walk: Walk, mask: fx.Node) -> bool:
    """Tell whether a mask is one value along its last dim: it was expanded from size 1."""
    while walk.shape(mask)[-1:] != (1,):
        row = op_of(mask)
        if not row.casts and row.algebra not in ("spread", "same"):
            return False
        mask = mask.all_input_nodes[0]
    return True


@rule("masked_scatter")
def masked_scatter(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Rows of the source replace masked rows of x: a mask that is constant over the last dim."""
    del node
    x, source = walk.of(args["self"]), walk.of(args["source"])
    mask = args["mask"]
    constant = _constant_along(walk, mask)
    broadcast(walk, [args["self"], mask])
    if constant and walk.shape(args["source"])[-1:] == walk.shape(args["self"])[-1:]:
        walk.unify(x[-1], source[-1])
        rest = (*x[:-1], *source[:-1])
    else:
        rest = (*x, *source)
    hold(walk, rest, "indexed")
    return x
