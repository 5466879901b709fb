"""Random models keep the laws: 1,000 of them without torch.export, a few dozen through it.

A law that breaks shrinks to the fewest steps that break it. `python -m tests.benchmarks.fuzz` runs
many more.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshkafy.plan.plan import Options
from tests.fuzz.graphs import INPUTS, Program, build
from tests.fuzz.laws import check

NESTINGS = (
    Options("masked", "full", "block"),
    Options("masked", "full", "prefix"),
    Options("sliced", "full", "block"),
)
programs = st.builds(
    Program,
    st.sampled_from(INPUTS),
    st.lists(st.tuples(st.integers(0, 999), st.integers(0, 3)), min_size=1, max_size=8).map(tuple),
    st.integers(0, 2**31),
)
checked = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.timeout(1200)  # 1,000 models: two minutes on a quiet core, more on a busy one
@settings(checked, max_examples=1000)  # each checks values and gradients at every size
@given(programs, st.sampled_from(NESTINGS))
def test_random_models_keep_the_laws(program: Program, options: Options) -> None:
    check(build(program), options)


@settings(checked, max_examples=10)
@given(programs, st.sampled_from(NESTINGS))
def test_random_models_keep_the_laws_through_export(program: Program, options: Options) -> None:
    check(build(program), options, exported=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_program_is_the_same_model_every_time(seed: int) -> None:
    program = Program("ids", tuple((n, 0) for n in random.Random(seed).sample(range(999), 4)), seed)
    first, second = build(program), build(program)
    assert all(a.equal(b) for a, b in zip(first.outputs, second.outputs, strict=True))


@pytest.mark.parametrize("kind", INPUTS)
def test_a_replay_over_the_same_weights_is_the_model(kind: str) -> None:
    built = build(Program(kind, ((3, 0), (17, 1), (41, 0)), 7))
    again = built.replay(built.model.state_dict())
    assert all(a.equal(b) for a, b in zip(built.outputs, again, strict=True))
