"""A shop that never was: a catalogue whose texts, pictures and order each foretell the next item.

Every item has a theme, told by its text only, and a look, told by its picture only. A user's next
theme follows from the last theme (sequence and text) and the look stays with the user for a while
(picture), so that either modality alone leaves about `items / themes` candidates and both together
leave a handful.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 187, 40), (148, 103, 189))
CORNERS = (3, 4, 5, 24)  # the last is nearly a disc
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


def generate(folder: Path, shop: Shop) -> Path:
    """Writes interactions.csv, items.csv and images/ of a shop to `folder` and returns it."""
    random = np.random.default_rng(shop.seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    items = _items(shop.items, random)
    items.drop("theme", "look", "appeal").write_csv(folder / "items.csv")
    for look, image in items.select("look", "image").iter_rows():
        draw(look, random).save(folder / image, quality=85)
    _interactions(items, shop, random).write_csv(folder / "interactions.csv")
    return folder


def draw(look: int, random: np.random.Generator) -> Image.Image:
    """Draws one of the looks (a shape in a colour) somewhere on a noisy 48 x 48 background."""
    image = Image.fromarray(random.integers(180, 256, (48, 48, 3), dtype=np.uint8))
    shape, colour = divmod(look, len(COLOURS))
    circle = (*random.uniform(20, 28, 2), random.uniform(12, 17))
    ImageDraw.Draw(image).regular_polygon(circle, CORNERS[shape], fill=COLOURS[colour])
    return image


def _items(count: int, random: np.random.Generator) -> pl.DataFrame:
    """Theme (text), look (picture) and appeal of each item, and how the shop describes it."""
    themes = random.integers(0, len(NOUNS), count)
    looks = random.integers(0, len(COLOURS) * len(CORNERS), count)
    appeal = random.pareto(2.0, count) + 0.3
    nouns = [NOUNS[theme] for theme in themes]
    adjectives = [ADJECTIVES[n].title() for n in random.integers(0, len(ADJECTIVES), count)]
    models = random.integers(100, 1000, count).tolist()
    return pl.DataFrame(
        {
            "item_id": range(1, count + 1),
            "title": [f"{a} {n} {m}" for a, n, m in zip(adjectives, nouns, models, strict=True)],
            "price": np.round(random.lognormal(3.0, 0.7, count), 2),
            "brand": [f"House of {n.title()}s {m % 3}" for n, m in zip(nouns, models, strict=True)],
            "categories": [f"Goods|{noun}" for noun in nouns],
            "image": [f"images/{number}.jpg" for number in range(1, count + 1)],
            "theme": themes,
            "look": looks,
            "appeal": appeal,
        }
    )


def _interactions(items: pl.DataFrame, shop: Shop, random: np.random.Generator) -> pl.DataFrame:
    """What each user has in turn: mostly of the next theme and the same look, and new."""
    theme, look, appeal = (items[name].to_numpy() for name in ("theme", "look", "appeal"))
    following, rows = random.permutation(len(NOUNS)), []
    for user in range(1, shop.users + 1):
        length = 5 + random.poisson(shop.mean_length - 5)
        walk = [int(random.choice(len(appeal), p=appeal / appeal.sum()))]
        while len(walk) < length:
            last = walk[-1]
            shelf = np.flatnonzero((theme == following[theme[last]]) & (look == look[last]))
            fresh = np.setdiff1d(shelf, walk)
            faithful = len(fresh) and random.random() < shop.faithful
            among = fresh if faithful else np.arange(len(appeal))
            walk.append(int(random.choice(among, p=appeal[among] / appeal[among].sum())))
        rows += [(user, item + 1, time) for time, item in enumerate(walk)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
