"""Blocks of kinds that no other list holds: recurrent convolutions, routing, networks that write
networks, memories, ragged masks, shared and turned weights. Each turns [B, L, D] into [B, L, D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.fuzz.blocks import WIDTH, block
from tests.zoo.registry import Scale


@block("odd")
class ConvLSTM(nn.Module):
    """A convolutional LSTM cell over positions: four gates of one convolution, two states."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.width = s(WIDTH)
        self.gates = nn.Conv1d(2 * self.width, 4 * self.width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.transpose(1, 2)
        state = cell = torch.zeros_like(inputs)
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([inputs, state], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        return x + state.transpose(1, 2)


@block("odd")
class Capsules(nn.Module):
    """Routing by agreement between 4 capsules in and 4 out, two rounds, the last with gradient."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.votes = nn.Linear(s(WIDTH), 4 * s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        votes = self.votes(x).unflatten(-1, (4, -1))
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            pooled = (logits.softmax(-1)[..., None] * votes).sum(-2, keepdim=True)
            norm = pooled.square().mean(-1, keepdim=True)
            pooled = pooled * norm / (1 + norm)
            logits = logits + (votes.detach() * pooled.detach()).mean(-1)
        return x + (logits.softmax(-1)[..., None] * votes).sum(-2)


@block("odd")
class Hypernetwork(nn.Module):
    """A layer whose scale and shift another layer writes from the pooled input."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.writer = nn.Linear(s(WIDTH), 2 * s(WIDTH))
        self.layer = nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.writer(x.mean(1, keepdim=True)).chunk(2, -1)
        return x + torch.tanh(self.layer(x) * (1 + scale) + shift)


@block("odd")
class LowRankWriter(nn.Module):
    """A per-sample weight of rank 3, written by a network and applied by bmm."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(s(WIDTH), 3 * s(WIDTH)), nn.Linear(s(WIDTH), 3 * s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(1)
        down = self.down(pooled).unflatten(-1, (3, -1))
        up = self.up(pooled).unflatten(-1, (3, -1))
        return x + torch.bmm(torch.bmm(x, down.transpose(1, 2)).tanh(), up)


@block("odd")
class Memory(nn.Module):
    """Reads from 6 learned slots, writes into them for this sample, reads again."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(6, s(WIDTH)))
        self.query, self.write = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots.expand(len(x), -1, -1)
        where = (self.query(x) @ slots.transpose(1, 2) * 0.25).softmax(-1)
        slots = slots + where.transpose(1, 2) @ self.write(x)
        return x + where @ slots


@block("odd")
class Deformable(nn.Module):
    """Each position gathers, with weights, from two others that it chooses itself."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.offsets, self.value = nn.Linear(s(WIDTH), 2), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        last = x.shape[1] - 1
        place = self.offsets(x).sigmoid() * last
        low = place.floor().clamp(max=last - 1).long()
        part = (place - low).unsqueeze(-1)
        value = self.value(x).unsqueeze(2).expand(-1, -1, 2, -1)
        index = low.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        first, second = value.gather(1, index), value.gather(1, index + 1)
        return x + (first * (1 - part) + second * part).sum(2)


@block("odd")
class LearnedSort(nn.Module):
    """Positions in the order of a learned score, mixed there, and put back."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.score, self.mix = nn.Linear(s(WIDTH), 1), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1)
        order = score.argsort(1)
        back = order.argsort(1)
        ranked = torch.take_along_dim(x * score.sigmoid().unsqueeze(-1), order.unsqueeze(-1), 1)
        mixed = self.mix(ranked + ranked.roll(1, 1))
        return x + torch.take_along_dim(mixed, back.unsqueeze(-1), 1)


@block("odd")
class Ragged(nn.Module):
    """Means over what a mask of lengths, read off the values, keeps."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), 1)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (self.gate(x).squeeze(-1) > 0).sum(1).clamp(min=1)
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        h = self.layer(x).masked_fill(~mask[..., None], 0.0)
        return x + h.sum(1, keepdim=True) / lengths[:, None, None]


@block("odd")
class TwoDimensional(nn.Module):
    """Heads in front of positions and back by reshapes, as einops writes them."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.heads = s(8)
        self.layer = nn.Linear(s(WIDTH), s(WIDTH))
        self.mix = nn.Parameter(torch.randn(self.heads, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        h = self.layer(x).view(b, n, self.heads, d // self.heads)
        h = h.permute(2, 0, 1, 3).reshape(self.heads, b * n, -1)
        h = torch.bmm(h, self.mix).view(self.heads, b, n, -1)
        return x + h.permute(1, 2, 0, 3).flatten(2)


@block("odd")
class Fourier(nn.Module):
    """A complex filter per channel over the frequencies of positions."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.randn(s(WIDTH)))
        self.imag = nn.Parameter(torch.randn(s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1) * torch.complex(self.real, self.imag)
        return x + torch.fft.irfft(spectrum, n=x.shape[1], dim=1)


class Symmetric(nn.Module):
    """A parametrisation: the mean of a square matrix and its transpose."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


@block("odd")
class Parametrised(nn.Module):
    """A symmetric weight by torch.nn.utils.parametrize."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.layer = nn.Linear(s(WIDTH), s(WIDTH))
        parametrize.register_parametrization(self.layer, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


@block("odd")
class Turned(nn.Module):
    """An autoencoder whose decoder is the encoder's weight transposed."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.layer = nn.Linear(s(WIDTH), s(2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(self.layer(x).relu(), self.layer.weight.t())


@block("odd")
class Twice(nn.Module):
    """One layer called twice, the second time on what the first gave."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(s(WIDTH), s(WIDTH)), nn.LayerNorm(s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.norm(x)).relu()
        return x + self.layer(self.norm(h))


@block("odd")
class Highway(nn.Module):
    """A gate between the input and a transform, its bias shared by two layers."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.gate, self.layer = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))
        self.layer.bias = self.gate.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.layer(x).relu(), self.gate(x).sigmoid())


@block("odd")
class Maxout(nn.Module):
    """The largest of three linear pieces, unit by unit."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.pieces = nn.Linear(s(WIDTH), 3 * s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pieces(x).unflatten(-1, (3, -1)).amax(-2)


@block("odd")
class Interleaved(nn.Module):
    """Pairs of neighbours are turned by an angle that depends on the position."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.layer = nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        angle = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        even, odd = h[..., ::2], h[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        return x + torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2)


@block("odd")
class Bilinear(nn.Module):
    """nn.Bilinear of two views of the input."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.pair = nn.Bilinear(s(WIDTH), s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.pair(x, x.roll(1, 1))


@block("odd")
class FastWeights(nn.Module):
    """A matrix of outer products, updated position by position (linear attention by a loop)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key(x).softmax(-1), self.value(x)
        products = torch.einsum("bnk,bnv->bnkv", key, value).cumsum(1)
        return x + torch.einsum("bnk,bnkv->bnv", key, products)


@block("odd")
class Experts(nn.Module):
    """Four experts as one batched weight, mixed by a router over them."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.router = nn.Linear(s(WIDTH), 4)
        self.up = nn.Parameter(torch.randn(4, s(WIDTH), s(2 * WIDTH)) * 0.1)
        self.down = nn.Parameter(torch.randn(4, s(2 * WIDTH), s(WIDTH)) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bnd,edf->bnef", x, self.up).relu()
        out = torch.einsum("bnef,efd->bned", h, self.down)
        top = self.router(x).topk(2, -1)
        weight = torch.zeros_like(self.router(x)).scatter(-1, top.indices, top.values.softmax(-1))
        return x + (weight.unsqueeze(-1) * out).sum(-2)


@block("odd")
class Pooling(nn.Module):
    """Pairs of positions become one and come back, with what was lost added."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.down = nn.Conv1d(s(WIDTH), s(2 * WIDTH), 2, stride=2)
        self.up = nn.ConvTranspose1d(s(2 * WIDTH), s(WIDTH), 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(x.transpose(1, 2), (0, x.shape[1] % 2))
        return x + self.up(self.down(h).relu())[..., : x.shape[1]].transpose(1, 2)


@block("odd")
class RunningCentre(nn.Module):
    """A buffer that follows the batch in training mode, as in batch norm by hand."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.layer = nn.Linear(s(WIDTH), s(WIDTH))
        self.register_buffer("centre", torch.zeros(s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(h.mean((0, 1)), 0.1)
        return x + h - self.centre


@block("odd")
class Scattered(nn.Module):
    """Values are added up in buckets that the values themselves choose."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.bucket, self.value = nn.Linear(s(WIDTH), 5), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.bucket(x).argmax(-1).unsqueeze(-1).expand_as(x)
        sums = torch.zeros(len(x), 5, x.shape[-1], dtype=x.dtype, device=x.device)
        sums = sums.scatter_add(1, chosen, self.value(x))
        return x + sums.gather(1, chosen)


@block("odd")
class Distances(nn.Module):
    """A kernel of squared distances between positions."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x)
        gap = (key.unsqueeze(2) - key.unsqueeze(1)).square().mean(-1)
        return x + torch.exp(-gap) @ self.value(x)


@block("odd")
class Shuffled(nn.Module):
    """Channel shuffle between two groups of a grouped convolution."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.first = nn.Conv1d(s(WIDTH), s(WIDTH), 3, padding=1, groups=s(WIDTH))
        self.second = nn.Conv1d(s(WIDTH), s(WIDTH), 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(1, 2))
        b, c, n = h.shape
        h = h.view(b, 2, c // 2, n).transpose(1, 2).reshape(b, c, n)
        return x + self.second(h).transpose(1, 2)


@block("odd")
class Kronecker(nn.Module):
    """A weight that is the Kronecker product of two small ones."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(s(WIDTH) // 2, s(WIDTH) // 2) * 0.2)
        self.right = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, torch.kron(self.left, self.right))


@block("odd")
class Cumulative(nn.Module):
    """Log-space scan of gates (a minimal gated recurrence)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        keep = F.logsigmoid(self.gate(x)).cumsum(1)
        return x + keep.exp() * (self.value(x) * (-keep).exp()).cumsum(1)


@block("odd")
class SelectiveScan(nn.Module):
    """Mamba: a convolution, steps and gates that depend on the input, a state of 4 per unit."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        inner, self.rank = s(2 * WIDTH), s(2)
        self.into, self.out = nn.Linear(s(WIDTH), 2 * inner), nn.Linear(inner, s(WIDTH))
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select, self.step = nn.Linear(inner, self.rank + 8), nn.Linear(self.rank, inner)
        self.decay = nn.Parameter(torch.arange(1.0, 5.0).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.into(x).chunk(2, -1)
        h = F.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        rank, b, c = self.select(h).split([self.rank, 4, 4], -1)
        step = F.softplus(self.step(rank)).unsqueeze(-1)
        keep, new = torch.exp(-step * self.decay.exp()), step * b.unsqueeze(2) * h.unsqueeze(-1)
        state, outs = torch.zeros_like(new[:, 0]), []
        for keep_now, new_now, read in zip(keep.unbind(1), new.unbind(1), c.unbind(1), strict=True):
            state = keep_now * state + new_now
            outs.append((state @ read.unsqueeze(-1)).squeeze(-1))
        y = torch.stack(outs, 1) + self.skip * h
        return x + self.out(y * F.silu(gate))


@block("odd")
class TokenMixer(nn.Module):
    """An MLP over positions by convolutions of kernel 1 over them, as mixers write it."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(7, s(12), 1), nn.Conv1d(s(12), 7, 1)
        self.norm = nn.LayerNorm(s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))
