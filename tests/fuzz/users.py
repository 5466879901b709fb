"""Blocks that hold what real libraries hold: distributions over classes, memories, centres, weights
of each sample, steps of solvers. Each turns [B, L, D] into [B, L, D] at any width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.blocks import WIDTH, block
from tests.zoo.registry import Scale


@block("users")
class Mixture(nn.Module):
    """The log density of a mixture of 5 normal distributions (Bishop 1994)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.shares, self.means = nn.Linear(s(WIDTH), 5), nn.Linear(s(WIDTH), 5)

    def forward(self, x: Tensor) -> Tensor:
        density = -0.5 * self.means(x).square()
        return x + (self.shares(x).log_softmax(-1) + density).logsumexp(-1, keepdim=True)


@block("users")
class Tags(nn.Module):
    """The forward pass of a conditional random field of 6 tags."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.emit, self.step = nn.Linear(s(WIDTH), 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        emitted = self.emit(x)
        score = emitted[:, 0]
        for t in range(1, 3):
            score = (score.unsqueeze(2) + self.step + emitted[:, t].unsqueeze(1)).logsumexp(1)
        return x + score.logsumexp(-1)[:, None, None]


class Atoms(nn.Module):
    """The mean of a distribution over 7 returns (Bellemare 2017), by a sum or by a product."""

    def __init__(self, s: Scale, *, product: bool) -> None:
        super().__init__()
        self.logits, self.product = nn.Linear(s(WIDTH), 7), product
        self.register_buffer("returns", torch.linspace(-2, 2, 7))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.logits(x).softmax(-1)
        mean = shares @ self.returns if self.product else (shares * self.returns).sum(-1)
        return x + mean.unsqueeze(-1)


@block("users")
def atoms_by_sum(s: Scale) -> nn.Module:
    """Atoms, by a sum."""
    return Atoms(s, product=False)


@block("users")
def atoms_by_product(s: Scale) -> nn.Module:
    """Atoms, by a product."""
    return Atoms(s, product=True)


class Projected(nn.Module):
    """Attention over keys that a weight projects to 3 (Linformer), fused or not."""

    def __init__(self, s: Scale, *, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(s(WIDTH), s(WIDTH)) for _ in range(3))
        self.places, self.fused = nn.Linear(s(WIDTH), 3), fused

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(x).softmax(1).mT
        q, k, v = self.q(x), places @ self.k(x), places @ self.v(x)
        if self.fused:
            return x + F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + (q @ k.mT).softmax(-1) @ v


@block("users")
def projected_plain(s: Scale) -> nn.Module:
    """Projected, by hand."""
    return Projected(s, fused=False)


@block("users")
def projected_fused(s: Scale) -> nn.Module:
    """Projected, fused."""
    return Projected(s, fused=True)


@block("users")
class Cells(nn.Module):
    """Reads from 6 cells by cosine similarity and writes into them (Graves 2014)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(6, s(12)))
        self.key, self.new = nn.Linear(s(WIDTH), s(12)), nn.Linear(s(WIDTH), s(12))
        self.out = nn.Linear(s(12), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        cells, read = self.cells.unsqueeze(0).repeat(x.shape[0], 1, 1), []
        for t in range(2):
            key = self.key(x[:, t]).unsqueeze(1)
            where = (3.0 * F.cosine_similarity(key, cells, dim=-1)).softmax(-1)
            read.append((where.unsqueeze(1) @ cells).squeeze(1))
            cells = cells + where.unsqueeze(-1) * self.new(x[:, t]).unsqueeze(1)
        return x + self.out(torch.stack(read, 1).mean(1, keepdim=True))


@block("users")
class Centres(nn.Module):
    """Distances spread over 9 centres that a buffer holds, read by a layer (SchNet)."""

    centres: Tensor

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0, 3, 9))
        self.read, self.out = nn.Linear(9, s(12)), nn.Linear(s(12), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        distance = x.square().sum(-1, keepdim=True).sqrt()
        return x + self.out(F.softplus(self.read(torch.exp(-((distance - self.centres) ** 2)))))


@block("users")
class Clusters(nn.Module):
    """Residuals to 4 centres, all of them laid out as one vector (NetVLAD)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, s(WIDTH)))
        self.share, self.out = nn.Linear(s(WIDTH), 4), nn.Linear(4 * s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        share = self.share(x).softmax(-1)
        mine = share.sum(1).unsqueeze(-1) * self.centres
        near = torch.einsum("blk,bld->bkd", share, x).sub(mine)
        return x + self.out(F.normalize(near, dim=-1).flatten(1)).unsqueeze(1)


@block("users")
class FeatureMaps(nn.Module):
    """Linear attention whose queries are a softmax over their units (Shen 2018): a width still."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(s(WIDTH), s(12)), nn.Linear(s(WIDTH), s(12))
        self.v = nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q(x).softmax(-1) @ (self.k(x).softmax(1).mT @ self.v(x))


@block("users")
class Ones(nn.Module):
    """A column of ones beside a width, as an offset, made like a slice of it."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.inner = nn.Linear(s(WIDTH), s(12))
        self.pairs = nn.Parameter(torch.randn(s(12) + 1, s(WIDTH)) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x).tanh()
        return x + torch.cat([torch.ones_like(inner[..., :1]), inner], -1) @ self.pairs


@block("users")
class Modulated(nn.Module):
    """A convolution whose weight each sample scales and normalises (StyleGAN2): one group each."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(s(WIDTH), s(WIDTH), 3))
        self.style, self.rate = nn.Linear(s(WIDTH), s(WIDTH)), 1 / math.sqrt(s(WIDTH) * 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        style = 1 + self.style(x.mean(1))
        weight = self.weight.unsqueeze(0) * self.rate * style.view(n, 1, width, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3), keepdim=True) + 1e-8)
        inputs = x.mT.reshape(1, n * width, length)
        out = F.conv1d(inputs, weight.reshape(-1, width, 3), padding=1, groups=n)
        return x + out.view(n, width, length).mT


@block("users")
class Equalised(nn.Module):
    """A convolution whose weight is scaled by the root of what it sums over (Karras 2018)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(s(WIDTH), s(WIDTH), 3))
        self.rate = 1 / math.sqrt(s(WIDTH) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv1d(x.mT, self.weight * self.rate, padding=1).mT


@block("users")
class RungeKutta(nn.Module):
    """Two steps of a solver, of a quarter each: the root of 16 by chance."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.slope = nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        step = 0.25
        for _ in range(2):
            middle = self.slope(x + step / 2 * self.slope(x).tanh()).tanh()
            x = x + step * middle
        return x


@block("users")
class SplitHeads(nn.Module):
    """Four heads, cut out of the width and laid along the batch (Set Transformer)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(s(WIDTH), s(WIDTH)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n, _, width = x.shape
        q, k, v = (torch.cat(f(x).split(width // 4, 2)) for f in (self.q, self.k, self.v))
        scores = q.bmm(k.mT) / math.sqrt(width)
        return x + torch.cat(scores.softmax(2).bmm(v).split(n), 2)


@block("users")
class Skipped(nn.Module):
    """A U-Net's way up: a norm over the cat of two values, whose own norms group them otherwise."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.up, self.skip = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(8))
        self.norms = nn.ModuleList(nn.GroupNorm(s(4), s(n)) for n in (WIDTH, 8, 24))
        self.out = nn.Conv1d(s(24), s(WIDTH), 1)

    def forward(self, x: Tensor) -> Tensor:
        up, skip = self.norms[0](self.up(x).mT), self.norms[1](self.skip(x).mT)
        return x + self.out(F.silu(self.norms[2](torch.cat([up, skip], 1)))).mT


@block("users")
class FourthRoots(nn.Module):
    """Attention of channels first, as diffusion models have it: each side by C ** -1/4."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(s(WIDTH), 3 * s(WIDTH), 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.mT).chunk(3, 1)
        scale = x.shape[-1] ** -0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        return x + torch.einsum("bts,bcs->btc", weight, v)


@block("users")
class ZeroShortcut(nn.Module):
    """A residual unit that widens by zeros on both sides (He 2015, option A)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(s(WIDTH), s(32)), nn.Linear(s(32), s(WIDTH))
        self.side = (s(32) - s(WIDTH)) // 2

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.pad(x, (self.side, self.side)) + self.wide(x).relu())


@block("users")
class Halves(nn.Module):
    """A value laid out by hand: two widths are written side by side into zeros."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(2 * s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        both = x.new_zeros(*x.shape[:-1], 2 * width)
        both[..., :width] = self.first(x)
        both[..., width:] = x
        return x + self.both(both.tanh())


@block("users")
class RadialBasis(nn.Module):
    """Sines of six frequencies weigh messages (PaiNN): their count is a number of the code."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.filter, self.value = nn.Linear(6, s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        distance = 1 + x.square().mean(-1, keepdim=True)
        basis = torch.sin(distance * torch.arange(1, 7, dtype=x.dtype)) / distance
        return x + self.filter(basis) * self.value(x)


@block("users")
class Gains(nn.Module):
    """Gains of the hidden units, scaled by the root of the model's width (nGPT)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(s(WIDTH), s(24)), nn.Linear(s(24), s(WIDTH))
        self.gains, self.width = nn.Parameter(torch.ones(s(24))), s(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gains = self.gains * self.width**0.5
        return F.normalize(x + self.down(F.silu(self.up(x) * gains)), dim=-1)


@block("users")
class Spectra(nn.Module):
    """A complex filter over two axes of positions, back by their sizes alone (FNO)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(s(WIDTH), s(WIDTH), 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.mT.unsqueeze(-1).expand(-1, -1, -1, 4)
        low = torch.fft.rfftn(grid, dim=[-2, -1])
        made = torch.einsum("bixy,io->boxy", low, torch.view_as_complex(self.filter))
        return x + torch.fft.irfftn(made, s=grid.shape[-2:]).mean(-1).mT


@block("users")
class Deformed(nn.Module):
    """Each head looks at three places of its own (Deformable DETR)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.heads = s(4)
        self.value, self.out = (nn.Linear(s(WIDTH), s(WIDTH)) for _ in range(2))
        self.place = nn.Linear(s(WIDTH), self.heads * 3 * 2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        values = self.value(x).mT.reshape(n * self.heads, -1, length, 1)
        places = self.place(x).tanh().view(n, length, self.heads, 3, 2)
        places = places.transpose(1, 2).flatten(0, 1)
        seen = F.grid_sample(values, places, align_corners=False).mean(-1)
        return x + self.out(seen.reshape(n, -1, length).mT)


@block("users")
class Pooled(nn.Module):
    """Positions are shared out among 3 clusters, which meet each other (DiffPool)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.share, self.value = nn.Linear(s(WIDTH), 3), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        share = self.share(x).softmax(-1)
        near, pooled = share.mT @ share, share.mT @ self.value(x)
        return x + share @ (near @ pooled)


@block("users")
class Members(nn.Module):
    """An ensemble of 3 that differ in gains, as rows of one batch (BatchEnsemble)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.gains, self.out = nn.Parameter(torch.rand(3, s(WIDTH))), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        gains = self.gains.repeat_interleave(count, 0).unsqueeze(1)
        wide = self.out(x.repeat(3, 1, 1) * gains).relu()
        return x + wide.view(3, count, *x.shape[1:]).mean(0)
