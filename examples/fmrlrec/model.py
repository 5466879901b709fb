"""The recommender in plain PyTorch: item features or ids, linear recurrent units, gated layers.

Scores cover the padding item too, as column 0; it is never a target and never ranked.
Sources: fMRLRec (arXiv 2409.16627), LRURec (arXiv 2310.02367), LRU (arXiv 2303.06349).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.fmrlrec.scan import lru_scan, scan_step

RING = 0.1
STATES, HIDDEN = 2, 4  # recurrent states, and hidden units of a gated layer, in widths


@dataclass(frozen=True)
class Shape:
    """What the model is built from: `items` without padding, and `width` D."""

    items: int
    width: int
    blocks: int = 2
    dropout: float = 0.5
    r_min: float = 0.0


class FeatureItems(nn.Module):
    """Item embeddings E = Linear(features), equation 7; row 0 of the features pads with zeros."""

    def __init__(self, features: Tensor, width: int, *, trainable: bool = False) -> None:
        """`features` [items + 1, F] are kept as a parameter if trainable, else as a buffer."""
        super().__init__()
        self.features = nn.Parameter(features) if trainable else nn.Buffer(features)
        self.project = nn.Linear(features.shape[1], width)

    def forward(self) -> Tensor:
        """Returns the table of all items [items + 1, D]."""
        return self.project(self.features)


class IdItems(nn.Module):
    """A trainable table of item embeddings: the variant without language and image."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(items + 1, width))

    def forward(self) -> Tensor:
        """Returns the table of all items [items + 1, D]."""
        return self.weight


class LinearRecurrentUnit(nn.Module):
    """y = Re(C h) with h_t = lambda h_{t-1} + gamma B x_t, diagonal and complex in N states.

    The input is real, so B is one real product whose outputs are the states' (re, im) in turn, and
    Re(C h) is one real product over them.
    """

    def __init__(self, width: int, states: int, r_min: float) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * states)
        self.out_proj = nn.Linear(2 * states, width)
        # Eigenvalues uniform in the ring between two radii (Orvieto et al.); the open interval
        # keeps both logarithms finite where a radius is 0 or a draw is 0.
        area, turn, r_max = torch.rand(states), torch.rand(states), r_min + RING
        squared = (area * (r_max**2 - r_min**2) + r_min**2).clamp(1e-8, 1 - 1e-8)
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(squared)))
        self.theta_log = nn.Parameter(torch.log(2 * math.pi * turn.clamp_min(1e-8)))
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-squared))

    def transition(self) -> Tensor:
        """Returns lambda as (re, im), [N, 2]; its modulus is below 1 whatever the parameters."""
        modulus = torch.exp(-torch.exp(self.nu_log))
        angle = torch.exp(self.theta_log)
        return torch.stack((modulus * torch.cos(angle), modulus * torch.sin(angle)), dim=-1)

    def drive(self, x: Tensor) -> Tensor:
        """Returns gamma B x as (re, im), [..., N, 2]."""
        pairs = self.in_proj(x).unflatten(-1, (-1, 2))
        return pairs * torch.exp(self.gamma_log).unsqueeze(-1)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, T, D], real bool [B, T] (no padding there) -> [B, T, D]."""
        states = lru_scan(self.drive(x), self.transition(), real)
        return self.out_proj(states.flatten(-2))

    def step(self, x: Tensor, real: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, D], real [B], state [B, N, 2] -> the output of this step and the next state."""
        state = scan_step(self.drive(x), self.transition(), real, state)
        return self.out_proj(state.flatten(-2)), state


class GatedFeedForward(nn.Module):
    """(SiLU(x Wg + bg) * (x W1 + b1)) W2 + b2."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down(self.dropout(functional.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """LayerNorm, recurrence, residual; LayerNorm, gated feed-forward, residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.norm_mix = nn.LayerNorm(width)
        self.mix = LinearRecurrentUnit(width, STATES * width, shape.r_min)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = GatedFeedForward(width, HIDDEN * width, shape.dropout)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, T, D], real bool [B, T] -> [B, T, D]."""
        x = x + self.dropout(self.mix(self.norm_mix(x), real))
        return x + self.dropout(self.feed(self.norm_feed(x)))

    def step(self, x: Tensor, real: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, D], real bool [B], state [B, N, 2] -> the output and the next state."""
        mixed, state = self.mix.step(self.norm_mix(x), real, state)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed(self.norm_feed(x))), state


class Recommender(nn.Module):
    """Scores every item as the next one, at every position of sequences.

    Item 0 pads, on the left; between two sequences it separates them, so that several may share a
    row: its state is zero, and no position sees past it.
    """

    def __init__(
        self, shape: Shape, features: Tensor | None = None, *, trainable_features: bool = False
    ) -> None:
        """Embeds items by `features` [items + 1, F] where given, else by a table of its own."""
        super().__init__()
        self.items: nn.Module = (
            IdItems(shape.items, shape.width)
            if features is None
            else FeatureItems(features, shape.width, trainable=trainable_features)
        )
        self.norm_in = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        # Any: a ModuleList does not tell the type of its modules.
        self.blocks: Any = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm_out = nn.LayerNorm(shape.width)
        self.bias = nn.Parameter(torch.zeros(shape.items + 1))
        self.apply(_initialise)

    def forward(self, sequences: Tensor) -> Tensor:
        """sequences int64 [B, T] -> scores of the next item [B, T, items + 1]."""
        table = self.items()
        return functional.linear(self.encode(sequences, table), table, self.bias)

    def encode(self, sequences: Tensor, table: Tensor) -> Tensor:
        """sequences [B, T] and the item table [items + 1, D] -> hidden states [B, T, D]."""
        real = sequences != 0
        x = self.dropout(self.norm_in(functional.embedding(sequences, table)))
        for block in self.blocks:
            x = block(x, real)
        return self.norm_out(x)

    def start(self, batch: int) -> list[Tensor]:
        """Returns the states before the first step: zeros [B, N, 2] for each block."""
        units = [block.mix.nu_log for block in self.blocks]
        return [unit.new_zeros(batch, len(unit), 2) for unit in units]

    def advance(
        self, items: Tensor, states: list[Tensor], table: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """items int64 [B] and the states before them -> hidden states [B, D], the next states."""
        real, moved = items != 0, []
        x = self.dropout(self.norm_in(functional.embedding(items, table)))
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, real, state)
            moved.append(state)
        return self.norm_out(x), moved


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Small normal weights, as in LRURec: tied scores start near zero whatever the width."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
    elif isinstance(module, IdItems):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        module.weight[0] = 0
