"""The house stands: rooms in the order of the flow, no import upward, no circle, few floors."""

from __future__ import annotations

import pytest

from tests import imports

FLOORS, ARROWS, ROOM_ARROWS, BESIDE = 10, 70, 9, 4
# Capabilities that came beside the flow: each is a room of its own, and brings its own arrows.
ADDED = {"order", "natives", "serving"}


def test_every_room_has_its_place_in_the_flow() -> None:
    rooms = {imports.room_of(module) for module in imports.modules()}
    assert rooms <= set(imports.ROOMS), "name the new room in tests/imports.py, where it belongs"


@pytest.mark.parametrize("module", sorted(imports.module_imports()))
def test_nothing_imports_upward(module: str) -> None:
    place = imports.ROOMS.index
    mine = place(imports.room_of(module))
    upward = [o for o in imports.module_imports()[module] if place(imports.room_of(o)) > mine]
    assert not upward, f"{module} imports {upward}, which stand above it"


# What may be looked up by name although it stands above: pickle asks a model for the words of a
# checkpoint. Old names lead to the new ones by a table (tests/test_old_names.py).
BY_NAME = {"dolls.pickling": "files.pickles"}


def test_what_is_imported_by_name_is_known() -> None:
    assert imports.dynamic_imports() == BY_NAME


def test_no_circle() -> None:
    assert not imports.circle(imports.module_imports())
    assert not imports.circle(imports.room_imports())


def test_few_floors_and_arrows() -> None:
    graph = imports.room_imports()
    assert max(imports.floors(graph).values()) <= FLOORS
    assert sum(len(others) for room, others in graph.items() if room not in ADDED) <= ARROWS
    assert max(map(len, graph.values())) <= ROOM_ARROWS


def test_few_modules_beside_the_folders() -> None:
    beside = [p for p in imports.PACKAGE.glob("*.py") if not p.name.startswith("__")]
    assert len(beside) <= BESIDE, "a new capability gets a folder of its own"


def test_a_circle_is_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    assert set(imports.circle(graph)) == {"a", "b", "c"}
    assert imports.floors({"b": {"a"}, "c": {"a", "b"}}) == {"a": 1, "b": 2, "c": 3}
