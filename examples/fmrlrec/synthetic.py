"""A shop that never was: a catalogue whose texts, pictures and order each foretell the next item.

Every item has a theme, told by its text only, and a look, told by its picture only. A user's next
theme follows from the last theme (sequence and text) and the look stays with the user for a while
(picture), so that either modality alone leaves about `items / themes` candidates and both together
leave a handful.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 187, 40), (148, 103, 189))
SHAPES = (3, 4, 5, 0)
NOUNS = (
    "lamp", "kettle", "jacket", "tent", "guitar", "novel", "puzzle", "camera", "bicycle", "sofa",
    "perfume", "drill", "racket", "carpet", "clock", "backpack", "telescope", "blender", "piano",
    "canoe",
)  # fmt: skip
ADJECTIVES = ("small", "classic", "light", "deluxe", "travel", "handmade", "basic", "large")


@dataclass(frozen=True)
class Shop:
    """The size of the generated shop and how strictly its users follow the rules."""

    items: int = 2000
    users: int = 3000
    mean_length: int = 14
    faithful: float = 0.85
    seed: int = 0


@dataclass(frozen=True)
class Items:
    """Theme (text), look (picture) and appeal of each item; arrays [items]."""

    theme: np.ndarray
    look: np.ndarray
    appeal: np.ndarray


def generate(folder: Path, shop: Shop | None = None) -> Path:
    """Writes interactions.csv, items.csv and images/ of a shop to `folder` and returns it."""
    shop = shop or Shop()
    random = np.random.default_rng(shop.seed)
    items = _items(shop, random)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _describe(items, random).write_csv(folder / "items.csv")
    for number, look in enumerate(items.look):
        draw(int(look), random).save(folder / "images" / f"{number + 1}.jpg", quality=85)
    _interactions(items, shop, random).write_csv(folder / "interactions.csv")
    return folder


def draw(look: int, random: np.random.Generator) -> Image.Image:
    """Draws one of the looks (a shape in a colour) somewhere on a noisy 48 x 48 background."""
    noise = random.integers(180, 256, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    centre, radius = random.uniform(20, 28, 2), random.uniform(12, 17)
    colour = COLOURS[look % len(COLOURS)]
    corners = SHAPES[look // len(COLOURS)]
    ImageDraw.Draw(image).polygon(_outline(corners, centre, radius), fill=colour)
    return image


def _outline(corners: int, centre: np.ndarray, radius: float) -> list[tuple[float, float]]:
    """A regular polygon that stands on its side; no corners means a disc."""
    count = corners or 24
    angles = [2 * math.pi * (k + 0.5) / count for k in range(count)]
    return [(centre[0] + radius * math.sin(a), centre[1] + radius * math.cos(a)) for a in angles]


def _items(shop: Shop, random: np.random.Generator) -> Items:
    looks = len(COLOURS) * len(SHAPES)
    return Items(
        random.integers(0, len(NOUNS), shop.items),
        random.integers(0, looks, shop.items),
        random.pareto(2.0, shop.items) + 0.3,
    )


def _describe(items: Items, random: np.random.Generator) -> pl.DataFrame:
    count = len(items.theme)
    adjective = random.integers(0, len(ADJECTIVES), count)
    model = random.integers(100, 1000, count)
    return pl.DataFrame(
        {
            "item_id": np.arange(1, count + 1),
            "title": [
                f"{ADJECTIVES[a].title()} {NOUNS[t]} {m}"
                for a, t, m in zip(adjective, items.theme, model, strict=True)
            ],
            "price": np.round(random.lognormal(3.0, 0.7, count), 2),
            "brand": [f"House of {NOUNS[t].title()}s {m % 3}"
                      for t, m in zip(items.theme, model, strict=True)],
            "categories": [f"Goods|{NOUNS[t]}" for t in items.theme],
            "image": [f"images/{n}.jpg" for n in range(1, count + 1)],
        }
    )  # fmt: skip


def _interactions(items: Items, shop: Shop, random: np.random.Generator) -> pl.DataFrame:
    following = random.permutation(len(NOUNS))
    looks = int(items.look.max()) + 1
    shelves = [
        [np.flatnonzero((items.theme == t) & (items.look == k)) for k in range(looks)]
        for t in range(len(NOUNS))
    ]
    rows = []
    for user in range(1, shop.users + 1):
        length = 5 + random.poisson(shop.mean_length - 5)
        walk = _walk(items, shop, (following, shelves), length, random)
        rows += [(user, int(item) + 1, time) for time, item in enumerate(walk)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def _walk(
    items: Items,
    shop: Shop,
    rules: tuple[np.ndarray, list[list[np.ndarray]]],
    length: int,
    random: np.random.Generator,
) -> list[int]:
    following, shelves = rules
    appeal = items.appeal / items.appeal.sum()
    walk: list[int] = [int(random.choice(len(appeal), p=appeal))]
    while len(walk) < length:
        last = walk[-1]
        shelf = shelves[following[items.theme[last]]][items.look[last]]
        fresh = np.setdiff1d(shelf, walk)
        if len(fresh) and random.random() < shop.faithful:
            chances = items.appeal[fresh] / items.appeal[fresh].sum()
            walk.append(int(random.choice(fresh, p=chances)))
        else:
            walk.append(int(random.choice(len(appeal), p=appeal)))
    return walk
