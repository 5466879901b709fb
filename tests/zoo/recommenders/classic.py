"""Small recommenders as published code writes them, without a thought of being converted."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "recommenders"
ITEMS = 97
FIELDS = (11, 13, 19, 23)


class SasRecBlock(nn.Module):
    """Pre-norm attention and a point-wise feed-forward net made of 1x1 convolutions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-8)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1)
        self.norm2 = nn.LayerNorm(width, eps=1e-8)
        self.conv1 = nn.Conv1d(width, width, 1)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self.norm1(x).transpose(0, 1)
        keys = x.transpose(0, 1)
        mixed, _ = self.attention(query, keys, keys, attn_mask=mask)
        x = self.norm2((query + mixed).transpose(0, 1))
        return x + self.conv2(F.relu(self.conv1(x.transpose(1, 2)))).transpose(1, 2)


class SasRec(nn.Module):
    """SASRec: items scaled by sqrt(d), learned positions, causal attention, tied item scores."""

    def __init__(self, width: int, heads: int, blocks: int = 2, length: int = 20) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(SasRecBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-8)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        length = history.shape[1]
        x = self.items(history) * self.items.embedding_dim**0.5
        x = x + self.positions(torch.arange(length, device=history.device))
        x = x * (history != 0).unsqueeze(-1)
        mask = ~torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) @ self.items.weight.T


class RealLru(nn.Module):
    """Linear recurrent unit on separate real and imaginary parts."""

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(state))
        self.angle = nn.Parameter(torch.rand(state))
        self.real_in = nn.Linear(width, state, bias=False)
        self.imag_in = nn.Linear(width, state, bias=False)
        self.real_out = nn.Linear(state, width, bias=False)
        self.imag_out = nn.Linear(state, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        radius = torch.exp(-torch.exp(self.decay))
        cos, sin = radius * torch.cos(self.angle), radius * torch.sin(self.angle)
        gain = torch.sqrt(1 - radius**2)
        real, imag = gain * self.real_in(x), gain * self.imag_in(x)
        re, im = torch.zeros_like(real[:, 0]), torch.zeros_like(real[:, 0])
        states = []
        for step in range(x.shape[1]):
            re, im = cos * re - sin * im + real[:, step], sin * re + cos * im + imag[:, step]
            states.append(self.real_out(re) - self.imag_out(im))
        return torch.stack(states, 1)


class ComplexLru(nn.Module):
    """LRU as published: complex parameters, complex linear layers, recursive doubling."""

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.params_log = nn.Parameter(torch.rand(3, state) - 1)
        self.in_proj = nn.Linear(width, state).to(torch.cfloat)
        self.out_proj = nn.Linear(state, width).to(torch.cfloat)
        self.mix = nn.Parameter(torch.randn(width, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        nu, theta, gamma = torch.exp(self.params_log).split((1, 1, 1))
        decay = torch.exp(torch.complex(-nu, theta))
        h = self.in_proj(x.to(torch.cfloat)) * gamma * mask.unsqueeze(-1)
        length, step = h.shape[1], 1
        while step < length:
            carried = decay**step * h[:, :-step]
            h = torch.cat([h[:, :step], h[:, step:] + carried], 1)
            step *= 2
        return (self.out_proj(h) * self.mix).real + x


class LruRec(nn.Module):
    """Sequential recommender over LRU blocks; scores use the item table and a bias."""

    def __init__(self, width: int, state: int, *, is_complex: bool) -> None:
        super().__init__()
        self.is_complex = is_complex
        layer = ComplexLru if is_complex else RealLru
        self.items = nn.Embedding(ITEMS, width)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(layer(width, state) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(ITEMS))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        mask = history > 0
        x = self.dropout(self.items(history))
        for layer, norm, up, down in zip(self.layers, self.norms, self.up, self.down, strict=True):
            mixed = layer(x, mask) if self.is_complex else x + layer(x)
            x = norm(mixed + down(F.gelu(up(mixed))))
        return torch.matmul(x, self.items.weight.permute(1, 0)) + self.bias


def towers(widths: Sequence[int], *, last: bool = False) -> nn.Sequential:
    """Stacks linear layers with ReLU between them, and after the last one if asked."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class Dlrm(nn.Module):
    """DLRM: a dense tower, one table per field, pairwise products, a top tower."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        width, pairs = scale(16), len(FIELDS) * (len(FIELDS) + 1) // 2
        self.bottom = towers((10, scale(64), width), last=True)
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for rows in FIELDS)
        self.top = towers((width + pairs, scale(64), scale(32), 1))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        looked_up = [table(sparse[:, k : k + 1]) for k, table in enumerate(self.tables)]
        stacked = torch.stack([x, *looked_up], 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        row, column = torch.tril_indices(len(FIELDS) + 1, len(FIELDS) + 1, -1)
        return torch.sigmoid(self.top(torch.cat([x, products[:, row, column]], 1)))


class Fields(nn.Module):
    """One table over all fields, offset per field by an integer buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        starts = torch.tensor((0, *FIELDS[:-1])).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)
        self.table = nn.Embedding(sum(FIELDS), width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids + self.offsets)


class CrossNet(nn.Module):
    """DCN: x0 * (w . x) + b + x layers beside a deep tower."""

    def __init__(self, scale: Scale, *, matrix: bool) -> None:
        super().__init__()
        self.fields = Fields(scale(16))
        width = len(FIELDS) * scale(16)
        self.cross = nn.ModuleList(nn.Linear(width, width if matrix else 1) for _ in range(2))
        self.deep = towers((width, scale(64), scale(32)), last=True)
        self.out = nn.Linear(width + scale(32), 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = self.fields(ids).flatten(1)
        x = first
        for layer in self.cross:
            x = first * layer(x) + x
        return self.out(torch.cat([x, self.deep(first)], 1)).squeeze(1)


class DeepFm(nn.Module):
    """DeepFM: linear part, factorisation machine and a deep tower over one table."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.fields = Fields(scale(16))
        self.linear = Fields(1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.deep = towers((len(FIELDS) * scale(16), scale(64), 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.fields(ids)
        pairs = 0.5 * (x.sum(1).pow(2) - x.pow(2).sum(1)).sum(1, keepdim=True)
        return torch.sigmoid(self.linear(ids).sum(1) + self.bias + pairs + self.deep(x.flatten(1)))


class TwoTower(nn.Module):
    """Two towers whose normalised embeddings meet in a scaled product."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.users = nn.Embedding(41, scale(32))
        self.items = nn.Embedding(ITEMS, scale(32))
        self.user = towers((scale(32) + 10, scale(64), scale(32)))
        self.item = towers((scale(32), scale(64), scale(32)))
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, users: torch.Tensor, facts: torch.Tensor, items: torch.Tensor
    ) -> torch.Tensor:
        left = F.normalize(self.user(torch.cat([self.users(users), facts], -1)), dim=-1)
        right = F.normalize(self.item(self.items(items)), dim=-1)
        return left @ right.T * self.temperature.exp()


class FilterLayer(nn.Module):
    """A learned filter in the Fourier domain of the sequence axis, then a norm."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, length // 2 + 1, width, 2))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
        filtered = spectrum * torch.view_as_complex(self.weight)
        return self.norm(x + torch.fft.irfft(filtered, n=x.shape[1], dim=1, norm="ortho"))


class FmlpRec(nn.Module):
    """FMLP-Rec: filter layers and feed-forward layers in turn."""

    def __init__(self, scale: Scale, length: int = 7) -> None:
        super().__init__()
        width = scale(64)
        self.items = nn.Embedding(ITEMS, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.filters = nn.ModuleList(FilterLayer(length, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, scale(256)) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(scale(256), width) for _ in range(2))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        places = torch.arange(history.shape[1], device=history.device).expand_as(history)
        x = self.norm(self.items(history) + self.positions(places))
        for mix, up, down in zip(self.filters, self.up, self.down, strict=True):
            x = mix(x)
            x = x + down(F.gelu(up(x)))
        return x[:, -1] @ self.items.weight.T


class LightGcn(nn.Module):
    """LightGCN: embeddings averaged over hops of a sparse, normalised adjacency matrix."""

    def __init__(self, width: int, users: int = 41, items: int = 59) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.register_buffer("graph", self._adjacency(users, items))

    @staticmethod
    def _adjacency(users: int, items: int) -> torch.Tensor:
        row = torch.arange(users)
        edges = torch.stack([row, users + row % items])
        both = torch.cat([edges, edges.flip(0)], 1)
        values = torch.full((both.shape[1],), 0.5)
        return torch.sparse_coo_tensor(both, values, (users + items,) * 2).coalesce()

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.users.weight, self.items.weight])
        hops = [x]
        for _ in range(2):
            x = torch.sparse.mm(self.graph, x)
            hops.append(x)
        left, right = (
            torch.stack(hops, 1)
            .mean(1)
            .split([self.users.num_embeddings, self.items.num_embeddings])
        )
        return (left[users] * right[items]).sum(1)


class PlainAttribute(nn.Module):
    """Keeps its sinusoidal positions as a plain tensor, neither parameter nor buffer."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        width = scale(64)
        angles = torch.arange(20)[:, None] * 10000 ** (-torch.arange(width)[None] / 64)
        self.positions = torch.sin(angles)
        self.items = nn.Embedding(ITEMS, width)
        self.mix = nn.GRU(width, scale(32), batch_first=True)
        self.out = nn.Linear(scale(32), ITEMS)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        x = self.items(history) + self.positions[: history.shape[1]]
        return self.out(self.mix(x)[0][:, -1])


class Uncopyable(nn.Module):
    """Holds a lock, as models with a lazily filled cache do: copy.deepcopy raises on it."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.items = nn.Embedding(ITEMS, scale(32))
        self.tower = towers((scale(32), scale(64), scale(32)))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        return self.tower(self.items(history).mean(1)) @ self.items.weight.T


class Branching(nn.Module):
    """Pools by a learned attention, or by the mean when no history is long enough."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, scale(32))
        self.score = nn.Linear(scale(32), 1)
        self.tower = towers((scale(32), scale(64), 10))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        x = self.items(history)
        if (history != 0).sum(1).max() > 3:
            pooled = (x * torch.softmax(self.score(x), 1)).sum(1)
        else:
            pooled = x.mean(1)
        return self.tower(pooled)


class Caser(nn.Module):
    """Caser: horizontal and vertical convolutions over the embedded history."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        width, filters = scale(32), scale(16)
        self.items = nn.Embedding(ITEMS, width)
        self.users = nn.Embedding(41, width)
        self.vertical = nn.Conv2d(1, 4, (7, 1))
        self.horizontal = nn.ModuleList(nn.Conv2d(1, filters, (k, width)) for k in (2, 3))
        self.inner = nn.Linear(4 * width + 2 * filters, width)
        self.out = nn.Linear(2 * width, ITEMS)

    def forward(self, history: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        image = self.items(history).unsqueeze(1)
        tall = self.vertical(image).flatten(1)
        wide = [F.relu(conv(image)).squeeze(3).amax(2) for conv in self.horizontal]
        h = F.relu(self.inner(torch.cat([tall, *wide], 1)))
        return self.out(torch.cat([h, self.users(users)], 1))


class Din(nn.Module):
    """DIN: attention of a candidate over the history through a small net, then a tower."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        width = scale(16)
        self.items = nn.Embedding(ITEMS, width)
        self.attend = nn.Sequential(
            nn.Linear(4 * width, scale(32)), nn.PReLU(), nn.Linear(scale(32), 1)
        )
        self.tower = nn.Sequential(
            nn.Linear(2 * width, scale(64)),
            nn.BatchNorm1d(scale(64)),
            nn.ReLU(),
            nn.Linear(scale(64), 1),
        )

    def forward(self, history: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        keys, query = self.items(history), self.items(candidate)
        wide = query.unsqueeze(1).expand_as(keys)
        scores = self.attend(torch.cat([wide, keys, wide - keys, wide * keys], -1))
        scores = scores.masked_fill((history == 0).unsqueeze(-1), -1e9)
        pooled = (torch.softmax(scores, 1) * keys).sum(1)
        return self.tower(torch.cat([pooled, query], 1)).squeeze(1)


class Gru4Rec(nn.Module):
    """GRU4Rec with one-hot clicks as its input."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.gru = nn.GRU(ITEMS, scale(64), 2, batch_first=True)
        self.out = nn.Linear(scale(64), ITEMS)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        clicks = F.one_hot(history, ITEMS).float()
        return torch.tanh(self.out(self.gru(clicks)[0][:, -1]))


class AutoInt(nn.Module):
    """AutoInt: multi-head attention among the embedded fields."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.fields = Fields(scale(32))
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(scale(32), scale(4), batch_first=True) for _ in range(2)
        )
        self.residual = nn.Linear(scale(32), scale(32))
        self.out = nn.Linear(len(FIELDS) * scale(32), 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = first = self.fields(ids)
        for layer in self.layers:
            x = layer(x, x, x, need_weights=False)[0]
        return torch.sigmoid(self.out(F.relu(x + self.residual(first)).flatten(1)))


class NeuMf(nn.Module):
    """Neural collaborative filtering: a product of embeddings beside a tower."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.users = nn.ModuleList((nn.Embedding(41, scale(16)), nn.Embedding(41, scale(32))))
        self.items = nn.ModuleList((nn.Embedding(ITEMS, scale(16)), nn.Embedding(ITEMS, scale(32))))
        self.tower = towers((2 * scale(32), scale(64), scale(16)), last=True)
        self.out = nn.Linear(2 * scale(16), 1)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        product = self.users[0](users) * self.items[0](items)
        deep = self.tower(torch.cat([self.users[1](users), self.items[1](items)], -1))
        return self.out(torch.cat([product, deep], -1)).squeeze(-1)


class Mmoe(nn.Module):
    """MMoE: dense experts mixed by one gate per task."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.fields = Fields(scale(16))
        width = len(FIELDS) * scale(16)
        self.experts = nn.ModuleList(
            towers((width, scale(64), scale(32)), last=True) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(width, 3) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(scale(32), 1) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        x = self.fields(ids).flatten(1)
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        mixes = [torch.softmax(gate(x), -1).unsqueeze(-1) for gate in self.gates]
        return [head((experts * mix).sum(1)) for head, mix in zip(self.heads, mixes, strict=True)]


def _histories(model: nn.Module) -> Built:
    return model, (given.tokens(),), {}


def _sparse() -> torch.Tensor:
    return torch.stack(
        [given.tokens(length=4)[:, 0] * k % rows for k, rows in enumerate(FIELDS, 1)], 1
    )


def _fields(model: nn.Module) -> Built:
    return model, (_sparse(),), {}


def _users() -> torch.Tensor:
    return torch.tensor([5, 40, 17])


def _candidates() -> torch.Tensor:
    return torch.tensor([9, 31, 57])


@entry("sasrec", FAMILY, tags=("width-scalar",))
def sasrec(scale: Scale) -> Built:
    return _histories(SasRec(scale(64), scale(4)))


@entry("sasrec_one_head", FAMILY, tags=("width-scalar", "clamp"))
def sasrec_one_head(scale: Scale) -> Built:
    return _histories(SasRec(scale(64), 1))


@entry("lru_real", FAMILY)
def lru_real(scale: Scale) -> Built:
    return _histories(LruRec(scale(64), scale(128), is_complex=False))


@entry("lru_complex", FAMILY, tags=("complex",))
def lru_complex(scale: Scale) -> Built:
    return _histories(LruRec(scale(64), scale(128), is_complex=True))


@entry("dlrm", FAMILY)
def dlrm(scale: Scale) -> Built:
    return Dlrm(scale), (given.normal(3, 10), _sparse()), {}


@entry("dcn", FAMILY)
def dcn(scale: Scale) -> Built:
    return _fields(CrossNet(scale, matrix=False))


@entry("dcn_v2", FAMILY)
def dcn_v2(scale: Scale) -> Built:
    return _fields(CrossNet(scale, matrix=True))


@entry("deepfm", FAMILY)
def deepfm(scale: Scale) -> Built:
    return _fields(DeepFm(scale))


@entry("two_tower", FAMILY)
def two_tower(scale: Scale) -> Built:
    return TwoTower(scale), (_users(), given.normal(3, 10), _candidates()), {}


@entry("fmlp_rec", FAMILY)
def fmlp_rec(scale: Scale) -> Built:
    return _histories(FmlpRec(scale))


@entry("lightgcn", FAMILY, tags=("sparse",))
def lightgcn(scale: Scale) -> Built:
    return LightGcn(scale(32)), (_users(), _candidates()), {}


@entry("plain_attribute", FAMILY, tags=("lifted-constant", "fused-recurrence"))
def plain_attribute(scale: Scale) -> Built:
    return _histories(PlainAttribute(scale))


@entry("uncopyable", FAMILY, tags=("uncopyable",))
def uncopyable(scale: Scale) -> Built:
    return _histories(Uncopyable(scale))


@entry("branching", FAMILY, tags=("branch",))
def branching(scale: Scale) -> Built:
    return _histories(Branching(scale))


@entry("caser", FAMILY)
def caser(scale: Scale) -> Built:
    return Caser(scale), (given.tokens(), _users()), {}


@entry("din", FAMILY)
def din(scale: Scale) -> Built:
    return Din(scale), (given.tokens(), _candidates()), {}


@entry("gru4rec", FAMILY, tags=("fused-recurrence",))
def gru4rec(scale: Scale) -> Built:
    return _histories(Gru4Rec(scale))


@entry("autoint", FAMILY)
def autoint(scale: Scale) -> Built:
    return _fields(AutoInt(scale))


@entry("neumf", FAMILY)
def neumf(scale: Scale) -> Built:
    return NeuMf(scale), (_users(), _candidates()), {}


@entry("mmoe", FAMILY)
def mmoe(scale: Scale) -> Built:
    return _fields(Mmoe(scale))
