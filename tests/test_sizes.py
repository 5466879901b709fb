"""sizes.py: every way to write a ladder, and every way to write it wrongly."""

from __future__ import annotations

import ast
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matryoshkafy.sizes
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.sizes import Ladder, SizesError, parse_ladder, parse_sizes, width_at

GOOD = [
    ("64..1024", 1024, (64, 128, 256, 512, 1024)),
    ("64..768", 768, (64, 128, 256, 512, 768)),
    ("3..7", 7, (3, 6, 7)),
    ("3..6", 6, (3, 6)),
    ("1..1", 1, (1,)),
    ("64..64", 64, (64,)),
    (" 64 .. 128 ", 128, (64, 128)),
    ("64..768:64", 768, tuple(range(64, 769, 64))),
    ("64..700:256", 700, (64, 320, 576, 700)),
    ("64..128:1000", 128, (64, 128)),
    ("64,128,1024", 1024, (64, 128, 1024)),
    (" 64, 128 ,1024 ", 1024, (64, 128, 1024)),
    ("128", 128, (128,)),
    ("0.25,0.5,1", 100, (25, 50, 100)),
    ("1/4, 1/2, 1", 10, (3, 5, 10)),
    (".5,1.", 7, (4, 7)),
    ("1.0", 9, (9,)),
    ([64, 128], 128, (64, 128)),
    ((64, 128), 128, (64, 128)),
    (range(1, 4), 3, (1, 2, 3)),
    (np.array([2, 4]), 4, (2, 4)),
    ([np.int64(2), 4], 4, (2, 4)),
    ([0.25, 0.5, 1.0], 768, (192, 384, 768)),
    ([0.25, 0.5, 1], 768, (192, 384, 768)),
    ([np.float32(0.1), 1.0], 10, (1, 10)),
    ([1 / 3, 2 / 3, 1.0], 3, (1, 2, 3)),
    ([0.1, 0.3, 0.7, 1.0], 10, (1, 3, 7, 10)),
    ([0.07, 1.0], 100, (7, 100)),
    ([Fraction(1, 3), 1], 4, (2, 4)),
    ([1e-9, 1.0], 10, (1, 10)),
    ([1.0], 5, (5,)),
    ([5], 5, (5,)),
]

BAD = [
    ("", "empty"),
    ("   ", "empty"),
    ([], "empty"),
    ((), "empty"),
    (np.array([]), "empty"),
    ([64, 32, 128], "strictly ascend"),
    ("64,32,128", "strictly ascend"),
    ([1.0, 0.5], "strictly ascend"),
    ([64, 64, 128], "repeated"),
    ("64,64,128", "repeated"),
    ([0.5, 0.5, 1.0], "repeated"),
    ([0, 128], "not positive"),
    ([-64, 128], "not positive"),
    ("0,128", "not positive"),
    ("-64,128", "not positive"),
    ([0.0, 1.0], "not positive"),
    ([-0.5, 1.0], "not positive"),
    ([-1e-9, 1.0], "not positive"),
    ("0..128", "1 <= START <= END"),
    ("-4..128", "1 <= START <= END"),
    ("128..64", "1 <= START <= END"),
    ("64..128:0", "STEP of at least 1"),
    ("64..128:-8", "STEP of at least 1"),
    ([64, 256], "above the model's width, 128"),
    ("64..256", "above the model's width, 128"),
    ([64, 100], "below the model's width, 128"),
    ("64..100", "below the model's width, 128"),
    ([64], "append 128"),
    ([0.25, 0.5], "expected 1"),
    ("0.25,0.5", "expected 1"),
    ([0.5, 1.5], "above 1"),
    ([0.5, 128], "above 1"),
    ([64.0, 128.0], "without a point"),
    ([0.001, 0.002, 1.0], "both give 1 units"),
    ("wide", "'wide' is neither"),
    ("64..", "neither"),
    ("..128", "neither"),
    ("64...128", "neither"),
    ("64..128..256", "neither"),
    ("64..128:8:8", "neither"),
    ("64;128", "neither"),
    ("64 96,128", "neither"),
    ("64,,128", "'' is neither"),
    ("64,128,", "'' is neither"),
    ("1/0,1", "neither"),
    ("0x40,128", "neither"),
    ("1e2,128", "neither"),
    ("nan,1", "neither"),
    ("inf", "neither"),
    ("６４,128", "neither"),
    ("9" * 5000, "neither"),
    ("1..999999999:1", "more than 4096"),
    (list(range(1, 5000)), "more than 4096"),
    ([True, 128], "True is neither"),
    ([False], "False is neither"),
    ([math.nan, 1.0], "nan is neither"),
    ([math.inf], "inf is neither"),
    (["64", 128], "'64' is neither"),
    ([None], "None is neither"),
    ([[64, 128]], "neither"),
    ([1j], "neither"),
    (128, "of type int"),
    (None, "of type NoneType"),
    (True, "of type bool"),
    (b"64", "of type bytes"),
    ({64: 1, 128: 2}, "of type dict"),
    ({64, 128}, "of type set"),
]


@pytest.mark.parametrize(("sizes", "width", "expected"), GOOD, ids=str)
def test_reads_every_way_to_write_a_ladder(sizes, width, expected):
    assert parse_sizes(sizes, width) == expected
    assert all(type(size) is int for size in parse_sizes(sizes, width))


@pytest.mark.parametrize(("sizes", "text"), BAD, ids=lambda value: repr(value)[:40])
def test_refuses_with_what_was_given_and_the_width(sizes, text):
    with pytest.raises(SizesError, match=text.replace("(", r"\(")) as caught:
        parse_sizes(sizes, 128)
    assert isinstance(caught.value, MatryoshkafyError)
    assert "128" in str(caught.value)
    assert repr(sizes)[:40] in str(caught.value) or isinstance(sizes, np.ndarray)
    assert len(str(caught.value)) < 500


def test_a_ladder_is_read_before_the_width_is_known():
    ladder = parse_ladder("0.25,1")
    assert ladder == Ladder("'0.25,1'", (Fraction(1, 4), Fraction(1)))
    assert ladder.relative and not parse_ladder([1, 2]).relative
    assert [ladder.at(width) for width in (4, 6)] == [(1, 4), (2, 6)]
    with pytest.raises(SizesError):
        parse_ladder("sixty-four")


@given(n=st.integers(1, 10**12), width=st.integers(1, 10**6), data=st.data())
def test_width_at_is_the_exact_ceiling(n, width, data):
    size = data.draw(st.integers(1, width))
    found = width_at(n, size, width)
    assert found == max(1, math.ceil(Fraction(n) * size / width))
    assert 1 <= found <= n
    assert width_at(n, width, width) == n


@given(first=st.integers(1, 5000), width=st.integers(1, 5000))
def test_doubling_ascends_from_the_first_to_the_width(first, width):
    if first > width:
        return
    sizes = parse_sizes(f"{first}..{width}", width)
    assert sizes[0] == first and sizes[-1] == width
    assert all(b == 2 * a for a, b in zip(sizes[:-2], sizes[1:-1], strict=True))
    assert len(sizes) < 2 or sizes[-2] < width <= 2 * sizes[-2]


def test_sizes_imports_no_torch():
    tree = ast.parse(Path(matryoshkafy.sizes.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names} == {
        "matryoshkafy.errors"
    }
