"""Draws the pictures of the idea pages from real plans: `python docs/drawings.py`, some seconds.

Every drawing is read off a plan or a checkpoint that this file makes, so it cannot show what the
library does not do. `tests/test_drawings.py` sees that the files in docs/images are these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import matryoshkafy as mk
from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.graph.nodes import op_key
from matryoshkafy.report import pictures
from matryoshkafy.report.pictures.svg import Box, rect, segment, svg, tag, text

IMAGES = Path(__file__).parent / "images"
WIDTH, HEADS, RATIOS = 64, 8, [0.25, 0.5, 1.0]
Drawing = tuple[str, float, float]


class Attention(nn.Module):
    """One block of attention with a packed projection, behind a table of tokens."""

    def __init__(self, *, headless: bool = False) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.classes = nn.Identity() if headless else nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> [batch, length, 10] (WIDTH where headless)"""
        x = self.table(ids)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return self.classes(x + self.down(F.relu(self.up(x))))


def doll_of(*, headless: bool = False, nesting: str = "masked", scope: str = "full") -> mk.Doll:
    """Return the block, converted at a quarter, half and all of its width."""
    torch.manual_seed(0)
    ids = torch.randint(100, (2, 5))
    model = Attention(headless=headless).eval()
    return mk.convert(model, (ids,), sizes=RATIOS, nesting=nesting, scope=scope)


def placed(drawing: str, box: Box) -> str:
    """Return a drawing put into a box of another."""
    place = f'<svg x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" '
    return drawing.replace("<svg ", place, 1)


def title(words: str, x: float, y: float) -> str:
    """Return a heading inside a drawing."""
    return text(words, x, y, class_="title")


def nestings() -> Drawing:
    """One weight in both nestings: blocks above the diagonal are zeros, or weights."""
    body = ""
    for i, (nesting, words) in enumerate(
        (("masked", "masked: one pass holds every size"), ("sliced", "sliced: one pass a size"))
    ):
        weight = pictures.weight(doll_of(nesting=nesting).plan, "out.weight", side=190)
        body += title(words, 40 + 330 * i, 16)
        body += placed(weight, Box(330 * i, 26, 240, 225))
    return body, 600, 256


def scopes() -> Drawing:
    """What nests under each scope: the groups of one block."""
    body, y = "", 0.0
    for scope in ("full", "ffn", "output"):
        nesting = "masked" if scope == "full" else "sliced"
        plan = doll_of(headless=True, scope=scope, nesting=nesting).plan
        height = 34.0 * len(plan.groups) + 8
        body += title(f'scope="{scope}"', 0, y + 30)
        body += placed(pictures.groups(plan), Box(150, y, 400, height))
        y += height + 8
    return body, 600, y


def kept() -> Drawing:
    """What a slice keeps of a packed projection: the same heads of query, key and value."""
    plan = doll_of(nesting="sliced").plan
    rows, columns = plan.parameters["qkv.weight"]
    body = ""
    for i, (size, widths) in enumerate(zip(plan.sizes, plan.ladder, strict=True)):
        left, tall, wide = 200.0 * i + 50, 192.0, 120.0
        body += title(f"size {size}", left, 16)
        body += rect(Box(left, 26, wide, tall), class_="whole")
        unit = tall / dims.size(rows), wide / dims.size(columns)
        for top, bottom in dims.kept(rows, widths):
            for start, stop in dims.kept(columns, widths):
                box = Box(
                    left + start * unit[1], 26 + top * unit[0],
                    (stop - start) * unit[1], (bottom - top) * unit[0],
                )  # fmt: skip
                body += segment(box, i, plan.levels)
        for j, name in enumerate(("query", "key", "value")):
            body += text(name, left - 8, 62 + 64 * j, text_anchor="end", class_="soft")
            body += tag("line", x1=left, x2=left + wide, y1=26.0 + 64 * j, y2=26.0 + 64 * j,
                        class_="rule")  # fmt: skip
    return body, 600, 224


def words_of(dim: Dim, plan: mk.Plan) -> str:
    """Return a dim in words: 3 · qkv heads · 8."""
    out = []
    for factor in dim:
        if isinstance(factor, dims.Nested):
            out.append(f"{factor.size}")
        elif isinstance(factor, int):
            out.append(str(factor))
        else:
            out.append(" | ".join(words_of(part, plan) for part in factor.segments))
    return " · ".join(out)


def ops(doll: mk.Doll) -> Iterator[tuple[str, fx.Node]]:
    """Yield (op, node) from the tokens to the end of the attention, of ops with one result."""
    for node in doll._trace.graph.nodes:
        if node.op == "call_function" and doll.plan.dims(node.name):
            yield op_key(node).rpartition("::")[2], node
        if node.name.startswith("add"):
            return


def attention() -> Drawing:
    """The axes of one attention block from input to output, as its plan has them."""
    doll = doll_of(nesting="sliced")
    body, y = "", 20.0
    for name, node in ops(doll):
        body += text(name, 0, y + 15)
        body += boxes(doll.plan.dims(node.name), doll.plan, 190, y)[0]
        y += 30
    body += text("op", 0, 10, class_="soft") + text("dims of its output", 190, 10, class_="soft")
    return body, 600, y


def boxes(shape: tuple[Dim, ...], plan: mk.Plan, x: float, y: float) -> tuple[str, float]:
    """A box for each dim of a shape, coloured where it nests, and where they end."""
    body = ""
    for dim in shape:
        words = words_of(dim, plan)
        wide = 16.0 + 6.5 * len(words)
        kind = "unit" if dims.is_nested(dim) else "whole"
        body += rect(Box(x, y, wide, 22), class_=kind, fill_opacity=0.45, rx=3)
        body += text(words, x + wide / 2, y + 15, text_anchor="middle")
        x += wide + 6
    return body, x


def crossings() -> Drawing:
    """How the axes of the attention block cross its ops: dims before and after each."""
    doll = doll_of(nesting="sliced")
    body, y = "", 20.0
    for name, node in ops(doll):
        given = (n for n in node.all_input_nodes if n.op != "get_attr")
        shape = next((doll.plan.dims(n.name) for n in given), ())
        if not shape:  # of several results
            continue
        row, x = boxes(shape, doll.plan, 0, y)
        body += row + text(name, x + 8, y + 15, class_="soft")
        body += boxes(doll.plan.dims(node.name), doll.plan, 330, y)[0]
        y += 30
    body += text("dims of the argument", 0, 10, class_="soft")
    body += text("dims of what the op gives", 330, 10, class_="soft")
    return body, 600, y


def ladder() -> Drawing:
    """How many units of each group every size has: all groups follow the ratio of the first."""
    plan = doll_of().plan
    body, y = "", 26.0
    for level, (size, widths) in enumerate(zip(plan.sizes, plan.ladder, strict=True)):
        body += text(f"size {size}", 0, y + 15)
        for i, (group, width) in enumerate(zip(plan.groups, widths, strict=True)):
            x = 80.0 + 175 * i
            body += rect(Box(x, y, 120, 20), class_="whole")
            body += segment(Box(x, y, 120 * width / group.size, 20), level, plan.levels)
            body += text(f"{width}", x + 126, y + 15, class_="soft")
        y += 30
    for i, group in enumerate(plan.groups):
        body += title(f"{group.name}, {group.size}", 80.0 + 175 * i, 14)
    return body, 600, y


def parameters(plan: mk.Plan, most: int) -> Drawing:
    """The first tensors of a plan with their dims."""
    body, y = "", 4.0
    for name, shape in list(plan.parameters.items())[:most]:
        body += text(name, 0, y + 15) + boxes(shape, plan, 170, y)[0]
        y += 30
    return body, 600, y


def axes_of_weights() -> Drawing:
    """What a plan says of each tensor of the attention block."""
    return parameters(doll_of(nesting="sliced").plan, 9)


class Catalogue(nn.Module):
    """Items by fixed features, projected: the features stay whole, the projection nests."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(40, 24))
        self.project, self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> scores [batch, length, 40]"""
        table = self.project(self.features)
        x = table[ids]
        return (x + self.down(F.relu(self.up(x)))) @ table.T


def held() -> Drawing:
    """Which tensors of a model with features are cut, and which stay whole."""
    torch.manual_seed(0)
    doll = mk.convert(Catalogue().eval(), torch.randint(40, (2, 5)), sizes=RATIOS, nesting="sliced")
    return parameters(doll.plan, 9)


class Branching(nn.Module):
    """A forward that asks for the length of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> [batch, length, 10]"""
        x = self.table(ids)
        return self.head(F.relu(x) if ids.shape[1] > 8 else x)


def taken() -> Drawing:
    """Which lengths a trace of a branch on the length takes, and which it refuses."""
    body, y, most = "", 24.0, 16
    for example in (5, 12):
        doll = mk.convert(Branching().eval(), torch.randint(100, (2, example)), sizes=RATIOS)
        conditions = doll._trace.signature.guards.conditions
        body += text(f"traced with length {example}", 0, y + 15)
        for length in range(1, most + 1):
            box = Box(140.0 + 27 * length, y, 24, 22)
            fits = all(guard.holds([(2, length)]) for guard in conditions)
            body += rect(box, class_="unit" if fits else "whole", fill_opacity=0.45, rx=3)
            middle = box.x + box.width / 2
            body += text(length, middle, y + 15, text_anchor="middle")
        y += 32
    body += text("lengths that a call may have: coloured ones run, the others are refused", 0, 10,
                 class_="soft")  # fmt: skip
    return body, 620, y


def checkpoint() -> Drawing:
    """The files of a checkpoint, as wide as they are large."""
    with tempfile.TemporaryDirectory() as folder:
        mk.save(doll_of(), Path(folder) / "ckpt")
        files = {p.name: p.stat().st_size for p in sorted((Path(folder) / "ckpt").iterdir())}
    largest, body, y = max(files.values()), "", 8.0
    for name, size in files.items():
        body += text(name, 0, y + 15)
        body += rect(Box(210, y, max(3.0, 300 * size / largest), 20), class_="unit")
        words = f"{size / 1000:,.0f} kB" if size >= 1000 else f"{size} B"
        body += text(words, 218 + max(3.0, 300 * size / largest), y + 14, class_="soft")
        y += 30
    return body, 600, y


def losses() -> Drawing:
    """What a loss sees in masked nesting: one pass over the trunk, the tail once per size."""
    plan = doll_of().plan
    body = title("trunk, one pass", 0, 16) + title("tail, once per size", 250, 16)
    body += title("criterion", 430, 16)
    ends = [0, *(w[plan.main] for w in plan.ladder)]
    for level, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        body += segment(Box(3.0 * a, 30, 3.0 * (b - a), 26), level, plan.levels)
    for level, size in enumerate(plan.sizes):
        y = 84.0 + 40 * level
        body += segment(Box(0, y, 3.0 * size, 20), level, plan.levels)
        body += text(f"first {size} units", 3.0 * size + 8, y + 14, class_="soft")
        body += text(f"logits of size {size}", 280, y + 14)
        body += text(f"w{level + 1} · loss(logits, y)", 430, y + 14)
        body += tag("line", x1=395.0, x2=422.0, y1=y + 10, y2=y + 10, class_="rule")
    body += text("sum", 430, 84.0 + 40 * plan.levels + 8, class_="title")
    return body, 600, 84.0 + 40 * plan.levels + 18


DRAWINGS: Mapping[str, tuple[Callable[[], Drawing], str]] = {
    "nestings": (nestings, "A weight in masked and in sliced nesting"),
    "scopes": (scopes, "Groups that nest under the scopes full, ffn and output"),
    "slice": (kept, "What slices of three sizes keep of a packed query, key and value projection"),
    "attention": (attention, "Axes of an attention block, op by op; coloured dims nest"),
    "checkpoint": (checkpoint, "Files of a checkpoint by size"),
    "ladder": (ladder, "Units of each group at each size of a ladder"),
    "plan": (axes_of_weights, "Tensors of an attention block with their axes; coloured ones nest"),
    "rules": (crossings, "Axes before and after each op of an attention block"),
    "held": (held, "Tensors of a model with item features: the features stay whole"),
    "trace": (taken, "Lengths that a trace of a branching forward takes"),
    "losses": (losses, "Prefixes of one pass, their logits, their weighted losses"),
}


def drawn(name: str) -> str:
    """Return a picture as the text of an SVG file."""
    draw, label = DRAWINGS[name]
    body, width, height = draw()
    return pictures.standalone(svg(body, width, height, label))


def main() -> None:
    """Write every picture."""
    for name in DRAWINGS:
        (IMAGES / f"{name}.svg").write_text(drawn(name), encoding="utf-8")


if __name__ == "__main__":
    main()
