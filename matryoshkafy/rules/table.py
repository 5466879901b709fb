"""The one table: a row says all that the library knows of an op. Adding an op adds a row.

A row's rule says how axes cross the op. It receives the walk (where terms are looked up, made one,
or held fixed), the node, and the node's arguments by their schema names; it returns the terms of
the output, one per dimension (a tuple of such tuples where the op returns several tensors). Rules
never traverse and keep no state. The other fields say what the later stages need: which arguments
are weights, which are sizes, what kind of statistic the op takes. No stage keeps a list of op names
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from torch import fx

from matryoshkafy.axes.dims import Dim
from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import Argument, bound_args, op_key, tensor_info
from matryoshkafy.graph.vocabulary import BASICS, Basics, basics_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Terms = tuple[Term, ...]
Args = Mapping[str, Any]


class Walk(Protocol):
    """What a rule may ask for while the graph is walked once."""

    def of(self, value: object) -> Terms:
        """Return the terms of a traced tensor, one per dimension."""
        ...

    def shape(self, value: object) -> tuple[int, ...]:
        """Return the concrete shape of a traced tensor."""
        ...

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the concrete shapes of all outputs of a node."""
        ...

    def unify(self, a: Term, b: Term) -> Term:
        """Make two terms one; where they cannot be aligned both are held fixed."""
        ...

    def fix(self, term: Term, kind: str) -> Term:
        """Hold a term at its full size; `kind` is a word of the plan's vocabulary."""
        ...

    def fresh(self, size: int, kind: str | None = None, name: str = "") -> Term:
        """Return a new axis; fixed from the start where `kind` says why."""
        ...

    def weight(self, value: object, *dims: int) -> None:
        """Mark dims of a value that comes from parameters alone as features."""
        ...

    def is_feature(self, term: Term) -> bool:
        """Tell whether a weight before the node at hand has an axis of the term."""
        ...

    def contract(self, term: Term) -> None:
        """Record that the node at hand sums over the term."""
        ...

    def mix(self, term: Term) -> None:
        """Record that the node at hand takes statistics over the term."""
        ...

    def note(self, name: str, term: Term) -> None:
        """Keep a term that the rewriting of this node needs (the groups of a convolution)."""
        ...


class Sizes(Protocol):
    """What a function behind `sizes=` may ask for: one node being written at one size."""

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the new node by their schema names."""
        ...

    @property
    def source(self) -> tuple[Dim, ...]:
        """The dims of the op's first argument, at full size."""
        ...

    @property
    def outputs(self) -> tuple[tuple[Dim, ...], ...]:
        """The dims of each output, at full size."""
        ...

    def note(self, name: str) -> Dim | None:
        """Return the dim that the op's rule kept with `walk.note`."""
        ...

    def at(self, dim: Dim) -> int:
        """Return the units of a dim at this size."""
        ...

    def kept_before(self, dim: Dim, index: int) -> int:
        """Return how many of the first `index` units of a dim are kept at this size."""
        ...

    def scaled(self, value: Argument, dim: Dim) -> Any:
        """Return a constant that is the size of a dim at this size (a symbol keeps its ratio)."""
        ...

    def set(self, name: str, value: Argument) -> None:
        """Write an argument of the new node."""
        ...

    def replace(self, target: Callable[..., object], *args: Argument) -> None:
        """Make the new node a call of another op."""
        ...


@dataclass(frozen=True)
class Weight:
    """How an op reads an argument that is a weight; -1 is the last dim.

    Args:
        out: which dims are outputs of the op.
        into: which dims are summed over.
    """

    out: int | tuple[int, ...] = 0
    into: int | tuple[int, ...] = 1

    def dims(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return both for a weight of a rank; a vector is summed over whole."""
        if rank == 1:
            return (), (0,)
        sides = ((s,) if isinstance(s, int) else s for s in (self.out, self.into))
        out, into = (tuple(d % rank for d in side) for side in sides)
        return out, into


# The terms of the output; a tuple of such for several outputs; None where a use is not foreseen.
Result = Terms | tuple[Terms, ...] | None
Rule = Callable[[Walk, fx.Node, Args], Result]
FoundWeights = Callable[[Args], Mapping[fx.Node, Weight]]
Resizer = Callable[[Sizes], None]


@dataclass(frozen=True)
class Op:
    """All that is known of an op.

    Attributes:
        key: its schema name, without "aten::".
        axes: how axes cross it; None where no rule is known, so that what it touches stays whole.
        weights: {argument: dims of the weight}, or a function that finds them among the arguments.
        parameters: arguments other than weights where parameters stand (bias, running_mean).
        sizes: the argument with the sizes of the last dims of the output, or a function that writes
            every constant that is a size.
        statistic: for a reduction, the kind of statistic that masked nesting takes at each level
            (mean, sum, var, std, amax, amin, norm); "normalise" for a norm layer.
        nested: the operator of the library that computes the op in masked nesting (linear, product,
            conv, layer_norm, rms_norm, group_norm); "" where masked weights do.
        adds: whether it adds up units in a way that is no `statistic` (distances).
        clamps: whether it may read the smallest size alone where it ends a width in a whole axis;
            contractions and statistics always may.
        product: whether either operand of it may be an activation (matmul).
        picks: whether what it picks or rearranges of a weight is a weight still (index, transpose).
        joins: whether it lays tensors side by side, and does as well without those of no units.
        lookup: whether it looks up rows of a table by index.
        elementwise: whether each output element depends on the elements at its place alone.
        nonlinear: whether it is an activation function.
        scaling: whether a constant operand scales a tensor (mul, div).
        factor: the argument that multiplies the sums of products (attention's scale) or an operand.
        casts: whether it changes the dtype alone.
        counts: whether its values count its units (arange).
        fills: whether it writes a constant, which may be infinite (masked_fill).
        algebra: what it does to the units of an axis seen as a vector, a word of `rules/algebra.py`
            ("same", "carry", "add", ...); "" where it acts on each of them in a way of its own.
        reads: of a product, the argument whose dim is summed over, and that dim.
        measures: whether it gives sizes of its argument and nothing of its values (sym_size).
        shares: whether it gives each unit's share of a whole (softmax), its logarithm, or that of
            the whole (logsumexp).
        attends: whether it is fused attention, with the arguments of
            `torch.nn.functional.scaled_dot_product_attention`.
        reparametrises: whether it is g v / |v| of the arguments v, g and dim, which a sub-model
            keeps: v becomes the cut weight and g its norm.
        contiguous: arguments that its kernels on some device read as one block of memory, so that
            what was cut of a weight is copied first (cuDNN's recurrent layers).
    """

    key: str
    axes: Rule | None = None
    weights: Mapping[str, Weight] | FoundWeights = field(default_factory=dict[str, Weight])
    parameters: tuple[str, ...] = ()
    sizes: str | Resizer | None = None
    statistic: str = ""
    nested: str = ""
    adds: bool = False
    clamps: bool = False
    product: bool = False
    picks: bool = False
    joins: bool = False
    lookup: bool = False
    elementwise: bool = False
    nonlinear: bool = False
    scaling: bool = False
    factor: str = ""
    casts: bool = False
    counts: bool = False
    fills: bool = False
    algebra: str = ""
    reads: tuple[str, int] | None = None
    measures: bool = False
    shares: bool = False
    attends: bool = False
    reparametrises: bool = False
    contiguous: tuple[str, ...] = ()

    @property
    def clampable(self) -> bool:
        """Whether it still computes a contraction where its operands are cut."""
        reduces = bool(self.statistic) and self.statistic != "normalise"
        return self.clamps or bool(self.weights) or reduces

    @property
    def uniform(self) -> bool:
        """Whether it gives one number at every unit."""
        return self.algebra in ("zero", "uniform")

    @property
    def totals(self) -> bool:
        """Whether what it gives over some units is compared with their number."""
        return self.adds or self.statistic in ("sum", "mean", "norm")

    @property
    def training(self) -> str:
        """The argument that follows `self.training`, "" where there is none."""
        return basics_of(self.key).training

    @property
    def one_type(self) -> bool:
        """Whether operands of two floating types are an error."""
        return basics_of(self.key).one_type

    def weight_arguments(self) -> tuple[str, ...]:
        """Return the arguments where weights and other parameters stand."""
        named = () if callable(self.weights) else tuple(self.weights)
        return self.parameters if self.product else (*named, *self.parameters)


class Facts(TypedDict, total=False):
    """What a row may say of an op beside its rule: the fields of `Op` and of `Basics`."""

    weights: Mapping[str, Weight] | FoundWeights
    parameters: tuple[str, ...]
    sizes: str | Resizer
    statistic: str
    nested: str
    training: str
    one_type: bool
    adds: bool
    clamps: bool
    product: bool
    picks: bool
    joins: bool
    lookup: bool
    elementwise: bool
    nonlinear: bool
    scaling: bool
    factor: str
    casts: bool
    counts: bool
    fills: bool
    algebra: str
    reads: tuple[str, int] | None
    measures: bool
    shares: bool
    attends: bool
    reparametrises: bool
    contiguous: tuple[str, ...]


OPS: dict[str, Op] = {}


def rule(*ops: object, **facts: Unpack[Facts]) -> Callable[[Rule], Rule]:
    """Register a row for each op: the rule that is decorated, and what else is known of the op.

    Args:
        ops: overloads (`torch.ops.mylib.scan.default`), packets, or schema names.
        facts: the fields of `Op`; `training` names the argument that follows `self.training`, and
            `one_type` says that operands of two floating types are an error.

    Example:
        @mk.rule(torch.ops.mylib.scan, parameters=("decay",))
        def scan(walk, node, args):
            return walk.of(args["x"])

    Raises:
        ValueError: an op has a row already (two rules for one op would be a guess), or a fact is
            no field of a row.
    """
    known = dict(facts)
    words = [f.name for f in (*fields(Op), *fields(Basics)) if f.name not in ("key", "axes")]
    strange = sorted(known.keys() - set(words))
    if strange:
        raise ValueError(f"mk.rule was given {strange[0]!r}; a row says {', '.join(words)}")
    early = {f.name: known.pop(f.name) for f in fields(Basics) if f.name in known}

    def register(function: Rule) -> Rule:
        for key in map(op_key, ops):
            if key in OPS:
                owner = getattr(OPS[key].axes, "__name__", "")
                raise ValueError(f"{key!r} has a rule already ({owner})")
            OPS[key] = Op(key, function, **known)  # type: ignore[arg-type]
            if early:
                BASICS[key] = Basics(**early)  # type: ignore[arg-type]
        return function

    return register


def also(keys: Iterable[str], **facts: Unpack[Facts]) -> None:
    """Say more of ops that have a row."""
    for key in keys:
        OPS[key] = replace(OPS[key], **facts)  # type: ignore[arg-type]


def op_of(node: fx.Node) -> Op:
    """Return the row of a node's op; one without a rule where the table has none."""
    key = op_key(node)
    return OPS.get(key) or Op(key)


def dims_of(value: int | Iterable[int], rank: int) -> list[int]:
    """Return dims as a list of numbers from 0: -1 is the last, a number is one dim."""
    return [d % rank for d in ([value] if isinstance(value, int) else value)]


def reduced_dims(node: fx.Node) -> list[int] | None:
    """Return the dims that a statistic reduces; None of any other op, and of one over all dims."""
    dim: int | list[int] | None = bound_args(node).get("dim") if op_of(node).statistic else None
    if dim is None or dim == []:
        return None
    return dims_of(dim, len(tensor_info(node.all_input_nodes[0]).shape))


def hold(walk: Walk, terms: Iterable[Term], kind: str) -> None:
    """Hold terms at their full sizes, see `Walk.fix`."""
    for term in terms:
        walk.fix(term, kind)


def meet(walk: Walk, a: Terms, b: Terms) -> None:
    """Make the dims of two values one, from the right, where both have units."""
    for mine, theirs in zip(a[::-1], b[::-1], strict=False):
        if mine and theirs:
            walk.unify(mine, theirs)
