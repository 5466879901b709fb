"""Filtering, order, split and batches against plain Python."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from math import inf, nan
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from examples.fmrlrec import data, formats
from examples.fmrlrec.config import Config, DataError, replace

REAL = Path(__file__).parents[3] / "shared" / "data"
Rows = list[tuple[int, int, int]]


def naive_core(rows: Rows, count: int) -> Rows:
    while True:
        users = Counter(u for u, _, _ in rows)
        items = Counter(i for _, i, _ in rows)
        kept = [r for r in rows if users[r[0]] >= count and items[r[1]] >= count]
        if len(kept) == len(rows):
            return kept
        rows = kept


def random_rows(seed: int, n: int = 1500) -> Rows:
    random = np.random.default_rng(seed)
    users = random.zipf(1.4, n) % 120
    items = random.zipf(1.3, n) % 90
    times = random.permutation(n)
    return list(zip(users.tolist(), items.tolist(), times.tolist(), strict=True))


def source_of(rows: Rows, items: pl.DataFrame | None = None) -> formats.Source:
    frame = pl.DataFrame(rows, schema=list(formats.INTERACTIONS), orient="row")
    return formats.Source(frame.lazy(), None if items is None else items.lazy(), Path("."))


def prepared(rows: Rows, folder: Path, **changes: object) -> data.Dataset:
    return data.prepare(source_of(rows), folder, replace(Config(), dict(changes)))


def as_histories(dataset: data.Dataset) -> dict[object, list[object]]:
    names = dataset.catalogue["item_id"].to_list()
    return {
        user: [names[i - 1] for i in dataset.sequence(number)]
        for number, user in enumerate(dataset.user_ids)
    }


@pytest.mark.parametrize("partition_rows", [10_000, 300])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_core_filter_and_order_match_plain_python(
    seed: int, partition_rows: int, tmp_path: Path
) -> None:
    rows = random_rows(seed)
    expected: dict[object, list[object]] = {}
    for user, item, _ in sorted(naive_core(rows, 5), key=lambda row: row[2]):
        expected.setdefault(user, []).append(item)
    found = prepared(rows, tmp_path, partition_rows=partition_rows)
    assert as_histories(found) == expected


def test_equal_times_keep_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [(1, item, 0) for item in (3, 1, 2)]
    assert as_histories(prepared(rows, tmp_path, min_count=1)) == {1: [3, 1, 2]}


def test_duplicates_and_gaps_are_counted(tmp_path: Path) -> None:
    rows = [(1, 1, 0), (1, 1, 0), (1, 2, 1), (None, 2, 3), (1, None, 4)]
    assert prepared(rows, tmp_path, min_count=1).problems == {  # type: ignore[arg-type]
        "interactions without user, item or time": 2,
        "duplicate interactions": 1,
    }


@pytest.mark.parametrize(("policy", "left"), [("drop", [1, 2]), ("keep", [1, 2, 9])])
def test_items_without_metadata(policy: str, left: list[int], tmp_path: Path) -> None:
    rows = [(1, 1, 0), (1, 2, 1), (1, 9, 2)]
    items = pl.DataFrame({"item_id": [1, 2, 2, 5], "title": ["a", "b", "bb", "e"]})
    config = replace(Config(), {"min_count": 1, "unknown_items": policy})
    found = data.prepare(source_of(rows, items), tmp_path, config)
    assert found.catalogue["item_id"].to_list() == left
    assert found.catalogue["title"].to_list() == ["a", "b", None][: len(left)]
    verb = {"drop": "dropped", "keep": "kept, no features"}[policy]
    assert found.problems == {
        f"unknown items ({verb})": 1,
        "items described twice or without id": 1,
    }


def test_categories_may_be_lists(tmp_path: Path) -> None:
    rows = [(1, 1, 0), (1, 2, 1)]
    items = pl.DataFrame({"item_id": [1, 2], "categories": [["a", "b/c"], None]})
    found = data.prepare(source_of(rows, items), tmp_path, replace(Config(), {"min_count": 1}))
    assert found.catalogue["categories"].to_list() == ["a|b/c", None]


@pytest.mark.parametrize(
    "times",
    [
        ["2020-01-02 00:00:00", "2019-01-01 00:00:00", "2021-05-05 10:00:00"],
        ["2020-01-02T00:00:00.5Z", "2020-01-02T00:00:00.25Z", "2020-01-02T00:00:00.75Z"],
        ["2020-01-02T12:00:00+02:00", "2020-01-02T12:00:00+03:00", "2020-01-02T12:00:00+01:00"],
        [1.5, 1.25, 1.75],
        ["1.5", "1", "2e0"],
        [datetime(2020, 1, 2), datetime(2019, 1, 1), datetime(2021, 5, 5)],
    ],
    ids=str,
)
def test_dates_and_numbers_are_times(times: list[object], tmp_path: Path) -> None:
    columns = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": times}
    source = formats.Source(pl.DataFrame(columns).lazy(), None, Path("."))
    found = data.prepare(source, tmp_path, replace(Config(), {"min_count": 1}))
    assert as_histories(found) == {1: [2, 1, 3]}


def test_a_time_that_is_no_number_is_none(tmp_path: Path) -> None:
    columns = {"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": [2.0, nan, inf, 1.0]}
    source = formats.Source(pl.DataFrame(columns).lazy(), None, Path("."))
    found = data.prepare(source, tmp_path, replace(Config(), {"min_count": 1}))
    assert as_histories(found) == {1: [4, 1]}
    assert found.problems == {"interactions without user, item or time": 2}


def test_items_that_are_called_otherwise_are_told(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["one", "two"]})
    with pytest.raises(
        DataError, match=r"ids are like \[1\] there, like \['a', 'b'\] in the table"
    ):
        data.prepare(source_of([(1, 1, 0)], items), tmp_path, replace(Config(), {"min_count": 1}))


def test_times_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": ["now", "then"]})
    with pytest.raises(DataError, match="none of the 2 interactions .* dates such as 2024-01-31"):
        data.prepare(formats.Source(frame.lazy(), None, Path(".")), tmp_path, Config())


@pytest.mark.parametrize("rows", [[(1, 1, 0), (1, 2, 1)], []])
def test_nothing_left_is_an_error(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no interaction"):
        prepared(rows, tmp_path)


@pytest.fixture
def dataset(tmp_path: Path) -> data.Dataset:
    return prepared(random_rows(3), tmp_path, min_count=3)


@pytest.mark.parametrize("windows", ["all", "last"])
def test_training_never_sees_held_out_items(windows: str, dataset: data.Dataset) -> None:
    config = replace(Config(), {"windows": windows, "max_length": 4, "batch": 8})
    bounds = data.training_windows(dataset, config)
    steps: Counter[tuple[int, int]] = Counter()
    for batch in data.training_batches(dataset, bounds, config, epoch=0):
        assert batch.inputs.shape[1] <= 4
        assert ((batch.inputs == 0) == (batch.targets == 0)).all()
        pairs = zip(batch.inputs.ravel().tolist(), batch.targets.ravel().tolist(), strict=True)
        steps.update(pair for pair in pairs if pair[1])
    expected: Counter[tuple[int, int]] = Counter()
    for user in range(dataset.users):
        history = dataset.sequence(user)[:-2].tolist()
        kept = history if windows == "all" else history[-5:]
        expected.update(zip(kept[:-1], kept[1:], strict=True))
    assert steps == expected


def test_packed_rows_hold_each_window_once_and_apart() -> None:
    random = np.random.default_rng(0)
    starts = np.cumsum(random.integers(3, 12, 40))
    windows = np.stack([starts, starts + random.integers(2, 12, 40)], axis=1)
    rows = data.pack(windows, 10)
    assert sorted(w for row in rows for w in row) == sorted(map(tuple, windows.tolist()))
    used = [sum(end - start - 1 for start, end in row) + len(row) - 1 for row in rows]
    assert max(used) <= 10 and sum(used) > 0.8 * 10 * len(rows)


def test_epochs_are_reproducible_and_differ(dataset: data.Dataset) -> None:
    config = replace(Config(), {"batch": 8})
    bounds = data.training_windows(dataset, config)
    epochs = [
        [b.inputs.tolist() for b in data.training_batches(dataset, bounds, config, epoch=e)]
        for e in (0, 0, 1)
    ]
    assert epochs[0] == epochs[1] != epochs[2]


@pytest.mark.parametrize(("split", "back"), [("validation", 2), ("test", 1)])
def test_leave_one_out(split: str, back: int, dataset: data.Dataset) -> None:
    config = replace(Config(), {"max_length": 6, "eval_batch": 7})
    seen = 0
    for batch in data.evaluation_batches(dataset, split, config):
        for user, inputs, target in zip(batch.users, batch.inputs, batch.targets, strict=True):
            history = dataset.sequence(user)
            assert target == history[-back]
            assert inputs[inputs > 0].tolist() == history[:-back][-6:].tolist()
        seen += len(batch.users)
    assert seen == dataset.users


def test_popularity_counts_training_only(dataset: data.Dataset) -> None:
    training = [dataset.sequence(u)[:-2] for u in range(dataset.users)]
    expected = Counter(np.concatenate(training).tolist())
    found = data.popularity(dataset)
    assert {i: n for i, n in enumerate(found.tolist()) if n} == expected


def test_one_user_file_works(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("1 5 6 7 8\n", "utf-8")
    config = replace(Config(), {"min_count": 1})
    found = data.prepare(formats.read(path, tmp_path), tmp_path / "out", config)
    assert data.statistics(found)["users"] == 1
    assert len(list(data.evaluation_batches(found, "test", config))) == 1


TABLE_1 = {"beauty": (22363, 12101), "clothing": (39387, 23033), "sports": (35598, 18357)}


@pytest.mark.parametrize("name", TABLE_1)
def test_real_counts_are_those_of_the_paper(name: str, tmp_path: Path) -> None:
    path = REAL / "amazon" / f"{name}.txt"
    if not path.exists():
        pytest.skip(f"no {path.name}: the real data is not part of the repository")
    found = data.prepare(formats.read(path, tmp_path), tmp_path, Config())
    assert (found.users, found.item_count) == TABLE_1[name]


def test_a_picture_is_found_by_the_id_of_its_item_whatever_its_kind(tmp_path: Path) -> None:
    for name in ("7.jpg", "8.PNG", "9.webp", "9.jpg", "x.1.jpeg", "10.txt", "user/3.gif"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    ids = ["7", "8", "9", "x.1", "10", "user/3", "11", "12"]
    items = pl.DataFrame({"item_id": ids, "image": [*[None] * 7, "elsewhere/a.jpg"]})

    found = items.with_columns(data.image_path(tmp_path))["image"].to_list()

    names = ["7.jpg", "8.PNG", "9.jpg", "x.1.jpeg", None, "user/3.gif", None]
    wanted = [name and str(tmp_path / "images" / name) for name in names]
    assert found == [*wanted, str(tmp_path / "elsewhere/a.jpg")]
