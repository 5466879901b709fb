"""From interactions to sequences: 5-core filter, time order, leave-one-out, batches.

`prepare` works on partitions of users, each of which fits in memory; only counts per item and the
finished sequences (four bytes an interaction) are held whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from PIL import Image

from examples.fmrlrec.config import Config, DataError, RunError, write_text
from examples.fmrlrec.formats import ITEMS, Source, text_of
from examples.fmrlrec.workers import Each, serially

PADDING = 0
HELD_OUT = {"validation": 2, "test": 1}  # how far from the end of a sequence its target stands
SEQUENCES, CATALOGUE, REPORT = "sequences.parquet", "items.parquet", "report.json"


@dataclass(frozen=True)
class Dataset:
    """Sequences of item numbers 1..n in time order, and the catalogue of these items.

    User u bought `items[offsets[u] : offsets[u + 1]]`; item i is row i - 1 of `catalogue`; 0 pads.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: pl.Series
    catalogue: pl.DataFrame
    problems: dict[str, int]

    @property
    def users(self) -> int:
        """The number of users."""
        return len(self.offsets) - 1

    @property
    def item_count(self) -> int:
        """The number of items, padding not counted."""
        return self.catalogue.height

    def sequence(self, user: int) -> np.ndarray:
        """The items of one user in time order."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


class Batch(NamedTuple):
    """Left-padded sequences [B, T], in which 0 pads and separates, and what came next.

    To learn from, `targets` are the next item at each position [B, T]; to be ranked, the one after
    the last [B], of `users` [B].
    """

    inputs: np.ndarray
    targets: np.ndarray
    users: np.ndarray = np.empty(0)


def prepare(source: Source, folder: Path, config: Config, each: Each = serially) -> Dataset:
    """Filters, orders and numbers `source` and writes the result to `folder`.

    Duplicates and incomplete rows are dropped and counted; what is left after the `min_count`-core
    filter is ordered by time within a user. Raises `DataError` where nothing is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, problems = _partition(source, folder / "parts", config, each)
    catalogue, unknown = _known_items(source, parts, config)
    survivors = core_filter(parts, catalogue.select("item_id"), config.min_count, each)
    kept = catalogue.join(survivors, on="item_id", how="semi").sort("item_id")
    keys = kept.select("item_id", number=pl.int_range(1, pl.len() + 1, dtype=pl.Int32))
    sequences = pl.concat(each(_part_sequences, parts, keys, config.min_count))
    if sequences.is_empty():
        raise DataError(
            f"no interaction survives the {config.min_count}-core filter; "
            "give more data or a smaller --set min_count=1"
        )
    sequences.write_parquet(folder / SEQUENCES)
    kept.with_columns(image_path(source.root)).write_parquet(folder / CATALOGUE)
    counts = {**source.problems, **problems, **unknown}
    report = {"problems": {name: n for name, n in counts.items() if n}}
    write_text(folder / REPORT, json.dumps(report, indent=2))
    shutil.rmtree(folder / "parts")
    return load(folder)


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` came to its end in a folder."""
    return (folder / SEQUENCES).exists() and (folder / REPORT).exists()


def load(folder: Path) -> Dataset:
    """Reads what `prepare` wrote."""
    if not is_prepared(folder):
        raise RunError(f"no prepared data in {folder}; run `prepare` first")
    sequences = pl.read_parquet(folder / SEQUENCES)
    lengths = sequences["number"].list.len().to_numpy()
    return Dataset(
        sequences["number"].explode().to_numpy(),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        sequences["user_id"],
        pl.read_parquet(folder / CATALOGUE),
        json.loads((folder / REPORT).read_text(encoding="utf-8"))["problems"],
    )


def statistics(data: Dataset) -> dict[str, float]:
    """The counts of the paper's Table 1: users, items, images, interactions, density in percent."""
    length = len(data.items) / data.users
    return {
        "users": data.users,
        "items": data.item_count,
        "images": data.catalogue["image"].count(),
        "interactions": len(data.items),
        "mean length": round(length, 2),
        "density %": round(100 * length / data.item_count, 3),
    }


def core_filter(
    parts: list[Path], items: pl.DataFrame, count: int, each: Each = serially
) -> pl.DataFrame:
    """The items of the `count`-core: everybody left has `count` interactions with what is left.

    Users live in one part each, so a part needs only the surviving items, and parts meet only in
    the counts per item: the rounds can run per machine.
    """
    while True:
        counted = pl.concat(each(_count_items, parts, items, count))
        kept = counted.group_by("item_id").agg(pl.col("n").sum()).filter(pl.col("n") >= count)
        if kept.height == items.height:
            return kept.select("item_id")
        items = kept.select("item_id")


def training_windows(data: Dataset, config: Config) -> np.ndarray:
    """Bounds [W, 2] into `data.items` of what is learnt from: all but each user's last two items.

    A window holds up to `max_length` steps and one item more, the last target. "last" keeps one
    window a user; "all" cuts the older history into further ones.
    """
    starts, ends = data.offsets[:-1], data.offsets[1:] - 2
    if config.windows == "last":
        starts = np.maximum(starts, ends - config.max_length - 1)
    windows = [
        # From the latest backwards; neighbours share the item between them.
        (max(first, end - config.max_length - 1), end)
        for first, last in zip(starts.tolist(), ends.tolist(), strict=True)
        for end in range(last, first + 1, -config.max_length)
    ]
    return np.asarray(windows, dtype=np.int64).reshape(-1, 2)


def training_batches(
    data: Dataset, windows: np.ndarray, config: Config, *, epoch: int
) -> Iterator[Batch]:
    """Batches of `config.batch` random windows of one epoch, a function of seed and epoch alone.

    Short windows share a row, with padding between them, so that hardly a position is idle.
    """
    order = np.random.default_rng((config.seed, epoch)).permutation(len(windows))
    for at in range(0, len(order), config.batch):
        rows = pack(windows[order[at : at + config.batch]], config.max_length)
        yield steps(data.items, rows)


def pack(windows: np.ndarray, length: int) -> list[list[tuple[int, int]]]:
    """Puts windows [W, 2] into rows of `length` inputs: longest first, into the first that fits."""
    rows: list[list[tuple[int, int]]] = [[] for _ in windows]
    free = [length + 1] * len(windows)
    for start, end in sorted(windows.tolist(), key=lambda bounds: bounds[0] - bounds[1]):
        row = next(i for i, left in enumerate(free) if left >= end - start)
        rows[row].append((start, end))
        free[row] -= end - start
    return [row for row in rows if row]


def steps(items: np.ndarray, rows: list[list[tuple[int, int]]]) -> Batch:
    """Inputs and targets of rows of windows into `items`, as `pack` gives them.

    Windows of a row stand with one padding item between them.
    """
    gap, joined = np.zeros(1, dtype=np.int32), []
    for ahead in (0, 1):
        parts = [[items[a + ahead : b - 1 + ahead] for a, b in row] for row in rows]
        joined.append([np.concatenate([x for p in row for x in (gap, p)][1:]) for row in parts])
    length = max(map(len, joined[0]))
    return Batch(*(left_pad(sequences, length) for sequences in joined))


def evaluation_batches(data: Dataset, split: str, config: Config) -> Iterator[Batch]:
    """Batches for "validation" or "test": the history before the target, and the target.

    Users with fewer than three items have no target and are left out.
    """
    lengths, back = np.diff(data.offsets), HELD_OUT[split]
    users = np.flatnonzero(lengths >= 3)
    users = users[np.argsort(lengths[users], kind="stable")]
    for at in range(0, len(users), config.eval_batch):
        some = users[at : at + config.eval_batch]
        parts = [data.sequence(user) for user in some]
        length = max(2, min(config.max_length, max(map(len, parts)) - back))
        inputs = left_pad([part[:-back] for part in parts], length)
        yield Batch(inputs, np.asarray([part[-back] for part in parts], dtype=np.int64), some)


def popularity(data: Dataset) -> np.ndarray:
    """How often each item 0..n occurs in the training part of the sequences."""
    training = np.concatenate([data.sequence(user)[:-2] for user in range(data.users)])
    return np.bincount(training, minlength=data.item_count + 1)


def left_pad(sequences: list[np.ndarray], length: int) -> np.ndarray:
    """Right-aligns sequences in an int64 array [B, length]; the latest items stay."""
    padded = np.full((len(sequences), length), PADDING, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        tail = sequence[-length:]
        row[length - len(tail) :] = tail
    return padded


def _timestamp(frame: pl.LazyFrame) -> pl.Expr:
    """Times as numbers, null where they cannot be read."""
    kind, time = frame.collect_schema()["timestamp"], pl.col("timestamp")
    if kind.is_integer() or kind.is_temporal():
        return time.cast(pl.Int64)
    seconds = time.cast(pl.Float64, strict=False)
    if kind == pl.String:
        dates = time.str.to_datetime(time_zone="UTC", strict=False).dt.epoch("us") / 1e6
        seconds = pl.coalesce(seconds, dates)
    return pl.when(seconds.is_finite()).then(seconds)


def _partition(
    source: Source, folder: Path, config: Config, each: Each
) -> tuple[list[Path], dict[str, int]]:
    """Writes users by hash into files that fit in memory, each ordered and without duplicates."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = source.interactions.with_row_index("row").select(
        "user_id", "item_id", _timestamp(source.interactions).alias("timestamp"), "row"
    )
    total = frame.select(pl.len()).collect(engine="streaming").item()
    if total == 0:
        raise DataError(
            f"no interactions in the data of {source.root}: expected user_id, item_id and "
            "timestamp in a row of a table, or `user item item ...` in a line of a text"
        )
    count = max(1, math.ceil(total / config.partition_rows))
    parts = [folder / f"{number:05}.parquet" for number in range(count)]
    rows = each(_write_part, list(enumerate(parts)), frame.drop_nulls(), count)
    whole, kept = (sum(numbers) for numbers in zip(*rows, strict=True))
    if not kept:
        raise DataError(
            f"none of the {total:,} interactions in {source.root} has a user, an item and a time "
            "that can be read; times are numbers, or dates such as 2024-01-31 or 2024-01-31 18:30"
        )
    return parts, {"interactions without user, item or time": total - whole,
                   "duplicate interactions": whole - kept}  # fmt: skip


def _write_part(part: tuple[int, Path], frame: pl.LazyFrame, count: int) -> tuple[int, int]:
    """The users of one part; returns how many rows it had, and how many without duplicates."""
    number, path = part
    mine = frame.filter(pl.col("user_id").hash(0) % count == number).collect(engine="streaming")
    unique = mine.unique(["user_id", "item_id", "timestamp"], keep="first")
    unique.sort("user_id", "timestamp", "row").drop("row", "timestamp").write_parquet(path)
    return mine.height, unique.height


def _known_items(
    source: Source, parts: list[Path], config: Config
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The catalogue of every item that occurs, and how many of them have no metadata."""
    seen = pl.scan_parquet(parts).select("item_id").unique().collect(engine="streaming")
    if source.items is None:
        return seen.with_columns(pl.lit(None, dtype=pl.String).alias(n) for n in ITEMS[1:]), {}
    kinds = source.items.collect_schema()
    ids = pl.col("item_id").cast(seen["item_id"].dtype, strict=False)
    texts = {
        name: text_of(pl.col(name), kinds[name]) if name in kinds else pl.lit(None, pl.String)
        for name in ITEMS[1:]
    }
    items = source.items.select(ids, **texts).collect(engine="streaming")
    described = items.drop_nulls("item_id").unique("item_id", keep="first", maintain_order=True)
    drops = config.unknown_items == "drop"
    catalogue = seen.join(described, on="item_id", how="inner" if drops else "left")
    if catalogue.is_empty():
        theirs = source.items.select("item_id").head(3).collect()["item_id"].to_list()
        raise DataError(
            "no item of the interactions is described: ids are like "
            f"{seen['item_id'][:3].to_list()} there, like {theirs} in the table of items; write "
            "them alike, or give --set unknown_items=keep"
        )
    done = "dropped" if drops else "kept, no features"
    return catalogue, {
        f"unknown items ({done})": seen.join(described, on="item_id", how="anti").height,
        "items described twice or without id": items.height - described.height,
    }


def _count_items(part: Path, items: pl.DataFrame, count: int) -> pl.DataFrame:
    rows = pl.scan_parquet(part).join(items.lazy(), on="item_id", how="semi")
    active = rows.filter(pl.len().over("user_id") >= count)
    return active.group_by("item_id").agg(pl.len().cast(pl.Int64).alias("n")).collect()


def _part_sequences(part: Path, keys: pl.DataFrame, count: int) -> pl.DataFrame:
    """The item numbers of each user of a part, as a list in time order."""
    rows = pl.read_parquet(part).join(keys, on="item_id", how="inner", maintain_order="left")
    active = rows.filter(pl.len().over("user_id") >= count)
    return active.group_by("user_id", maintain_order=True).agg("number")


def image_path(root: Path) -> pl.Expr:
    """Where each picture lies: the given path, or images/<item id> with the suffix of any kind."""
    folder, kinds = root / "images", Image.registered_extensions()
    # Reversed, so that of several pictures of one item the first by name is kept.
    files = [file for file in sorted(folder.rglob("*"))[::-1] if file.suffix.lower() in kinds]
    lying = {file.relative_to(folder).with_suffix("").as_posix(): str(file) for file in files}

    def locate(row: dict[str, str | None]) -> str | None:
        return str(root / row["image"]) if row["image"] else lying.get(str(row["item_id"]))

    return pl.struct("item_id", "image").map_elements(locate, return_dtype=pl.String).alias("image")
