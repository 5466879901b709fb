"""The four formats of interactions and items, read lazily into one pair of tables.

Interactions have the columns user_id, item_id, timestamp; items have item_id, title, price, brand,
categories, image. A format is recognised by the names of the files and by their first line.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from polars.datatypes import DataTypeClass

from examples.fmrlrec.config import DataError
from matryoshkafy.files.folders import digest_file, whole_file

INTERACTIONS = ("user_id", "item_id", "timestamp")
ITEMS = ("item_id", "title", "price", "brand", "categories", "image")
TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".jsonl.gz")
# Size, time and SHA-256 of files, by name.
Digests = dict[str, list[int | str]]
TOLD = {"both": "texts and pictures", "text": "texts", "image": "pictures", "id": "ids"}


@dataclass(frozen=True)
class Source:
    """Interactions and items that are not read yet, and what was wrong with their lines so far."""

    interactions: pl.LazyFrame
    items: pl.LazyFrame | None
    root: Path
    problems: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """How much there is of a shop, and what its items can be told apart by."""

    users: int
    items: int
    interactions: int
    modality: str

    def __str__(self) -> str:
        counts = f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"
        return f"{counts}; items with {TOLD[self.modality]}"


class Lines(NamedTuple):
    """How JSON-like lines become rows: the parser, other keys of columns, the columns of items."""

    parse: Callable[[str], Any]
    keys: dict[str, str]
    items: tuple[str, ...]


NATIVE = Lines(json.loads, {}, ITEMS)
AMAZON_2014 = Lines(
    ast.literal_eval,
    {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime"},
    ITEMS[:-1],
)
AMAZON_2023 = Lines(json.loads, {"item_id": "parent_asin", "brand": "store"}, ITEMS[:-1])


def read(path: Path, scratch: Path) -> Source:
    """Opens the data at `path` (a folder or a sequence text) without reading it into memory.

    Line formats are converted to parquet under `scratch`.
    Raises `DataError` where nothing is recognised.
    """
    if not path.exists():
        raise DataError(f"no data at {path}; give a folder or a file, or --data synthetic")
    if path.is_file() and path.suffix != ".txt":
        raise DataError(
            f"{path} is no sequence text (.txt); give the folder of a table, {path.parent}"
        )
    if path.is_file():
        return read_sequences(path)
    if reviews := sorted(path.glob("reviews_*.json.gz")):
        return _read_folder(path, scratch, (reviews, [*path.glob("meta_*.json.gz")]), AMAZON_2014)
    if tables := _tables(path, "interactions"):
        return _read_folder(path, scratch, (tables, _tables(path, "items")), NATIVE)
    if reviews := [file for file in sorted(path.glob("*.jsonl*")) if _is_amazon_2023(file)]:
        return _read_folder(path, scratch, (reviews, [*path.glob("meta_*.jsonl*")]), AMAZON_2023)
    texts = sorted(path.glob("*.txt"))
    if len(texts) == 1:
        return read_sequences(texts[0])
    raise DataError(
        f"nothing recognised in {path}: expected interactions.(csv|parquet|jsonl), "
        "reviews_*.json.gz, *.jsonl of Amazon Reviews 2023, or one sequence text"
    )


def survey(source: Source) -> Survey:
    """Counts a source before anything of it is prepared."""
    counts = source.interactions.select(
        users=pl.n_unique("user_id"), items=pl.n_unique("item_id"), interactions=pl.len()
    ).collect(engine="streaming")
    names = [] if source.items is None else source.items.collect_schema().names()
    texts = bool({"title", "brand", "categories"} & set(names))
    pictures = "image" in names or (source.root / "images").is_dir()
    modality = {(1, 1): "both", (1, 0): "text", (0, 1): "image", (0, 0): "id"}[texts, pictures]
    return Survey(**counts.row(0, named=True), modality=modality)


def digests(path: Path, known: Digests, run: Path) -> Digests:
    """Digests of every file of the data, but of those of a run in the folder of its data.

    `known` is an earlier answer: what has its size and time still is not read again.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if run.resolve().is_relative_to(path.resolve()):
        files = [file for file in files if not file.resolve().is_relative_to(run.resolve())]
    found: Digests = {}
    for file in files:
        name, stamp = str(file.relative_to(path.parent)), _stamp(file)
        before = known.get(name, [])
        found[name] = before if before[:2] == stamp else [*stamp, digest_file(file)]
    return found


def read_sequences(path: Path) -> Source:
    """Opens a text of one user a line, `user item item ...` in time order."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected one user a line: user item item ...")
    words = pl.col("line").str.extract_all(r"\S+").list
    times = pl.int_ranges(0, words.len() - 1)
    rows = _lines(path).select(user_id=words.first(), item_id=words.slice(1), timestamp=times)
    bought = rows.filter(pl.col("item_id").list.len() > 0).explode("item_id", "timestamp")
    return Source(bought, None, path.parent)


def _read_folder(
    folder: Path, scratch: Path, files: tuple[list[Path], list[Path]], lines: Lines
) -> Source:
    """Opens files of interactions and, where there are any, of items."""
    problems: dict[str, int] = {}
    bought = _table(files[0], INTERACTIONS, lines, scratch / "interactions", problems)
    items = _table(files[1], lines.items, lines, scratch / "items", problems) if files[1] else None
    for frame, needed in ((bought, INTERACTIONS), (items, ITEMS[:1])):
        there = needed if frame is None else frame.collect_schema().names()
        if missing := sorted(set(needed) - set(there)):
            raise DataError(
                f"the table in {folder} lacks {', '.join(missing)}; it has {', '.join(there)}. "
                "Rename its columns"
            )
    return Source(bought, items, folder, problems)


def _table(
    paths: list[Path], names: tuple[str, ...], lines: Lines, scratch: Path, problems: dict[str, int]
) -> pl.LazyFrame:
    """The rows of files; of lines by way of parquet, what cannot be read is added to `problems`.

    A file of lines is converted once for its size and time: counting and preparing share it.
    """
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; expected a table with {', '.join(names)}")
    if paths[0].suffix == ".parquet":
        return pl.scan_parquet(paths)
    if paths[0].suffix == ".csv":
        return scan_csv(paths)
    scratch.mkdir(parents=True, exist_ok=True)
    targets = [scratch / f"{p.name}-{'-'.join(map(str, _stamp(p)))}.parquet" for p in paths]
    for stale in {*scratch.iterdir()} - {*targets}:
        stale.unlink()
    for path, target in zip(paths, targets, strict=True):
        if not target.exists():
            _convert(path, names, lines, target)
    rows = pl.scan_parquet(targets)
    if bad := rows.filter(~pl.col("readable")).select(pl.len()).collect().item():
        problems[f"unreadable lines of {scratch.name}"] = bad
    return rows.filter("readable").drop("readable")


def scan_csv(paths: list[Path]) -> pl.LazyFrame:
    """The rows of CSV files, between commas, semicolons or tabs as in their first line.

    Ids that begin with a zero stay texts, for 007 is not 7.
    """
    with paths[0].open(encoding="utf-8", errors="replace") as file:
        head = file.readline()
    mark = next((mark for mark in ",;\t" if mark in head), ",")
    scan = partial(pl.scan_csv, paths, encoding="utf8-lossy", separator=mark)
    rows = scan(infer_schema_length=None)
    ids = [name for name in INTERACTIONS[:2] if name in rows.collect_schema()]
    texts = scan(infer_schema_length=0)  # all of them
    zeros = texts.select(pl.col(ids).str.contains(r"^[+-]?0\d").any())
    found = zeros.collect(engine="streaming").row(0, named=True) if ids else {}
    kept = {name: pl.String for name, zero in found.items() if zero}
    return scan(infer_schema_length=None, schema_overrides=kept) if kept else rows


def _convert(path: Path, names: tuple[str, ...], lines: Lines, target: Path) -> None:
    schema = {**dict.fromkeys(names, pl.String), "readable": pl.Boolean}

    def row(line: str) -> dict[str, str | bool | None]:
        try:
            parsed = lines.parse(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = None
        known = parsed if isinstance(parsed, dict) else {}
        texts = {name: text(known.get(lines.keys.get(name, name))) for name in names}
        return {**texts, "readable": isinstance(parsed, dict)}

    rows = _lines(path).select(pl.col("line").map_elements(row, pl.Struct(schema)))
    try:
        with whole_file(target) as fresh:
            rows.unnest("line").sink_parquet(fresh)
    except (OSError, pl.exceptions.ComputeError) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); fetch it again") from error


def _lines(path: Path) -> pl.LazyFrame:
    """The lines of a text, plain or gzip, that are not empty."""
    # A byte that no text holds separates, so that each line is one column.
    texts = pl.scan_csv(
        path, has_header=False, new_columns=["line"], separator="\x01", quote_char=None,
        encoding="utf8-lossy", schema_overrides=[pl.String], truncate_ragged_lines=True,
    )  # fmt: skip
    stripped = texts.select(pl.col("line").str.strip_chars())
    return stripped.filter(pl.col("line") != "")


def text(value: Any) -> str | None:
    """A list, or a list of lists, is one text with bars."""
    if isinstance(value, list | tuple):
        parts = [text(part) for part in value]
        return "|".join(part for part in parts if part is not None)
    return None if value is None else str(value)


def text_of(column: pl.Expr, kind: pl.DataType | DataTypeClass) -> pl.Expr:
    """The same of a column of a table."""
    if isinstance(kind, pl.Array):
        return text_of(column.arr.to_list(), pl.List(kind.inner))
    if isinstance(kind, pl.List):
        return column.list.eval(text_of(pl.element(), kind.inner)).list.join("|")
    return column.cast(pl.String)


def _stamp(file: Path) -> list[int | str]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _tables(folder: Path, name: str) -> list[Path]:
    """The first of its forms that is there."""
    found = [folder / f"{name}{suffix}" for suffix in TABLE_SUFFIXES]
    return [path for path in found if path.exists()][:1]


def _is_amazon_2023(path: Path) -> bool:
    if path.name.startswith("meta_") or path.stat().st_size == 0:
        return False
    return any('"parent_asin"' in line for line in _lines(path).head(1).collect()["line"])
