"""One training step of the recommender, ours against a straightforward implementation.

    python tests/benchmarks/fmrlrec_step.py [--width 1024] [--rounds 10]

The reference computes the same loss from the same parameters the obvious way: nested linears as a
loop over prefixes and a cat, norms size by size, the recurrence in complex64, logits size by size,
cross entropy over all positions. Both take forward, backward and AdamW; rounds alternate. "ours,
packed" has the same sequences as the example's loader hands them over: several in a row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.data import left_pad, pack, steps
from examples.fmrlrec.encoders import Features
from examples.fmrlrec.nesting import build, nest, objective, sizes_of

ITEMS, BATCH, LENGTH = 12_101, 32, 50
Weights = dict[str, nn.Parameter]


Pair = tuple[Tensor, Tensor]


def sequences(mean_length: float) -> tuple[Pair, Pair]:
    """Inputs and targets, left padded [32, 50] and packed, at lengths like Amazon Beauty's."""
    random = np.random.default_rng(0)
    lengths = np.minimum(3 + random.geometric(1 / max(mean_length - 3, 1), BATCH), LENGTH + 1)
    if mean_length >= LENGTH:
        lengths[:] = LENGTH + 1
    ends = np.cumsum(lengths)
    items = random.integers(1, ITEMS + 1, ends[-1])
    rows = [items[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    padded = left_pad([row[:-1] for row in rows], LENGTH), left_pad([r[1:] for r in rows], LENGTH)
    packed = steps(items, pack(np.stack([ends - lengths, ends], axis=1), LENGTH))
    inputs, targets = (torch.from_numpy(part) for part in padded)
    return (inputs, targets), (torch.from_numpy(packed.inputs), torch.from_numpy(packed.targets))


class Reference:
    """The masked model as one would write it first."""

    def __init__(self, doll: nn.Module, sizes: tuple[int, ...], norm: str) -> None:
        self.weights: Weights = dict(doll.named_parameters())
        self.sizes, self.norm, self.width = sizes, norm, sizes[-1]

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        weights = self.weights
        real = (inputs != 0).unsqueeze(-1)
        x = functional.embedding(inputs, weights["items.weight"])
        x = self.normed(x, "norm_in")
        for block in ("blocks.0.", "blocks.1."):
            x = x + self.recurrence(self.normed(x, f"{block}norm_mix"), f"{block}mix.", real)
            x = x + self.feed(self.normed(x, f"{block}norm_feed"), f"{block}feed.")
        x = self.normed(x, "norm_out")
        logits = [x[..., :m] @ weights["items.weight"][:, :m].t() + weights["bias"]
                  for m in self.sizes]  # fmt: skip
        stacked = torch.cat([part.flatten(0, 1) for part in logits])
        repeated = targets.flatten().repeat(len(self.sizes))
        mean = functional.cross_entropy(stacked, repeated, ignore_index=0)
        return mean * len(self.sizes)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Output block j from the inputs of its prefix, one product a size, then a cat."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        outs, ins = weight.shape[0] // self.width, weight.shape[1] // self.width
        parts, low = [], 0
        for m in self.sizes:
            rows = slice(low * outs, m * outs)
            parts.append(functional.linear(x[..., : m * ins], weight[rows, : m * ins], bias[rows]))
            low = m
        return torch.cat(parts, dim=-1)

    def normed(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        parts, low = [], 0
        for m in self.sizes:
            start = 0 if self.norm == "prefix" else low
            part = functional.layer_norm(x[..., start:m], (m - start,))[..., low - start :]
            parts.append(part * weight[low:m] + bias[low:m])
            low = m
        return torch.cat(parts, dim=-1)

    def recurrence(self, x: Tensor, name: str, real: Tensor) -> Tensor:
        """The published layer: everything complex, log2(T) doublings."""
        weights = self.weights
        pairs = self.linear(x, f"{name}in_proj").unflatten(-1, (-1, 2)).contiguous()
        driven = torch.view_as_complex(pairs) * weights[f"{name}gamma_log"].exp() * real
        angle = weights[f"{name}theta_log"].exp()
        power = torch.polar(torch.exp(-weights[f"{name}nu_log"].exp()), angle)
        reach = 1
        while reach < driven.shape[1]:
            later = driven[:, reach:] + power * driven[:, :-reach]
            driven = torch.cat((driven[:, :reach], later), dim=1)
            power, reach = power * power, 2 * reach
        return self.linear(torch.view_as_real(driven).flatten(-2), f"{name}out_proj")

    def feed(self, x: Tensor, name: str) -> Tensor:
        gated = functional.silu(self.linear(x, f"{name}gate")) * self.linear(x, f"{name}up")
        return self.linear(gated, f"{name}down")


def step(loss_of: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor],
         optimizer: torch.optim.Optimizer) -> tuple[float, float]:  # fmt: skip
    """Seconds and loss of one step."""
    started = time.perf_counter()
    optimizer.zero_grad()
    loss = loss_of(*batch)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started, loss.item()


def compare(config: Config, mean_length: float, rounds: int) -> None:
    """Prints the losses at equal weights and the medians over alternating rounds."""
    sizes = sizes_of(config)
    doll = nest(build(config, ITEMS, Features({}), sizes[-1]), config).train()
    learning, reference = objective(doll, config), Reference(doll, sizes, config.norm)
    batch, packed = sequences(mean_length)
    ours = lambda i, t: learning(i, labels=t)[0]  # noqa: E731
    expected = reference(*batch).item()
    gap = max(abs(ours(*inputs).item() / expected - 1) for inputs in (batch, packed))
    optimizer = torch.optim.AdamW(doll.parameters(), lr=1e-5)
    kinds = {
        "reference": (reference, batch), "ours": (ours, batch), "ours, packed": (ours, packed),
    }  # fmt: skip
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for kind, (loss_of, inputs) in kinds.items():
            times[kind].append(step(loss_of, inputs, optimizer)[0])
    targets = int((batch[1] != 0).sum())
    shape = "x".join(map(str, packed[0].shape))
    print(f"{targets} targets of {BATCH * LENGTH}, packed {shape}, relative loss gap {gap:.1e}")
    slow = statistics.median(times["reference"][1:])
    for kind, found in times.items():
        median = statistics.median(found[1:])
        print(f"  {kind:14} {median:8.3f} s   {slow / median:5.2f} x")


def main() -> None:
    """Reads the options and prints both length distributions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--norm", default="prefix")
    given = parser.parse_args()
    changes = {"sizes": f"8..{given.width}", "modality": "id", "dropout": 0.0, "norm": given.norm}
    config = replace(Config(), changes)
    shape = f"D = {given.width}, {len(sizes_of(config))} sizes, batch {BATCH} x {LENGTH}"
    print(f"{ITEMS} items, {shape}, {torch.get_num_threads()} thread(s), norm {given.norm}")
    for mean_length in (9.0, LENGTH):
        compare(config, mean_length, given.rounds)


if __name__ == "__main__":
    main()
