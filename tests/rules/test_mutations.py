"""Rows of the table, broken one at a time: the enumeration or the arithmetic case sees each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from matryoshkafy.graph.nodes import gives_several
from matryoshkafy.graph.vocabulary import BASICS, Basics
from matryoshkafy.rules import OPS, Weight
from tests.rules import test_rules as cases
from tests.rules import test_table as table
from tests.rules.kept import rules_kept

Check = Callable[[], object]


def narrow(key: str) -> Check:
    """Return the check that the sliced models around an op are the narrow ones."""
    return lambda: [cases.test_sliced_is_the_narrow_model(n) for n in _numbers(key)]


def prefix(key: str) -> Check:
    """Return the check of the laws of masked nesting around an op."""
    return lambda: [cases.test_masked_keeps_the_prefix_law(n) for n in _numbers(key)]


def _numbers(key: str) -> list[int]:
    return [n for n, case in enumerate(cases.CASES) if case.key == key]


@dataclass(frozen=True)
class Mutation:
    """A row, the facts of it that are changed, and the check that must see it."""

    key: str
    facts: dict[str, Any]
    check: Check


def elementwise(walk: Any, node: Any, args: Any) -> Any:
    """A rule that is wrong wherever the units of an axis are not alone."""
    terms = walk.of(node.all_input_nodes[0])
    return (terms,) * len(walk.shapes(node)) if gives_several(node) else terms


MUTATIONS = [
    Mutation("linear", {"weights": {"weight": Weight(out=1, into=0)}},
             table.test_outputs_of_a_weight_are_apart_and_inputs_in_all),
    Mutation("reshape", {"sizes": None}, narrow("reshape")),
    Mutation("expand", {"sizes": "implicit"}, narrow("expand")),
    Mutation("group_norm", {"sizes": "eps"}, narrow("group_norm")),
    Mutation("softmax", {"axes": elementwise}, prefix("softmax")),
    Mutation("sort", {"axes": elementwise}, narrow("sort")),
    Mutation("mean", {"statistic": "sum"}, table.test_a_statistic_is_the_op),
    Mutation("layer_norm", {"statistic": ""}, table.test_statistics_and_nested_operators_exist),
    Mutation("rms_norm", {"nested": "layer_norm"}, table.test_a_nested_norm_of_one_level_is_the_op),
    Mutation("masked_fill", {"fills": False}, table.test_what_fills_may_give_infinity),
    Mutation("pow", {"algebra": "multiply"}, table.test_arithmetic_is_what_its_word_says),
    Mutation("bmm", {"reads": ("self", 1)},
             table.test_what_is_read_may_change_places_with_the_weights),
    Mutation("conv2d", {"product": True},
             table.test_products_have_two_tensors_without_a_place_for_parameters),
    Mutation("arange", {"counts": False}, table.test_counts_and_lookups),
    Mutation("addmm", {"factor": "gamma"}, table.test_named_arguments_are_the_ops_own),
    Mutation("nonzero", {"measures": True}, table.test_what_measures_gives_sizes_alone),
    Mutation("dropout", {"training": ""}, table.test_what_has_a_mode_follows_it),
    Mutation("mul", {"one_type": True}, table.test_what_is_of_one_type_refuses_two),
    Mutation("mm", {"one_type": False}, table.test_what_is_of_one_type_refuses_two),
]  # fmt: skip


@pytest.mark.parametrize("broken", MUTATIONS, ids=lambda m: f"{m.key}-{next(iter(m.facts))}")
def test_a_broken_row_is_seen(broken: Mutation) -> None:
    broken.check()
    early = {f.name for f in fields(Basics)} & broken.facts.keys()
    with rules_kept():
        if early:
            BASICS[broken.key] = replace(BASICS.get(broken.key, Basics()), **broken.facts)
        else:
            OPS[broken.key] = replace(OPS[broken.key], **broken.facts)
        assert _fails(broken.check), f"nothing sees {broken.key} with {broken.facts}"


def _fails(check: Check) -> bool:
    try:
        check()
    except Exception:  # noqa: BLE001  a wrong row may fail anywhere between plan and arithmetic
        return True
    return False
