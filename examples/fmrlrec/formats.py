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

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """Interactions and items that are not read yet, and what was wrong with their lines so far."""

    interactions: pl.LazyFrame
    items: pl.LazyFrame | None
    root: Path
    problems: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """How much there is of a shop, and of what kind: settings are chosen by it."""

    users: int
    items: int
    interactions: int
    texts: bool
    pictures: bool

    @property
    def modality(self) -> str:
        """What the items can be told apart by."""
        kinds = {(True, True): "both", (True, False): "text", (False, True): "image"}
        return kinds.get((self.texts, self.pictures), "id")

    def __str__(self) -> str:
        told = {"both": "texts and pictures", "text": "texts", "image": "pictures", "id": "ids"}
        counts = f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"
        return f"{counts}; items with {told[self.modality]}"


@dataclass(frozen=True)
class Lines:
    """How one kind of JSON-like line becomes a row: the parser and a function a column."""

    parse: Callable[[str], Any]
    columns: dict[str, Callable[[dict[str, Any]], Any]]


def read(path: Path, scratch: Path) -> Source:
    """Opens the data at `path` (a folder or a sequence text) without reading it into memory.

    Line formats are converted to parquet parts under `scratch`, a part at a time.
    Raises `DataError` where nothing is recognised.
    """
    if not path.exists():
        raise DataError(f"no data at {path}; give a folder or a file, or --data synthetic")
    if path.is_file():
        return read_sequences(path)
    if reviews := _find(path, "reviews_*.json.gz"):
        files = {"interactions": reviews, "items": _find(path, "meta_*.json.gz")}
        return _read_lines(path, scratch, files, AMAZON_2014)
    if _table(path, "interactions") is not None:
        return read_tables(path, scratch)
    if reviews := _amazon_2023(path):
        files = {"interactions": reviews, "items": _find(path, "meta_*.jsonl*")}
        return _read_lines(path, scratch, files, AMAZON_2023)
    return _only_text(path)


def survey(source: Source) -> Survey:
    """Counts a source before anything of it is prepared."""
    counts = source.interactions.select(
        pl.col("user_id").n_unique().alias("users"), pl.col("item_id").n_unique().alias("items"),
        pl.len().alias("interactions"),
    ).collect(engine="streaming")  # fmt: skip
    names = [] if source.items is None else source.items.collect_schema().names()
    texts = bool({"title", "brand", "categories"} & set(names))
    pictures = "image" in names or (source.root / "images").is_dir()
    return Survey(*map(int, counts.row(0)), texts, pictures)


def digests(path: Path, known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Size, time and SHA-256 of every file of the data, by name.

    `known` is an earlier answer: what has its size and time still is not read again.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = {}
    for file in files:
        name, status = str(file.relative_to(path.parent)), file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        before = known.get(name)
        same = before is not None and before[:2] == stamp
        found[name] = before if same else [*stamp, digest_file(file)]
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
    interactions, problems = _open(folder, "interactions", scratch)
    _require(interactions, INTERACTIONS, folder)
    items, more = _open(folder, "items", scratch)
    if items is not None:
        _require(items, ITEMS[:1], folder)
    return Source(interactions, items, folder, {**problems, **more})


def lines_to_parquet(path: Path, lines: Lines, folder: Path) -> int:
    """Converts a file of lines to parquet parts in `folder`; returns the count of bad lines.

    What was converted stays while the file's size and time do: counting and preparing share it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    status, done = path.stat(), folder / "done.json"
    stamp = [status.st_size, status.st_mtime_ns, list(lines.columns)]
    before = json.loads(done.read_text()) if done.exists() else {}
    if before.get("stamp") == stamp:
        return before["bad"]
    for stale in (done, *folder.glob("*.parquet")):
        stale.unlink(missing_ok=True)
    bad = 0
    with _opened(path) as stream:
        rows = (_row(line, lines) for line in _whole_lines(stream, path) if line.strip())
        for number, part in enumerate(_batched(rows, LINES_PER_PART)):
            good = [row for row in part if row is not None]
            bad += len(part) - len(good)
            _frame(good, tuple(lines.columns)).write_parquet(folder / f"{number:05}.parquet")
    if not any(folder.glob("*.parquet")):
        _frame([], tuple(lines.columns)).write_parquet(folder / "00000.parquet")
    done.write_text(json.dumps({"stamp": stamp, "bad": bad}))
    return bad


def _column(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda line: line.get(name)


def _flat(name: str) -> Callable[[dict[str, Any]], str]:
    """A list, or a list of lists, as one text with bars."""
    return lambda line: "|".join(_leaves(line.get(name)))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield str(value)


def _columns(names: dict[str, str]) -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        column: _flat(name) if column in ("categories", "brand") else _column(name)
        for column, name in names.items()
    }


NATIVE = (
    Lines(json.loads, _columns({name: name for name in INTERACTIONS})),
    Lines(json.loads, _columns({name: name for name in ITEMS})),
)
AMAZON_2014 = (
    Lines(
        ast.literal_eval,
        _columns({"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime"}),
    ),
    Lines(
        ast.literal_eval,
        _columns(
            {"item_id": "asin", "title": "title", "price": "price", "brand": "brand",
             "categories": "categories"}
        ),
    ),
)  # fmt: skip
AMAZON_2023 = (
    Lines(
        json.loads,
        _columns({"user_id": "user_id", "item_id": "parent_asin", "timestamp": "timestamp"}),
    ),
    Lines(
        json.loads,
        _columns(
            {"item_id": "parent_asin", "title": "title", "price": "price", "brand": "store",
             "categories": "categories"}
        ),
    ),
)  # fmt: skip


def _read_lines(
    folder: Path, scratch: Path, files: dict[str, list[Path]], kinds: tuple[Lines, Lines]
) -> Source:
    frames, problems = {}, {}
    for (name, found), lines in zip(files.items(), kinds, strict=True):
        bad = sum(lines_to_parquet(f, lines, scratch / name / f.name) for f in found)
        frames[name] = pl.scan_parquet(scratch / name / "*" / "*.parquet") if found else None
        problems |= {f"unreadable lines of {name}": bad} if bad else {}
    return Source(frames["interactions"], frames["items"], folder, problems)


def _open(folder: Path, name: str, scratch: Path) -> tuple[Any, dict[str, int]]:
    path = _table(folder, name)
    if path is None:
        return None, {}
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected a table with {', '.join(_expected(name))}")
    if path.name.endswith(".parquet"):
        return pl.scan_parquet(path), {}
    if path.name.endswith(".csv"):
        return pl.scan_csv(path, encoding="utf8-lossy", infer_schema_length=10_000), {}
    bad = lines_to_parquet(path, NATIVE[name == "items"], scratch / name)
    problems = {f"unreadable lines of {name}": bad} if bad else {}
    return pl.scan_parquet(scratch / name / "*.parquet"), problems


def _expected(name: str) -> tuple[str, ...]:
    return INTERACTIONS if name == "interactions" else ITEMS


def _table(folder: Path, name: str) -> Path | None:
    found = [folder / f"{name}{suffix}" for suffix in TABLE_SUFFIXES]
    return next((path for path in found if path.exists()), None)


def _require(frame: pl.LazyFrame, names: tuple[str, ...], folder: Path) -> None:
    missing = sorted(set(names) - set(frame.collect_schema().names()))
    if missing:
        raise DataError(
            f"the table in {folder} lacks {', '.join(missing)}; it has "
            f"{', '.join(frame.collect_schema().names())}. Rename its columns"
        )


def _find(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def _amazon_2023(folder: Path) -> list[Path]:
    candidates = [p for p in _find(folder, "*.jsonl*") if not p.name.startswith("meta_")]
    return [path for path in candidates if '"parent_asin"' in _first_line(path)]


def _first_line(path: Path) -> str:
    with _opened(path) as stream:
        return stream.readline()


def _only_text(folder: Path) -> Source:
    texts = _find(folder, "*.txt")
    if len(texts) == 1:
        return read_sequences(texts[0])
    raise DataError(
        f"nothing recognised in {folder}: expected interactions.(csv|parquet|jsonl), "
        "reviews_*.json.gz, *.jsonl of Amazon Reviews 2023, or one sequence text"
    )


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


def _whole_lines(stream: IO[str], path: Path) -> Iterator[str]:
    try:
        yield from stream
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); fetch it again") from error


def _row(line: str, lines: Lines) -> Row | None:
    try:
        parsed = lines.parse(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(parsed, dict):
        return None
    return tuple(value(parsed) for value in lines.columns.values())


def _batched(rows: Iterator[Row | None], count: int) -> Iterator[list[Row | None]]:
    while part := list(islice(rows, count)):
        yield part


def _frame(rows: list[Row], names: tuple[str, ...]) -> pl.DataFrame:
    texts = [tuple(None if value is None else str(value) for value in row) for row in rows]
    return pl.DataFrame(texts, schema=dict.fromkeys(names, pl.String), orient="row")
