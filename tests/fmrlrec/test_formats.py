"""Each format gives the same rows; each defect is counted or refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from examples.fmrlrec import formats
from examples.fmrlrec.config import DataError

ROWS = [("u1", "a", 3), ("u1", "b", 5), ("u2", "b", 1)]
TITLES = {"a": "Lamp", "b": "Café"}


def rows_of(source: formats.Source) -> list[tuple[str, ...]]:
    frame = source.interactions.select(pl.col(c).cast(pl.String) for c in formats.INTERACTIONS)
    return sorted(frame.collect().rows())


def titles_of(source: formats.Source) -> dict[str, str]:
    assert source.items is not None
    return dict(source.items.select("item_id", "title").collect().rows())


def write_native(folder: Path, suffix: str) -> None:
    interactions = pl.DataFrame(ROWS, schema=list(formats.INTERACTIONS), orient="row")
    items = pl.DataFrame({"item_id": list(TITLES), "title": list(TITLES.values())})
    for name, frame in (("interactions", interactions), ("items", items)):
        path = folder / f"{name}.{suffix}"
        if suffix == "csv":
            frame.write_csv(path)
        elif suffix == "parquet":
            frame.write_parquet(path)
        else:
            path.write_text("\n".join(json.dumps(r) for r in frame.rows(named=True)), "utf-8")


def write_amazon_2014(folder: Path) -> None:
    reviews = [{"reviewerID": u, "asin": i, "unixReviewTime": t} for u, i, t in ROWS]
    meta = [{"asin": i, "title": t, "categories": [["X", "Y"]]} for i, t in TITLES.items()]
    for name, lines in (("reviews_Toy_5", reviews), ("meta_Toy", meta)):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as stream:
            stream.write("\n".join(map(repr, lines)))


def write_amazon_2023(folder: Path) -> None:
    reviews = [{"user_id": u, "parent_asin": i, "timestamp": t} for u, i, t in ROWS]
    meta = [{"parent_asin": i, "title": t, "store": "S"} for i, t in TITLES.items()]
    (folder / "Toy.jsonl").write_text("\n".join(map(json.dumps, reviews)), "utf-8")
    (folder / "meta_Toy.jsonl").write_text("\n".join(map(json.dumps, meta)), "utf-8")


WRITERS = {
    "csv": lambda folder: write_native(folder, "csv"),
    "parquet": lambda folder: write_native(folder, "parquet"),
    "jsonl": lambda folder: write_native(folder, "jsonl"),
    "amazon-2014": write_amazon_2014,
    "amazon-2023": write_amazon_2023,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[kind](folder)
    source = formats.read(folder, tmp_path / "scratch")
    assert rows_of(source) == sorted((u, i, str(t)) for u, i, t in ROWS)
    assert titles_of(source) == TITLES
    assert source.problems == {}


def test_sequence_text_keeps_the_order_of_the_line(tmp_path: Path) -> None:
    path = tmp_path / "seq.txt"
    path.write_text("7 30 10  20\n8\t10\n\n9\n", "utf-8")
    found = formats.read(path, tmp_path).interactions.collect().rows()
    assert found == [("7", "30", 0), ("7", "10", 1), ("7", "20", 2), ("8", "10", 0)]


@pytest.mark.parametrize(
    ("columns", "modality"),
    [("title", "text"), ("image", "image"), ("title,image", "both"), ("price", "id")],
)
def test_a_survey_sees_what_tells_items_apart(columns: str, modality: str, tmp_path: Path) -> None:
    write_native(tmp_path, "csv")
    (tmp_path / "items.csv").write_text(f"item_id,{columns}\n")
    found = formats.survey(formats.read(tmp_path, tmp_path / "scratch"))
    assert found == formats.Survey(users=2, items=2, interactions=3, modality=modality)


def test_broken_lines_and_bytes_are_counted_not_fatal(tmp_path: Path) -> None:
    good = json.dumps({"user_id": "u", "item_id": "i", "timestamp": 1}).encode()
    lines = [good, b"{broken", b"[1, 2]", b'{"user_id": "\xff", "item_id": "i", "timestamp": 2}']
    (tmp_path / "interactions.jsonl").write_bytes(b"\n".join(lines))
    source = formats.read(tmp_path, tmp_path / "scratch")
    assert source.problems == {"unreadable lines of interactions": 2}
    assert [row[0] for row in rows_of(source)] == ["u", "\ufffd"]


def test_ids_may_turn_into_texts_late_in_a_table(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n},{n}\n" for n in range(11_000))
    (tmp_path / "interactions.csv").write_text(f"user_id,item_id,timestamp\n{rows}guest,7a,1\n")
    found = formats.read(tmp_path, tmp_path / "scratch").interactions.collect()
    assert len(found) == 11_001 and found["item_id"][-1] == "7a"


def test_ids_keep_their_zeros(tmp_path: Path) -> None:
    table = "user_id,item_id,timestamp\n1,007,1\n2,10,2\n"
    (tmp_path / "interactions.csv").write_text(table)
    rows = formats.read(tmp_path, tmp_path / "scratch").interactions.collect()
    assert rows["item_id"].to_list() == ["007", "10"]
    assert rows["user_id"].to_list() == [1, 2]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_columns_stand_between_the_marks_of_the_first_line(mark: str, tmp_path: Path) -> None:
    rows = [
        ("user_id", "item_id", "timestamp", "note"),
        ("1", "007", "1", "a|b"),
        ("2", "10", "2", "c"),
    ]
    (tmp_path / "interactions.csv").write_text("\n".join(map(mark.join, rows)) + "\n")
    found = formats.read(tmp_path, tmp_path / "scratch").interactions.collect()
    assert found.rows() == [(1, "007", 1, "a|b"), (2, "10", 2, "c")]


@pytest.mark.parametrize("name", ["interactions.csv", "interactions.parquet", "log.jsonl"])
def test_a_table_is_no_sequence_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("user_id,item_id,timestamp\n1 2,3,4\n")
    with pytest.raises(DataError, match="no sequence text .*give the folder"):
        formats.read(tmp_path / name, tmp_path / "scratch")


def test_literal_lines_are_never_executed(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    attack = f"__import__('pathlib').Path({str(target)!r}).touch()"
    with gzip.open(tmp_path / "reviews_x.json.gz", "wt", encoding="utf-8") as stream:
        stream.write(attack + "\n" + "(" * 5000)
    source = formats.read(tmp_path, tmp_path / "scratch")
    assert source.problems == {"unreadable lines of interactions": 2}
    assert not target.exists()


def test_categories_are_flattened_with_bars(tmp_path: Path) -> None:
    write_amazon_2014(tmp_path)
    items = formats.read(tmp_path, tmp_path / "scratch").items
    assert items is not None
    assert set(items.select("categories").collect()["categories"]) == {"X|Y"}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.5, None], pl.Float64),
        ([["X", None, "Y"], [], None], pl.List(pl.String)),
        ([[["X", "Y"], ["Z"]], [[], ["A"]]], pl.List(pl.List(pl.String))),
        ([[1, 2], [3, 4]], pl.Array(pl.Int64, 2)),
    ],
)
def test_lists_in_a_table_are_the_same_texts(values: list[Any], kind: Any) -> None:
    column = pl.Series("a", values, dtype=kind)
    found = column.to_frame().select(formats.text_of(pl.col("a"), column.dtype))["a"].to_list()
    assert found == [formats.text(value) for value in values]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing recognised"),
        ({"interactions.csv": b""}, "is empty"),
        ({"interactions.csv": b"user,item\n1,2\n"}, "lacks item_id, timestamp, user_id"),
        ({"a.txt": b""}, "is empty"),
        ({"reviews_a.json.gz": b"\x1f\x8b\x08\x00trunc"}, "cannot be read to its end"),
    ],
)
def test_unusable_folders_are_refused(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        formats.read(tmp_path, tmp_path / "scratch")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data at"):
        formats.read(tmp_path / "nowhere", tmp_path)
