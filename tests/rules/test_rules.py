"""Every row of the rule table against arithmetic: the narrow model is built by hand.

The model around an op is run again over weights that are sliced here, by prefixes of the width that
the test chose, and taken for what the sub-model must compute. Then the laws of masked nesting.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import verify
from matryoshkafy.graph.nodes import op_key
from matryoshkafy.graph.reductions import PAIRS
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.freeze import Request
from matryoshkafy.plan.plan import Options
from matryoshkafy.plan.solve import solve
from matryoshkafy.plan.walk import propagate
from matryoshkafy.rules import OPS
from matryoshkafy.rules.table import Op
from tests.fuzz.building import Builder, Run, Value, direct_trace
from tests.rules.cases import CASES, WIDTH, Case

aten = torch.ops.aten

# Keys that no case can bring into a graph, and why.
COMPOSITE = "a function of Python, no op: it enters a graph as the ops that it is made of"
EXEMPT: dict[str, str] = {
    **dict.fromkeys(
        ("softsign", "tanhshrink", "softmin", "lp_pool1d", "lp_pool2d", "lp_pool3d", "float",
         "_adaptive_avg_pool1d"), COMPOSITE),
    "requires_grad_": "returns its input; recorded as the input itself",
    "addbmm_": "writes into its first argument; cleaning gives addbmm",
    **dict.fromkeys(("sym_size", "sym_numel", "size", "numel"), "gives an integer, no tensor"),
    "tensor": "torch.tensor is recorded as a constant of the model",
    "_grouped_mm": "bfloat16 on a GPU only",
    "_sparse_mm": "needs a sparse buffer, which the recorder of these cases has not",
    "upsample_nearest2d_backward": "in backward graphs only",
}  # fmt: skip
# Spellings that cleaning turns into another before the rules see them.
CLEANED = {"alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "view", "index_put_"}
CLEANED |= {op_key(pair) for pair in PAIRS}  # a pair of statistics becomes two ops


def overload(key: str) -> Callable[..., Any]:
    """Return a function that picks the overload of an op that takes the arguments."""
    packet = getattr(aten, key)
    names = [n for n in packet.overloads() if "out" not in n.split("_") and not n.endswith("out")]
    return _Picker(packet, names).pick


class _Picker:
    def __init__(self, packet: Any, names: list[str]) -> None:
        self.packet, self.names = packet, names

    def pick(self, b: Builder, args: Any, kwargs: Any) -> Any:
        errors = []
        for name in self.names:
            try:
                return b(getattr(self.packet, name), *args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                errors.append(f"{name}: {str(error)[:90]}")
        raise AssertionError(f"no overload of {self.packet} takes this: {errors}")


def forward(b: Builder, case: Case, given: Tensor) -> Value:
    """x -> a layer of the width -> the op -> a layer -> tanh -> a head."""
    x, pick = b.input(given), overload(case.key)
    if case.start == "image":
        x = b(aten.conv2d.default, x, b.param(WIDTH, 3, 1, 1), b.param(WIDTH))
    elif case.start == "channels":
        x = b(aten.conv1d.default, x, b.param(WIDTH, 3, 1), b.param(WIDTH))
    else:
        x = b(aten.linear.default, x, b.param(WIDTH, 3), b.param(WIDTH))
    y = case.body(b, lambda *args, **kwargs: pick(b, args, kwargs), x)
    return _read(b, _real(b, y, noise=case.noise), last=case.start == "sequence")


def _real(b: Builder, y: Value, *, noise: bool) -> Value:
    if noise:
        y = b(aten.zeros_like.default, y)
    elif y.tensor.is_complex():
        y = b(aten.real.default, y)
    return y if y.tensor.dtype == torch.float64 else b(aten.to.dtype, y, torch.float64)


def _read(b: Builder, y: Value, *, last: bool) -> Value:
    if not last and len(y.shape) > 2:
        y = b(aten.movedim.int, y, 1, -1)
    hidden = b(aten.linear.default, y, b.param(6, y.width, scale=0.3), b.param(6))
    return b(aten.linear.default, b(aten.tanh.default, hidden), b.param(5, hidden.width))


def example(case: Case) -> Tensor:
    shape = {"sequence": (2, 6, 3), "channels": (2, 3, 6), "image": (2, 3, 4, 4)}[case.start]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@cache
def built(number: int) -> tuple[Run, fx.GraphModule, Tensor, Tensor, Trace]:
    """Return the model of a case: run, module, input, eager output, trace."""
    case, run = CASES[number], Run(random.Random(number))
    builder, x = Builder(run), example(CASES[number])
    y = forward(builder, case, x)
    module = builder.finish([y]).eval()
    return run, module, x, y.tensor, direct_trace(module, (x,))


def doll_of(trace: Trace, nesting: str) -> Doll:
    return Doll(trace, solve(trace, propagate(trace), Request(Options(nesting), [0.5, 1.0])))


def name_of(case: Case) -> str:
    return f"{case.key}{'-whole' if case.holds else ''}-{case.start}"


# Rows that do not do what they say yet: their ops freeze what they touch, or fail.
GRAPH, NARROW, PREFIX = "graph", "narrow", "prefix"
KNOWN: dict[str, tuple[str, ...]] = {}


def numbered(test: str) -> Any:
    """Return the parametrisation of a test over all cases; what is known to fail must fail."""
    return pytest.mark.parametrize("number", [_case(i, c, test) for i, c in enumerate(CASES)])


def _case(number: int, case: Case, test: str) -> Any:
    reason, *failing = KNOWN.get(case.key, ("",))
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if test in failing else []
    return pytest.param(number, id=name_of(case), marks=marks)


def _is_ours(op: Op) -> bool:
    return op.axes is None or op.axes.__module__.startswith("matryoshkafy.")


def test_every_rule_has_a_case() -> None:
    # A rule of somebody's own (the example's scan) has its case beside it.
    ours = {key for key, op in OPS.items() if _is_ours(op)}
    missing = sorted(ours - {c.key for c in CASES} - EXEMPT.keys())
    assert not missing, f"rules without a case in tests/rules/cases.py: {' '.join(missing)}"
    assert not EXEMPT.keys() & {c.key for c in CASES}
    stale = sorted({c.key for c in CASES} - OPS.keys())
    assert not stale, f"cases of ops without a rule: {' '.join(stale)}"


@numbered(GRAPH)
def test_the_op_stands_in_the_graph(number: int) -> None:
    case = CASES[number]
    *_, trace = built(number)
    keys = {op_key(n.target) for n in trace.graph.nodes if n.op == "call_function"}
    assert case.key in keys or case.key in CLEANED
    assert not propagate(trace).unknown


@numbered(NARROW)
def test_sliced_is_the_narrow_model(number: int) -> None:
    run, module, x, full, trace = built(number)
    case, doll = CASES[number], doll_of(trace, "sliced")
    assert torch.equal(doll(x)[0], full) or torch.allclose(doll(x)[0], full, 1e-12, 1e-12)
    small = mk.slice(doll, doll.sizes[0])
    weights = dict(small.state_dict())
    assert len(weights["p0"]) == (WIDTH if case.holds else WIDTH // 2), str(doll.plan)
    state = module.state_dict()
    assert torch.equal(weights["p0"], state["p0"][: len(weights["p0"])])
    replay = Run(random.Random(0), state | weights, run.log, (x,))
    expected = forward(Builder(replay), case, x).tensor
    assert torch.allclose(small(x)[0], expected, 1e-12, 1e-12, equal_nan=True)
    assert torch.allclose(doll.outputs(x)[doll.sizes[0]][0], expected, 1e-12, 1e-12, equal_nan=True)


@numbered(PREFIX)
def test_masked_keeps_the_prefix_law(number: int) -> None:
    _, _, x, _, trace = built(number)
    doll = doll_of(trace, "masked")
    report = verify(doll, (x,))
    if CASES[number].noise:
        assert all(s.output_error == s.beyond_error == 0 and s.resliced for s in report.sizes)
    else:
        assert report.passed, f"{report}\n{doll.plan}"
