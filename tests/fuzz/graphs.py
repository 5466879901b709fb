"""Random models: a list of steps with seeds, which shrinks well, becomes a model and its inputs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tests.fuzz.building import Builder, Run, Value
from tests.fuzz.steps import IMAGE, SEQUENCE, aten, linear, to_sequence

INPUTS = ("vectors", "ids", "image", "vectors", "ids")
POOLED = ("mean", "first", "all", "all")
TABLE = 11


@dataclass(frozen=True)
class Program:
    """What a model is made of: its input, its steps (number of the step, reach, seed), its seed."""

    start: str
    steps: tuple[tuple[int, int], ...]
    seed: int


@dataclass(frozen=True)
class Built:
    """A random model at full width, its inputs, its eager outputs, and how to replay it."""

    program: Program
    model: fx.GraphModule
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Run

    def replay(self, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return what the model computes with smaller weights, sizes taken from their shapes."""
        run = Run(random.Random(0), state, self.run.log, self.inputs)
        return tuple(v.tensor for v in _outputs(Builder(run), self.program))


def random_program(source: random.Random) -> Program:
    """Return a program of 1 to 10 steps."""
    steps = tuple(
        (source.randrange(1000), source.randrange(4)) for _ in range(source.randint(1, 10))
    )
    return Program(source.choice(INPUTS), steps, source.randrange(2**31))


def build(program: Program) -> Built:
    """Return the model of a program."""
    run = Run(random.Random(program.seed))
    builder = Builder(run)
    values = _outputs(builder, program)
    model = builder.finish(values)
    inputs = tuple(v.tensor for v in builder.inputs)
    return Built(program, model, inputs, tuple(v.tensor for v in values), run)


def _outputs(b: Builder, program: Program) -> list[Value]:
    pool = [_start(b, program.start)]
    for number, reach in program.steps:
        x = pool[max(0, len(pool) - 1 - (reach if reach < 3 else 0))]
        image = len(x.shape) == 4
        table = IMAGE if image else SEQUENCE
        name = sorted(table)[number % len(table)]
        pool.append(table[name](b, x, pool))
        if image and number % 5 == 0:
            pool.append(to_sequence(b, pool[-1]))
    return [_head(b, v) for v in b.unused(list(dict.fromkeys(pool)))]


def _start(b: Builder, kind: str) -> Value:
    generator = torch.Generator().manual_seed(b.run.random.randrange(2**31))
    if kind == "image":
        x = b.input(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64))
        return b(
            aten.conv2d.default, x, b.param(b.width(), 3, 3, 3, scale=0.3), None, [1, 1], [1, 1]
        )
    if kind == "ids":
        ids = b.input(torch.randint(0, TABLE, (2, 5), generator=generator))
        return b(aten.embedding.default, b.param(TABLE, b.width()), ids)
    x = b.input(torch.randn(2, 5, 3, generator=generator, dtype=torch.float64))
    return linear(b, x, b.width())


def _head(b: Builder, x: Value) -> Value:
    """Read a value out: five classes, or as it is."""
    if len(x.shape) == 4:
        x = b(aten.mean.dim, x, [2, 3])
        return linear(b, x, 5)
    how = b.choose(POOLED)
    if how == "mean":
        x = b(aten.mean.dim, x, [1])
    elif how == "first":
        x = b(aten.select.int, x, 1, 0)
    if not b.chance(10):
        return linear(b, x, 5)
    b.run.copied = True  # which factor of a raw output nests is the library's to say
    return x
