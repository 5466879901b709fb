"""A few hundred attacks on checkpoints, each read in a process of its own: see hostile.py."""

from __future__ import annotations

import pytest

from tests.files.hostile import ATTACKS, run_case, run_cases, sound_checkpoints

QUICK, SLOW = 2 * len(ATTACKS), 500


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return sound_checkpoints(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("number", range(QUICK))
def test_an_attack_does_no_harm(sources, number):
    result = run_case(number, 0, sources)
    assert not result.fault, result
    assert result.steps


@pytest.mark.slow
def test_five_hundred_attacks_do_no_harm():
    faults = [result for result in run_cases(SLOW, 1) if result.fault]
    assert not faults, faults


def test_the_judge_sees_harm(sources, monkeypatch, tmp_path):
    """What the promise forbids is seen, step by step."""
    import tests.files.hostile as hostile

    outside = tmp_path / "secret"
    outside.write_text("x")

    def execute(folder, report):
        import os

        os.system("true")

    def read(folder, report):
        outside.read_text()

    def die(folder, report):
        import os

        os.abort()

    def fill(folder, report):
        report("open", hostile.outcome_of(lambda: bytearray(2**31)))

    def fail(folder, report):
        report("open", "KeyError: x")

    harms = {
        execute: "os.system",
        read: "open",
        die: "died of SIGABRT",
        fill: "MemoryError",
        fail: "untyped error",
    }
    for harm, word in harms.items():
        monkeypatch.setattr(hostile, "read_all", harm)
        assert word in run_case(0, 0, sources).fault, harm
