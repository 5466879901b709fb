"""Ops over space and frequency: pooling, resizing, Fourier transforms. Channels pass, space
stays.
"""

from __future__ import annotations

from torch import fx

from matryoshkafy.graph.nodes import info_of, op_key
from matryoshkafy.rules.table import Args, Result, Walk, dims_of, hold, meet, rule


def _spatial(walk: Walk, node: fx.Node, count: int) -> Result:
    """Leading dims pass, the last `count` dims are replaced by new whole ones."""
    source = walk.of(node.args[0])
    hold(walk, source[len(source) - count :], "space")
    leading = source[: len(source) - count]
    outs = [
        (*leading, *(walk.fresh(n, "space") for n in shape[len(leading) :]))
        for shape in walk.shapes(node)
    ]
    return tuple(outs) if isinstance(info_of(node), tuple) else outs[0]


def _register(dims: int, *names: str) -> None:
    @rule(*names)
    def spatial(walk: Walk, node: fx.Node, args: Args) -> Result:
        """Channels pass, space stays whole."""
        del args
        return _spatial(walk, node, dims)


for _n in (1, 2, 3):
    _register(
        _n,
        f"max_pool{_n}d",
        f"avg_pool{_n}d",
        f"adaptive_avg_pool{_n}d",
        f"adaptive_max_pool{_n}d",
        f"_adaptive_avg_pool{_n}d",
        f"max_pool{_n}d_with_indices",
        f"lp_pool{_n}d",
        f"upsample_nearest{_n}d",
        f"_upsample_nearest_exact{_n}d",
    )
_register(1, "upsample_linear1d")
_register(
    2,
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "upsample_nearest2d_backward",
)
_register(3, "upsample_trilinear3d")


@rule("max_unpool2d", "max_unpool3d")
def unpool(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Each channel goes back to where its own largest values stood."""
    meet(walk, walk.of(args["self"]), walk.of(args["indices"]))
    return _spatial(walk, node, 2 if op_key(node) == "max_unpool2d" else 3)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Channels pass; samples (heads among them) are those of the grid; where to sample is whole."""
    samples, *places = walk.of(args["grid"])
    walk.unify(samples, walk.of(args["input"])[0])
    hold(walk, places, "space")
    return _spatial(walk, node, len(walk.shape(node)) - 2)


COMPLEX = frozenset("fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn".split())
"""The transforms that give as many frequencies as they are given units."""


@rule(
    "fft_fft",
    "fft_ifft",
    "fft_rfft",
    "fft_irfft",
    "fft_hfft",
    "fft_ihfft",
    "fft_fft2",
    "fft_ifft2",
    "fft_rfft2",
    "fft_irfft2",
    "fft_fftn",
    "fft_ifftn",
    "fft_rfftn",
    "fft_irfftn",
)
def fourier(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Transformed dims are mixed, the others pass; one that changes its length stays whole."""
    terms, new = list(walk.of(args["self"])), walk.shape(node)
    dim, size = args.get("dim", -1), args.get("s")
    every = range(-len(size if size else terms), 0)
    # As many frequencies as units: a narrower width has its own transform, as FNet's class has.
    alike = op_key(node) in COMPLEX and args.get("n") is None and size is None
    for d in dims_of(every if dim is None else dim, len(terms)):
        if alike:
            walk.mix(terms[d])
            continue
        walk.fix(terms[d], "frequency")
        terms[d] = walk.fresh(new[d], "frequency")
    return tuple(terms)


@rule("stft", "istft")
def short_time(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Signals in, spectra out: nothing is a width."""
    hold(walk, walk.of(args["self"]), "frequency")
    return tuple(walk.fresh(n, "frequency") for n in walk.shape(node))
