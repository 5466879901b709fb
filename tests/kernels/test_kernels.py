"""The operators against plain forms in float64, against slices, and in torch's machinery."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels import ops, tiling
from matryoshkafy.kernels.levels import levels_of
from tests.kernels import reference

nested = torch.ops.matryoshkafy
NAN = float("nan")

RUNS = {
    "doubling": [2, 0, 2, 1, 4, 2, 8, 3],
    "packed": [2, 0, 3, 1, 2, 0, 3, 1, 2, 0, 3, 1],
    "down and up": [3, 2, 1, 0, 2, 1, 4, 2, 1, 0],
    "one level": [7, 0],
    "gaps": [2, 1, 0, 3, 3, 5],
    "ones": [1, 0, 1, 1, 1, 2],
}
CHEAP = tiling.Estimate(1e-12, 1e9, 1e15)
DEAR = tiling.Estimate(1e3, 1e15, 1e15)


@pytest.fixture(params=["tiled", "dense"])
def cut(request, monkeypatch):
    """Forces the finest cut, which small shapes would not get, or one dense product."""
    cost = {"tiled": CHEAP, "dense": DEAR}[request.param]
    monkeypatch.setattr(tiling, "COSTS", {})
    monkeypatch.setattr(tiling, "DEFAULT", cost)
    tiling.tiling.cache_clear()
    tiling.conv_tiling.cache_clear()
    yield request.param
    tiling.tiling.cache_clear()
    tiling.conv_tiling.cache_clear()


def draw(*shape, seed=0, dtype=torch.float64):
    """Small integers: sums of products are exact, so results are compared with ==."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=g).to(dtype).requires_grad_()


def length(runs):
    return sum(runs[::2])


def zeros_of(out_runs, in_runs):
    return reference.levels(out_runs)[:, None] < reference.levels(in_runs)[None, :]


def agree(ours, theirs, *leaves, exact=True):
    """Values and gradients are the same."""
    close = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(ours, theirs, **close)
    slope = draw(*theirs.shape, seed=9).detach().to(theirs.dtype)
    found = torch.autograd.grad(ours, leaves, slope)
    expected = torch.autograd.grad(theirs, leaves, slope)
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("out", RUNS)
@pytest.mark.parametrize("inner", RUNS)
@pytest.mark.parametrize("biased", [True, False])
def test_linear(cut, out, inner, biased):
    out_runs, in_runs = RUNS[out], RUNS[inner]
    x, w = draw(3, 4, length(in_runs)), draw(length(out_runs), length(in_runs), seed=1)
    b = draw(length(out_runs), seed=2) if biased else None
    leaves = (x, w, b) if biased else (x, w)
    ours = nested.linear(x, w, b, out_runs, in_runs)
    agree(ours, reference.linear(x, w, b, out_runs, in_runs), *leaves)


@pytest.mark.parametrize("out", RUNS)
@pytest.mark.parametrize("inner", RUNS)
def test_linear_never_reads_a_structural_zero(cut, out, inner):
    out_runs, in_runs = RUNS[out], RUNS[inner]
    x, w = draw(5, length(in_runs)), draw(length(out_runs), length(in_runs), seed=1)
    beyond = zeros_of(out_runs, in_runs)
    poisoned = w.detach().masked_fill(beyond, NAN).requires_grad_()
    y = nested.linear(x, poisoned, None, out_runs, in_runs)
    assert torch.equal(y, reference.linear(x, w, None, out_runs, in_runs))
    dx, dw = torch.autograd.grad(y.sum(), (x, poisoned))
    assert dx.isfinite().all() and dw.isfinite().all() and not dw[beyond].any()


@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 16), (2, 0, 16), (2, 3, 2, 16)])
def test_linear_ranks_and_empty_batches(cut, shape):
    runs = RUNS["doubling"]
    x, w, b = draw(*shape), draw(16, 16, seed=1), draw(16, seed=2)
    agree(nested.linear(x, w, b, runs, runs), reference.linear(x, w, b, runs, runs), x, w, b)


def test_linear_layouts(cut):
    runs, other = RUNS["doubling"], RUNS["packed"]
    x, stored = draw(16, 3, 5).transpose(0, 2), draw(16, 15, seed=1)
    x = x.detach().requires_grad_()
    w = stored.t()
    assert not x.is_contiguous() and not w.is_contiguous()
    agree(
        nested.linear(x, w, None, other, runs), reference.linear(x, w, None, other, runs), x, stored
    )
    y = nested.linear(x, w, None, other, runs)
    expected = reference.linear(x, w, None, other, runs)
    expanded = torch.autograd.grad(y.sum(), (x, stored))
    assert all(map(torch.equal, expanded, torch.autograd.grad(expected.sum(), (x, stored))))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_linear_computes_only_wanted_gradients(cut, wanted):
    runs = RUNS["doubling"]
    given = [draw(3, 16), draw(16, 16, seed=1), draw(16, seed=2)]
    given = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(given)]
    y, expected = nested.linear(*given, runs, runs), reference.linear(*given, runs, runs)
    assert y.requires_grad == bool(wanted)
    if wanted:
        agree(y, expected, *[given[k] for k in wanted])


def test_linear_prefix_is_the_sliced_linear(cut):
    runs = RUNS["doubling"]
    x, w, b = draw(5, 16), draw(16, 16, seed=1), draw(16, seed=2)
    y = nested.linear(x, w, b, runs, runs)
    blocks = (
        torch.cat(
            [w[lo:hi, :hi] @ x[:, :hi].t() for lo, hi in [(0, 2), (2, 4), (4, 8), (8, 16)]]
        ).t()
        + b
    )
    assert torch.equal(y, blocks)
    for m in (2, 4, 8):
        short = (
            nested.linear(x[:, :m], w[:m, :m], b[:m], [m, 0], [m, 0])
            if m == 2
            else nested.linear(x[:, :m], w[:m, :m], b[:m], cropped(runs, m), cropped(runs, m))
        )
        assert torch.equal(y[:, :m], short)


def cropped(runs, m):
    kept = levels_of(tuple(runs))[:m]
    return [part for level in kept for part in (1, level)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6),
    st.sampled_from([CHEAP, DEAR, replace(CHEAP, call=1e-8)]),
)
def test_linear_any_runs(out, inner, cost):
    out_runs, in_runs = ([n for pair in pairs for n in pair] for pairs in (out, inner))
    x, w = draw(3, length(in_runs)), draw(length(out_runs), length(in_runs), seed=1)
    cut = tiling.cut_all(tuple(out_runs), tuple(in_runs), 2, cost)
    covered = torch.zeros(length(out_runs), length(in_runs), dtype=torch.int)
    for tile in (*cut.widest_first, *cut.holes):
        tile.of(covered).add_(1)
    assert (covered == 1).all() or not covered.numel()
    y = nested.linear(x, w, None, out_runs, in_runs)
    agree(y, reference.linear(x, w, None, out_runs, in_runs), x, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_error_is_that_of_torch(cut, dtype):
    runs = [16, 0, 16, 1, 32, 2]
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=g) for n in (100, 64))
    truth = reference.linear(x.double(), w.double(), None, runs, runs)
    ours = nested.linear(x.to(dtype), w.to(dtype), None, runs, runs)
    theirs = reference.linear(x.to(dtype), w.to(dtype), None, runs, runs)
    assert ours.dtype == dtype
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


CONVS = {
    "1d": ((9,), (3,), dict(stride=[2], padding=[1], dilation=[1])),
    "2d": ((6, 5), (3, 2), dict(stride=[1, 2], padding=[1, 0], dilation=[1, 2])),
    "pointwise": ((4, 4), (1, 1), dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1])),
    "3d": ((4, 4, 3), (2, 2, 2), dict(stride=[1, 1, 1], padding=[0, 1, 0], dilation=[1, 1, 1])),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("runs", [("doubling", "packed"), ("down and up", "gaps")])
def test_conv(cut, kind, groups, transposed, runs):
    spatial, kernel, geometry = CONVS[kind]
    out_runs, in_runs = RUNS[runs[0]], RUNS[runs[1]]
    outs, ins = length(out_runs), length(in_runs)
    shape = (ins * groups, outs) if transposed else (outs * groups, ins)
    x, w = draw(2, ins * groups, *spatial), draw(*shape, *kernel, seed=1)
    b = draw(outs * groups, seed=2)
    rest = (*geometry.values(), transposed, [0] * len(spatial), groups)
    halves = [
        reference.mask(part, *((1, 0) if transposed else (0, 1)), out_runs, in_runs)
        for part in w.chunk(groups)
    ]
    expected = torch.convolution(x, torch.cat(halves), b, *rest)
    agree(nested.conv(x, w, b, *rest, out_runs, in_runs), expected, x, w, b)


def test_conv_never_reads_a_structural_zero(cut):
    out_runs, in_runs = RUNS["doubling"], RUNS["packed"]
    x, w = draw(2, 15, 5, 5), draw(16, 15, 3, 3, seed=1)
    beyond = zeros_of(out_runs, in_runs)
    poisoned = w.detach().clone()
    poisoned[beyond] = NAN
    poisoned.requires_grad_()
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, out_runs, in_runs)
    y = nested.conv(x, poisoned, None, *rest)
    assert torch.equal(y, nested.conv(x, w, None, *rest))
    dx, dw = torch.autograd.grad(y.sum(), (x, poisoned))
    assert dx.isfinite().all() and dw.isfinite().all() and not dw[beyond].any()


def test_conv_empty_batch(cut):
    runs = RUNS["doubling"]
    x, w = draw(0, 16, 4, 4), draw(16, 16, 3, 3)
    y = nested.conv(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, runs, runs)
    assert y.shape == (0, 16, 4, 4)
    assert not torch.autograd.grad(y.sum(), w)[0].any()


@pytest.mark.parametrize("dims", [(0, 1), (2, 0), (1, 2), (-1, -2)])
def test_mask(dims):
    out_runs, in_runs = RUNS["packed"], RUNS["doubling"]
    shape = [3, 3, 3]
    shape[dims[0]], shape[dims[1]] = 15, 16
    w = draw(*shape)
    ours = nested.mask(w, *dims, out_runs, in_runs)
    agree(ours, reference.mask(w, *dims, out_runs, in_runs), w)
    assert torch.equal(
        nested.mask(torch.full(shape, NAN), *dims, out_runs, in_runs).isnan(),
        reference.mask(torch.ones(shape), *dims, out_runs, in_runs) == 1,
    )


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_norms(runs, prefix, affine):
    runs = RUNS[runs]
    width = length(runs)
    w, b = (draw(width, seed=k) if affine else None for k in (1, 2))
    rest = (1e-5, runs, prefix)
    x = draw(3, 2, width)
    some = (w, b) if affine else ()
    agree(
        nested.layer_norm(x, w, b, *rest),
        reference.layer_norm(x, w, b, *rest),
        x,
        *some,
        exact=False,
    )
    agree(nested.rms_norm(x, w, *rest), reference.rms_norm(x, w, *rest), x, *some[:1], exact=False)
    image = draw(3, width, 2, 3)
    agree(
        nested.group_norm(image, w, b, *rest),
        reference.group_norm(image, w, b, *rest),
        image,
        *some,
        exact=False,
    )


@pytest.mark.parametrize("prefix", [False, True])
def test_norm_of_one_level_is_torch(prefix):
    x, w, b = draw(5, 12), draw(12, seed=1), draw(12, seed=2)
    ours = nested.layer_norm(x, w, b, 1e-5, [12, 0], prefix)
    agree(ours, F.layer_norm(x, (12,), w, b), x, w, b, exact=False)


@pytest.mark.parametrize("prefix", [False, True])
def test_norms_do_not_look_at_higher_levels(prefix):
    runs, x = RUNS["doubling"], draw(3, 16).detach()
    spoilt = x.clone()
    spoilt[:, 8:] = NAN
    for norm in (
        lambda t: nested.layer_norm(t, None, None, 1e-5, runs, prefix),
        lambda t: nested.rms_norm(t, None, 1e-5, runs, prefix),
        lambda t: nested.group_norm(t[..., None], None, None, 1e-5, runs, prefix),
    ):
        assert torch.equal(norm(x)[:, :8], norm(spoilt)[:, :8])
        if prefix:
            continue
        y = spoilt.clone().requires_grad_()
        assert torch.autograd.grad(norm(y)[:, :8].sum(), y)[0][:, :8].isfinite().all()


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (16,), (2000, 16)])
def test_norm_shapes(prefix, shape, monkeypatch):
    monkeypatch.setattr("matryoshkafy.kernels.norms.CACHED", 64)
    x, w = draw(*shape), draw(16, seed=1)
    runs = RUNS["doubling"]
    ours = nested.layer_norm(x.clone(), w, None, 1e-5, runs, prefix)
    agree(ours, reference.layer_norm(x, w, None, 1e-5, runs, prefix), x, w, exact=False)


def test_norm_with_a_large_mean_is_as_good_as_torch():
    x = torch.randn(50, 64) + 1000
    runs = [64, 0]
    truth = F.layer_norm(x.double(), (64,))
    theirs = (F.layer_norm(x, (64,)) - truth).norm()
    for prefix in (False, True):
        ours = nested.layer_norm(x, None, None, 1e-5, runs, prefix)
        assert (ours - truth).norm() <= 3 * theirs + 1e-4


def test_norm_in_bfloat16_sums_in_float32():
    x = torch.randn(4, 16).bfloat16()
    runs = RUNS["doubling"]
    ours = nested.layer_norm(x, None, None, 1e-5, runs, False)
    expected = reference.layer_norm(x.float(), None, None, 1e-5, runs, False).bfloat16()
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", sorted(reference.REDUCTIONS))
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("runs", ["doubling", "packed", "down and up", "gaps"])
def test_level_reduce(kind, prefix, runs):
    runs = RUNS[runs]
    x = torch.randn(3, length(runs), 4, dtype=torch.float64).requires_grad_()
    for dims, dim in (([1], 1), ([-2, 2], -2), ([0, 1, 2], 1)):
        args = (dims, dim, runs, kind, prefix)
        if kind in ("var", "std") and dims == [1] and min(map(runs[::2].__getitem__, range(1))) < 2:
            continue
        ours, theirs = nested.level_reduce(x, *args), reference.level_reduce(x, *args)
        finite = theirs.isfinite()
        agree(ours[finite], theirs[finite], x, exact=False)
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_level_reduce_unknown_kind():
    with pytest.raises(MatryoshkafyError, match="the kinds are mean, sum"):
        nested.level_reduce(torch.zeros(2, 4), [1], 1, [4, 0], "median", False)


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: nested.linear(torch.zeros(2, 4), torch.zeros(4, 4), None, [3, 0], [4, 0]),
            "describe 3 indices, but the weight's dim 0 has 4",
        ),
        (
            lambda: nested.linear(torch.zeros(2, 5), torch.zeros(4, 4), None, [4, 0], [4, 0]),
            "ends in 5 units but the weight",
        ),
        (
            lambda: nested.layer_norm(torch.zeros(2, 4), None, None, 1e-5, [5, 0], False),
            "the normalised dim has 4",
        ),
        (lambda: nested.mask(torch.zeros(4, 4), 0, 1, [4, 0], [1, 0, 3]), "give \\[length, level"),
    ],
)
def test_messages(call, text):
    with pytest.raises(MatryoshkafyError, match=text):
        call()


def layer(x, w, b, runs):
    y = nested.linear(nested.layer_norm(x, None, b, 1e-5, runs, False), w, b, runs, runs)
    kernel = w[:, :, None] * 0.1
    y = nested.conv(y.transpose(1, 2), kernel, b, [1], [0], [1], False, [0], 1, runs, runs)
    y = nested.rms_norm(y.transpose(1, 2), b, 1e-5, runs, True)
    masked = nested.mask(w, 0, 1, runs, runs)
    return (y @ masked) * nested.level_reduce(y, [-1], -1, runs, "mean", False)


def inputs():
    return draw(2, 3, 16), draw(16, 16, seed=1), draw(16, seed=2)


def test_compiles_as_one_graph(cut):
    runs, leaves = RUNS["doubling"], inputs()
    compiled = torch.compile(lambda *t: layer(*t, runs), fullgraph=True, backend="aot_eager")
    agree(compiled(*leaves), layer(*leaves, runs), *leaves, exact=False)


@pytest.mark.slow
def test_compiles_with_inductor():
    runs, leaves = RUNS["doubling"], inputs()
    compiled = torch.compile(lambda *t: layer(*t, runs), fullgraph=True)
    agree(compiled(*leaves), layer(*leaves, runs), *leaves, exact=False)


class Layer(torch.nn.Module):
    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(w), torch.nn.Parameter(b)

    def forward(self, x):
        return layer(x, self.w, self.b, RUNS["doubling"])


def test_exports_with_a_dynamic_batch():
    x, w, b = inputs()
    module = Layer(w.detach(), b.detach())
    shape = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(module, (x,), dynamic_shapes=shape)
    more = draw(7, 3, 16, seed=5)
    torch.testing.assert_close(exported.module()(more), module(more))
    torch.testing.assert_close(exported.run_decompositions().module()(more), module(more))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    runs, leaves = RUNS["doubling"], inputs()
    again = checkpoint(lambda *t: layer(*t, runs), *leaves, use_reentrant=reentrant)
    torch.testing.assert_close(again, layer(*leaves, runs))
    again.sum().backward()
    found = [leaf.grad for leaf in leaves]
    expected = torch.autograd.grad(layer(*leaves, runs).sum(), leaves)
    torch.testing.assert_close(tuple(found), expected)


def test_autocast_runs_linear_and_conv_in_bfloat16():
    runs = RUNS["doubling"]
    x, w, b = (t.detach().float().requires_grad_() for t in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nested.linear(x, w, b, runs, runs)
        rest = ([1], [0], [1], False, [0], 1, runs, runs)
        z = nested.conv(x.transpose(1, 2), w[..., None], b, *rest)
        n = nested.layer_norm(x, b, b, 1e-5, runs, False)
    assert y.dtype == z.dtype == torch.bfloat16 and n.dtype == torch.float32
    assert torch.autograd.grad(y.sum(), w)[0].dtype == torch.float32


def test_double_backward_is_refused(cut):
    runs = RUNS["doubling"]
    x, w, b = inputs()
    with pytest.raises(MatryoshkafyError, match="no double backward"):
        y = nested.linear(x, w, b, runs, runs)
        dx = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        if cut == "dense":
            raise MatryoshkafyError("a dense product has one: no double backward to refuse")
        dx.sum().backward()
    y = nested.layer_norm(x, w[0], b, 1e-5, runs, True)
    dx = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    with pytest.raises(MatryoshkafyError, match="no double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["linear", "linear_opaque", "conv", "mask", "norm"])
def test_operator_contract(name):
    runs = RUNS["doubling"]
    x, w, b = inputs()
    geometry = ([1], [0], [1], False, [0], 1)
    arguments = {
        "linear": (x, w, b, runs, runs),
        "linear_opaque": (x, w, b, runs, runs),
        "conv": (draw(2, 16, 3), draw(16, 16, 1), b, *geometry, runs, runs),
        "mask": (w, 0, 1, runs, runs),
        "norm": (draw(2, 16, 1), b, b, 1e-5, runs, True, True),
    }
    torch.library.opcheck(getattr(nested, name).default, arguments[name])


def test_inference_mode_leaves_nothing_behind():
    runs = [1, 0, 3, 1, 12, 4]
    x, w, b = inputs()
    with torch.inference_mode():
        layer(x.detach(), w.detach(), b.detach(), runs)
    layer(x, w, b, runs).sum().backward()
    assert x.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    runs, leaves = RUNS["doubling"], inputs()
    there = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    y = layer(*there, runs)
    torch.testing.assert_close(y.cpu(), layer(*leaves, runs))
    y.sum().backward()
    expected = torch.autograd.grad(layer(*leaves, runs).sum(), leaves)
    torch.testing.assert_close(tuple(t.grad.cpu() for t in there), expected)


assert ops.NAMESPACE == "matryoshkafy"
