"""Models of other people's structure that the zoo does not hold, each built at any width.

`build(width)` gives the native class at a width, every other width in proportion, so that a slice
has an oracle: the natively small class with the slice's own state, key by key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ITEMS, USERS, LENGTH = 23, 9, 6


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers of their own seed, whatever else was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def history() -> tuple[Tensor, ...]:
    """Item ids [3, LENGTH]."""
    ids = torch.randint(1, ITEMS, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    return (ids,)


def pairs() -> tuple[Tensor, ...]:
    """User ids [4] and item ids [4]."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(0, n, (4,), generator=generator) for n in (USERS, ITEMS))


def points() -> tuple[Tensor, ...]:
    """Vectors [3, 5, 7]: a batch of sets."""
    return (seeded(3, 5, 7, seed=3),)


def bipartite() -> Tensor:
    """Return the adjacency [U + I, U + I] of who read what."""
    reads = (seeded(USERS, ITEMS, seed=4) > 0.5).double()
    reads[:, 0] = 1.0
    reads[0] = 1.0
    top = torch.cat([torch.zeros(USERS, USERS), reads], 1)
    return torch.cat([top, torch.cat([reads.t(), torch.zeros(ITEMS, ITEMS)], 1)], 0).double()


class LightGcn(nn.Module):
    """Users and items are averaged over a graph that is a buffer, normalised in the forward."""

    adjacency: Tensor

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        self.register_buffer("adjacency", bipartite())
        self.layers = layers

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """users [N], items [N] -> scores [N]"""
        scale = self.adjacency.sum(1) ** -0.5
        graph = scale[:, None] * self.adjacency * scale[None, :]
        x = torch.cat([self.users.weight, self.items.weight])
        layers = [x]
        for _ in range(self.layers):
            layers.append(graph @ layers[-1])
        u, i = torch.stack(layers, 1).mean(1).split([USERS, ITEMS])
        return (u[users] * i[items]).sum(-1)


class GraphScores(LightGcn):
    """The scores of every item, from the same graph."""

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """users [N] -> scores [N, ITEMS]"""
        del items
        x = torch.cat([self.users.weight, self.items.weight])
        for _ in range(self.layers):
            x = self.adjacency @ x
        u, i = x.split([USERS, ITEMS])
        return u[users] @ i.t()


class Block(nn.Module):
    """Post-norm attention and a feed-forward net, written by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [N, L, D], context [N, M, D] -> [N, L, D]"""
        y = x if context is None else context
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.query, x), (self.key, y), (self.value, y))
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = self.norm1(x + self.out((weights @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class CosineItems(nn.Module):
    """Every item is scored by a cosine with its row, at a temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.block = Block(width, width // 4)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, ITEMS]"""
        h = self.block(self.items(ids))[:, -1]
        return F.normalize(h, dim=-1) @ F.normalize(self.items.weight, dim=-1).t() / 0.07


class UniSRec(nn.Module):
    """Frozen text features, an adaptor of experts over whitened text, cosine scores."""

    text: Tensor

    def __init__(self, width: int, *, buffer: bool = True, features: int = 48) -> None:
        super().__init__()
        text = seeded(ITEMS, features, seed=5)
        if buffer:
            self.register_buffer("text", text)
        else:
            self.text = nn.Parameter(text, requires_grad=False)
        self.shift = nn.Parameter(seeded(features, seed=6))
        self.experts = nn.ModuleList(nn.Linear(features, width) for _ in range(3))
        self.gate = nn.Linear(features, 3)
        self.block = Block(width, width // 4)

    def adapted(self, x: Tensor) -> Tensor:
        """x [..., 48] -> [..., D]"""
        gate = self.gate(x).softmax(-1).unsqueeze(-1)
        outs = torch.stack([e(x - self.shift) for e in self.experts], -2)
        return (gate * outs).sum(-2)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, ITEMS]"""
        h = self.block(self.adapted(self.text[ids]))[:, -1]
        table = self.adapted(self.text)
        return F.normalize(h, dim=-1) @ F.normalize(table, dim=-1).t() / 0.07


class FrozenText(UniSRec):
    """The same with the text in a parameter that does not train, wider than the model."""

    def __init__(self, width: int) -> None:
        super().__init__(width, buffer=False)


class VqRec(nn.Module):
    """Items are sums of code vectors; the codes are a table of integers."""

    codes: Tensor

    def __init__(self, width: int, books: int = 3, entries: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        codes = torch.randint(0, entries, (ITEMS, books), generator=generator)
        self.register_buffer("codes", codes + entries * torch.arange(books))
        self.book = nn.Embedding(books * entries, width)
        self.block = Block(width, width // 4)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, ITEMS]"""
        h = self.block(self.book(self.codes[ids]).mean(-2))[:, -1]
        table = self.book(self.codes).mean(-2)
        return F.normalize(h, dim=-1) @ F.normalize(table, dim=-1).t()


class Mmssl(nn.Module):
    """Frozen pictures and texts, projected and spread over a graph, beside learned ids."""

    image: Tensor
    text: Tensor
    adjacency: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("image", seeded(ITEMS, 40, seed=8))
        self.register_buffer("text", seeded(ITEMS, 24, seed=9))
        graph = bipartite()[:USERS, USERS:]
        self.register_buffer("adjacency", graph / graph.sum(1, keepdim=True))
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        self.image_in, self.text_in = nn.Linear(40, width), nn.Linear(24, width)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """users [N], items [N] -> scores [N]"""
        u, i = self.users.weight, self.items.weight
        for features, project in ((self.image, self.image_in), (self.text, self.text_in)):
            x = F.dropout(project(features), 0.2, self.training)
            mine = self.adjacency @ x
            u, i = u + 0.5 * F.normalize(mine, dim=1), i + 0.5 * F.normalize(x, dim=1)
        return (u[users] * i[items]).sum(-1)


class MmsslScores(Mmssl):
    """The scores of every item."""

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """users [N] -> scores [N, ITEMS]"""
        del items
        x = self.image_in(self.image) + self.text_in(self.text)
        x = F.dropout(F.leaky_relu(x), 0.2, self.training)
        u = self.users.weight + F.normalize(self.adjacency @ x, dim=1)
        i = self.items.weight + F.normalize(x, dim=1)
        return u[users] @ i.t()


class Perceiver(nn.Module):
    """Learned latents read the points, then themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(7, width)
        self.latents = nn.Parameter(seeded(4, width, seed=10))
        self.norm = nn.LayerNorm(width)
        self.read, self.think = Block(width, width // 4), Block(width, width // 4)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> [N, 5]"""
        latents = self.norm(self.latents).expand(x.shape[0], -1, -1)
        latents = self.read(latents, self.enter(x))
        return self.head(self.think(latents).mean(1))


class SlotAttention(nn.Module):
    """Slots compete for the points, a recurrent cell updates them."""

    def __init__(self, width: int, slots: int = 3) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(7, width), nn.LayerNorm(width)
        self.slots = nn.Parameter(seeded(1, slots, width, seed=11))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.query, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> [N, slots, 5]"""
        x = self.norm(self.enter(x))
        keys, values = self.key(x), self.value(x)
        slots = self.slots.expand(x.shape[0], -1, -1)
        for _ in range(2):
            q = self.query(self.norm2(slots))
            attention = (keys @ q.transpose(1, 2)).mul(0.25).softmax(-1) + 1e-8
            attention = attention / attention.sum(1, keepdim=True)
            updates = attention.transpose(1, 2) @ values
            slots = self.cell(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return self.head(slots)


class SasRec(nn.Module):
    """One head, as SASRec's own default is; scores over the tied table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, 1) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, L, ITEMS]"""
        x = self.items(ids) * self.items.embedding_dim**0.5
        x = x + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x @ self.items.weight.t()


class SasRecTorch(nn.Module):
    """One head of torch's own attention, before its norm as pmixer's SASRec."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.conv1, self.conv2 = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, L, ITEMS]"""
        x = self.items(ids)
        q = self.norms[0](x)
        causal = ~torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool))
        x = q + self.attention(q, x, x, attn_mask=causal)[0]
        x = self.norms[1](x)
        x = x + self.conv2(F.relu(self.conv1(x.transpose(1, 2)))).transpose(1, 2)
        return self.norms[2](x) @ self.items.weight.t()


class HandNorm(nn.Module):
    """A layer norm with torch's unbiased std, as BERT4Rec's annotated transformer has it."""

    def __init__(self, width: int, keepdim: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        if self.keepdim:
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return self.a * (x - mean) / (std + 1e-6) + self.b
        mean, std = x.mean(-1).unsqueeze(-1), x.std(-1)[..., None]
        return self.a * (x - mean) / (std + 1e-6) + self.b


class Bert4Rec(nn.Module):
    """Hand-written norms before each layer; a biased readout over the tied table."""

    def __init__(self, width: int, keepdim: bool = True) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.norms = nn.ModuleList(HandNorm(width, keepdim) for _ in range(2))
        self.block = Block(width, width // 4)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.bias = nn.Parameter(torch.zeros(ITEMS))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, L, ITEMS]"""
        x = self.items(ids)
        x = x + self.block(self.norms[0](x))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return x @ self.items.weight.t() + self.bias


class Bert4RecFlat(Bert4Rec):
    """The same norms without keepdim."""

    def __init__(self, width: int) -> None:
        super().__init__(width, keepdim=False)


class Gru4Rec(nn.Module):
    """A recurrent net over item ids."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, ITEMS]"""
        return self.out(self.gru(self.items(ids))[0][:, -1]) @ self.items.weight.t()


class Fmlp(nn.Module):
    """A learned complex filter over the frequencies of the sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.filter = nn.Parameter(seeded(1, LENGTH // 2 + 1, width, 2, seed=12) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, ITEMS]"""
        x = self.items(ids)
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        x = self.norm(x + torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho"))
        x = x + self.down(F.gelu(self.up(x)))
        return x[:, -1] @ self.items.weight.t()


class LruRec(nn.Module):
    """A diagonal complex recurrence, unrolled; a biased readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.norm = nn.LayerNorm(width)
        self.nu, self.theta = nn.Parameter(seeded(width, seed=13)), nn.Parameter(seeded(width))
        self.into, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.bias = nn.Parameter(torch.zeros(ITEMS))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, L, ITEMS]"""
        x = self.norm(self.items(ids))
        decay = torch.polar(torch.exp(-torch.exp(self.nu)), self.theta)
        real, imaginary = self.into(x).chunk(2, -1)
        u = torch.complex(real, imaginary) * torch.sqrt(1 - decay.abs() ** 2)
        states = [u[:, 0]]
        for t in range(1, u.shape[1]):
            states.append(decay * states[-1] + u[:, t])
        h = torch.stack(states, 1)
        x = x + self.out(torch.cat([h.real, h.imag], -1))
        x = x + self.down(F.gelu(self.up(x)))
        return x @ self.items.weight.t() + self.bias


class LearnedPooling(nn.Module):
    """A learned query, passed through dropout and a norm, pools the sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.query = nn.Parameter(seeded(width, seed=14))
        self.block = Block(width, width // 4)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, 5]"""
        x = self.block(self.items(ids))
        query = F.normalize(F.dropout(self.query, 0.1, self.training), dim=0)
        weights = (x * query).sum(-1).softmax(-1)
        return self.head((weights.unsqueeze(-1) * x).sum(1))


class TwoWay(nn.Module):
    """Learned tokens attend to themselves before they meet an input (SAM's mask decoder)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(7, width)
        self.tokens = nn.Embedding(4, width)
        self.self_attention, self.to_image = Block(width, width // 4), Block(width, width // 4)
        self.to_token = Block(width, width // 4)
        self.hyper = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> masks [N, 4, L]"""
        image = self.enter(x)
        tokens = self.tokens.weight.unsqueeze(0).expand(x.shape[0], -1, -1)
        tokens = self.to_image(self.self_attention(tokens), image)
        image = self.to_token(image, tokens)
        return self.hyper(tokens) @ image.transpose(1, 2)


class SelfTokens(TwoWay):
    """The tokens attend to themselves as parameters alone, and are repeated afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.to_token

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> masks [N, 4, L]"""
        image = self.enter(x)
        tokens = self.self_attention(self.tokens.weight.unsqueeze(0)).expand(x.shape[0], -1, -1)
        tokens = self.to_image(tokens, image)
        return self.hyper(tokens) @ image.transpose(1, 2)


class NormedClasses(nn.Module):
    """A cosine classifier written by hand: features and class rows divided by their lengths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.hidden = nn.Linear(7, width), nn.Linear(width, width)
        self.classes = nn.Parameter(seeded(5, width, seed=15))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> [N, L, 5]"""
        x = self.hidden(F.relu(self.enter(x)))
        rows = self.classes / self.classes.norm(dim=1, keepdim=True)
        return 10.0 * (x @ rows.t())


class Spectral(nn.Module):
    """Spectral normalisation: the largest singular value of a weight is a statistic of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(7, width)
        self.hidden = nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> [N, L, 5]"""
        return self.head(F.relu(self.hidden(F.relu(self.enter(x)))))


@dataclass(frozen=True)
class Case:
    """A class that builds itself at a width, and inputs."""

    build: Callable[[int], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]

    def model(self, width: int) -> nn.Module:
        """Return the class at a width, in float64, without dropout."""
        torch.manual_seed(0)
        return self.build(width).double().eval()


CASES = {
    "lightgcn": Case(LightGcn, pairs),
    "graph scores": Case(GraphScores, pairs),
    "cosine items": Case(CosineItems, history),
    "unisrec": Case(UniSRec, history),
    "frozen text": Case(FrozenText, history),
    "vqrec": Case(VqRec, history),
    "mmssl": Case(Mmssl, pairs),
    "mmssl scores": Case(MmsslScores, pairs),
    "perceiver": Case(Perceiver, points),
    "slots": Case(SlotAttention, points),
    "sasrec": Case(SasRec, history),
    "sasrec of torch": Case(SasRecTorch, history),
    "bert4rec": Case(Bert4Rec, history),
    "bert4rec without keepdim": Case(Bert4RecFlat, history),
    "gru4rec": Case(Gru4Rec, history),
    "fmlp": Case(Fmlp, history),
    "lrurec": Case(LruRec, history),
    "learned pooling": Case(LearnedPooling, history),
    "two way": Case(TwoWay, points),
    "tokens alone": Case(SelfTokens, points),
    "normed classes": Case(NormedClasses, points),
    "spectral": Case(Spectral, points),
}
