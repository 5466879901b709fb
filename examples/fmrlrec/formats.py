"""The four formats of interactions and items, read lazily into one pair of tables.

Interactions have the columns user_id, item_id, timestamp; items have item_id, title, price, brand,
categories, image. A format is recognised by the names of the files and by their first line.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import polars as pl

from examples.fmrlrec.config import DataError
from matryoshkafy.files.folders import digest_file

INTERACTIONS = ("user_id", "item_id", "timestamp")
ITEMS = ("item_id", "title", "price", "brand", "categories", "image")
TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".jsonl.gz")
LINES_PER_PART = 200_000
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


@dataclass(frozen=True)
class Lines:
    """How one kind of JSON-like line becomes a row: the parser, and the key of each column."""

    parse: Callable[[str], Any]
    columns: dict[str, str]


# The lines of interactions, and those of items.
NATIVE = tuple(Lines(json.loads, {name: name for name in names}) for names in (INTERACTIONS, ITEMS))
AMAZON_2014 = (
    Lines(
        ast.literal_eval,
        {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime"},
    ),
    Lines(ast.literal_eval, {"item_id": "asin", **{name: name for name in ITEMS[1:-1]}}),
)
AMAZON_2023 = (
    Lines(json.loads, {**NATIVE[0].columns, "item_id": "parent_asin"}),
    Lines(json.loads, {**AMAZON_2014[1].columns, "item_id": "parent_asin", "brand": "store"}),
)


def read(path: Path, scratch: Path) -> Source:
    """Opens the data at `path` (a folder or a sequence text) without reading it into memory.

    Line formats are converted to parquet parts under `scratch`, a part at a time.
    Raises `DataError` where nothing is recognised.
    """
    if not path.exists():
        raise DataError(f"no data at {path}; give a folder or a file, or --data synthetic")
    if path.is_file():
        return read_sequences(path)
    if reviews := sorted(path.glob("reviews_*.json.gz")):
        files = reviews, sorted(path.glob("meta_*.json.gz"))
        return _read_lines(path, scratch, files, AMAZON_2014)
    if _table(path, "interactions") is not None:
        return read_tables(path, scratch)
    if reviews := _amazon_2023(path):
        files = reviews, sorted(path.glob("meta_*.jsonl*"))
        return _read_lines(path, scratch, files, AMAZON_2023)
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
        pl.col("user_id").n_unique().alias("users"), pl.col("item_id").n_unique().alias("items"),
        pl.len().alias("interactions"),
    ).collect(engine="streaming")  # fmt: skip
    names = [] if source.items is None else source.items.collect_schema().names()
    texts = bool({"title", "brand", "categories"} & set(names))
    pictures = "image" in names or (source.root / "images").is_dir()
    kinds = {(True, True): "both", (True, False): "text", (False, True): "image"}
    return Survey(*map(int, counts.row(0)), kinds.get((texts, pictures), "id"))


def digests(path: Path, known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Size, time and SHA-256 of every file of the data, by name.

    `known` is an earlier answer: what has its size and time still is not read again.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = {}
    for file in files:
        name, stamp = str(file.relative_to(path.parent)), _stamp(file)
        before = known.get(name, [])
        found[name] = before if before[:2] == stamp else [*stamp, digest_file(file)]
    return found


def read_sequences(path: Path) -> Source:
    """Opens a text of one user a line, `user item item ...` in time order."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected one user a line: user item item ...")
    lines = pl.scan_csv(
        path, has_header=False, new_columns=["line"], separator="\x01", quote_char=None,
        encoding="utf8-lossy", schema_overrides=[pl.String],
    )  # fmt: skip
    words = lines.select(pl.col("line").str.strip_chars().str.split(" ").alias("words"))
    rows = words.select(
        pl.col("words").list.first().alias("user_id"),
        pl.col("words").list.slice(1).alias("item_id"),
        pl.int_ranges(0, pl.col("words").list.len() - 1).alias("timestamp"),
    ).filter(pl.col("item_id").list.len() > 0)
    return Source(rows.explode("item_id", "timestamp"), None, path.parent)


def read_tables(folder: Path, scratch: Path) -> Source:
    """Opens the native tables `interactions` and, where there is one, `items` of a folder."""
    problems: dict[str, int] = {}
    interactions = _open(folder, "interactions", scratch, problems)
    _require(interactions, INTERACTIONS, folder)
    items = _open(folder, "items", scratch, problems)
    if items is not None:
        _require(items, ITEMS[:1], folder)
    return Source(interactions, items, folder, problems)


def lines_to_parquet(path: Path, lines: Lines, folder: Path) -> int:
    """Converts a file of lines to parquet parts in `folder`; returns the count of bad lines.

    What was converted stays while the file's size and time do: counting and preparing share it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, stamp = folder / "done.json", [*_stamp(path), list(lines.columns)]
    before = json.loads(done.read_text()) if done.exists() else {}
    if before.get("stamp") == stamp:
        return before["bad"]
    for stale in (done, *folder.glob("*.parquet")):
        stale.unlink(missing_ok=True)
    bad, number = 0, 0
    with _opened(path) as stream:
        rows = (_row(line, lines) for line in _whole_lines(stream, path) if line.strip())
        # An empty file is one empty part.
        while (part := list(islice(rows, LINES_PER_PART))) or not number:
            good = [row for row in part if row is not None]
            bad += len(part) - len(good)
            frame = pl.DataFrame(good, schema=dict.fromkeys(lines.columns, pl.String), orient="row")
            frame.write_parquet(folder / f"{number:05}.parquet")
            number += 1
    done.write_text(json.dumps({"stamp": stamp, "bad": bad}))
    return bad


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_lines(
    folder: Path, scratch: Path, files: tuple[list[Path], ...], kinds: tuple[Lines, ...]
) -> Source:
    frames, problems = [], {}
    for name, found, lines in zip(("interactions", "items"), files, kinds, strict=True):
        bad = sum(lines_to_parquet(f, lines, scratch / name / f.name) for f in found)
        frames.append(pl.scan_parquet(scratch / name / "*" / "*.parquet") if found else None)
        problems |= {f"unreadable lines of {name}": bad} if bad else {}
    return Source(*frames, folder, problems)


def _open(folder: Path, name: str, scratch: Path, problems: dict[str, int]) -> Any:
    path, native = _table(folder, name), NATIVE[name == "items"]
    if path is None:
        return None
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected a table with {', '.join(native.columns)}")
    if path.name.endswith(".parquet"):
        return pl.scan_parquet(path)
    if path.name.endswith(".csv"):
        return pl.scan_csv(path, encoding="utf8-lossy", infer_schema_length=10_000)
    if bad := lines_to_parquet(path, native, scratch / name):
        problems[f"unreadable lines of {name}"] = bad
    return pl.scan_parquet(scratch / name / "*.parquet")


def _table(folder: Path, name: str) -> Path | None:
    found = [folder / f"{name}{suffix}" for suffix in TABLE_SUFFIXES]
    return next((path for path in found if path.exists()), None)


def _require(frame: pl.LazyFrame, names: tuple[str, ...], folder: Path) -> None:
    there = frame.collect_schema().names()
    missing = sorted(set(names) - set(there))
    if missing:
        raise DataError(
            f"the table in {folder} lacks {', '.join(missing)}; it has {', '.join(there)}. "
            "Rename its columns"
        )


def _amazon_2023(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.glob("*.jsonl*")):
        with _opened(path) as stream:
            reviews = not path.name.startswith("meta_") and '"parent_asin"' in stream.readline()
        found += [path] if reviews else []
    return found


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


def _whole_lines(stream: IO[str], path: Path) -> Iterator[str]:
    try:
        yield from stream
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); fetch it again") from error


def _row(line: str, lines: Lines) -> tuple[str | None, ...] | None:
    """The texts of a line's columns; None where it is not what its kind parses."""
    try:
        parsed = lines.parse(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(parsed, dict):
        return None
    return tuple(_text(parsed.get(key)) for key in lines.columns.values())


def _text(value: Any) -> str | None:
    """A list, or a list of lists, is one text with bars."""
    if isinstance(value, list | tuple):
        parts = [_text(part) for part in value]
        return "|".join(part for part in parts if part is not None)
    return None if value is None else str(value)
