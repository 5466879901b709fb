"""Judge the wide zoo and write docs/results/wide.md.

    python -m tests.zoo.wide.table [names or libraries ...] [--rows rows.jsonl] [-o wide.md]

Needs the extra `wide`; a library that is not installed is left out, and said. Models are judged in
worker processes; one past its time limit is ended with its worker. Rows are appended as they come
and not judged again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.zoo.judge import Verdict, exports, judge
from tests.zoo.plain import plain
from tests.zoo.registry import Entry
from tests.zoo.wide.registry import wide_entries
from tests.zoo.workers import Worker

Row = dict[str, Any]
NESTINGS = ("sliced", "masked")
KINDS = ("right", "refused", "wrong", "crash")


def measure(entry: Entry) -> list[Row]:
    """Return a row for each nesting, or one that says why the model could not be built."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, args, kwargs = entry.build()
            with torch.no_grad():
                model(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  a library may raise anything
        text = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        return [_row(Verdict(entry.name, entry.family, "", "unbuilt", {"build": text}), False)]
    traced = exports((model, args, kwargs))
    return [_row(judge(entry, nesting), traced) for nesting in NESTINGS]


def _row(verdict: Verdict, traced: bool) -> Row:
    return asdict(verdict) | {"exports": traced}


def answer(name: str) -> list[Row]:
    """Return the rows of the model of a name."""
    return measure({entry.name: entry for entry in wide_entries()}[name])


def judged(chosen: Iterable[Entry], path: Path, limit: float) -> list[Row]:
    """Return the rows of the models chosen; those already in the file are not judged again."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done, worker = {row["name"] for row in rows}, Worker(answer)
    for entry in chosen:
        if entry.name in done:
            continue
        found, failure = worker.ask(entry.name, limit)
        if failure:
            worker.end()
            worker = Worker(answer)
            text = f"crash: the process ended, or took over {limit:g} s"
            checks = {"convert": text}
            blank = (Verdict(entry.name, entry.family, n, "crash", checks) for n in NESTINGS)
            found = [_row(verdict, True) for verdict in blank]
        with path.open("a") as sink:
            sink.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
        for row in found:
            print(row["name"], row["nesting"], row["status"], *_bad(row)[:1], flush=True)
    worker.end()
    return rows


def one_of_each_first(chosen: Iterable[Entry]) -> list[Entry]:
    """Return the first model of every library, then the second ones: a run cut short is wide."""
    seen: Counter[str] = Counter()
    ranked = []
    for entry in chosen:
        ranked.append((seen[entry.family], entry))
        seen[entry.family] += 1
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


def _bad(row: Row) -> list[str]:
    kinds = ("refused", "wrong", "crash", "said", "shapes")
    found = [f"{k}: {v}" for k, v in row["checks"].items() if v.partition(":")[0] in kinds]
    return sorted(found, key=lambda text: ("wrong" not in text, "crash" not in text))


HEAD = """# Models of other libraries

{models} small random models of {libraries} libraries that this project does not depend on, judged
from outside (`tests/zoo/judge.py`): the model run eagerly is the truth. Made by
`python -m tests.zoo.wide.table` on a 2-core CPU machine, torch {torch}, Python {python}.

{summary}

`right`: at full width outputs and gradients are the model's, in evaluation and in training mode;
slices run, equal the native small class where one is built, ignore what they do not keep; another
batch or length is answered rightly or refused by name; the user's model is unchanged bit for bit.
`refused`: convert says what it cannot take. `wrong`: an answer that is not the model's. `crash`: an
error that is not the library's own. `share`: parameters left at half width. The last column names
the checks that are not right; `shapes` says where a slice keeps whole what the native small class
narrows, `said` what the plan's remarks say.

| model | exports | nesting | verdict | share | batch | length | what |
|---|---|---|---|---|---|---|---|"""


def page(rows: list[Row]) -> str:
    """Return the verdicts as a page."""
    built = [row for row in rows if row["status"] != "unbuilt"]
    libraries = sorted({row["family"] for row in built})
    head = HEAD.format(
        models=len({row["name"] for row in built}),
        libraries=len(libraries),
        torch=torch.__version__.split("+")[0],
        python=platform.python_version(),
        summary="\n".join(_summary(built)),
    )
    ordered = sorted(built, key=lambda row: (row["family"].lower(), row["name"]))
    named = f"Libraries: {', '.join(libraries)}."
    return "\n".join([head, *map(_line, ordered), "", named]) + "\n"


def _summary(built: list[Row]) -> list[str]:
    lines = ["| of what torch.export traces | sliced | masked |", "|---|---|---|"]
    for kind in KINDS:
        cells = []
        for nesting in NESTINGS:
            mine = [r for r in built if r["nesting"] == nesting and r["exports"]]
            count = Counter(r["status"] for r in mine)[kind]
            cells.append(f"{count} of {len(mine)} ({count / max(1, len(mine)):.0%})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _line(row: Row) -> str:
    share = "" if row["share"] is None else f"{row['share']:.2f}"
    shapes = [row["checks"].get(c, "").partition(":")[0] for c in ("batch", "length")]
    what = "; ".join(plain(text)[:160] for text in _bad(row)[:3])
    known = f"{'yes' if row['exports'] else 'no'} | {row['nesting']} | {row['status']} | {share}"
    return f"| {row['name']} | {known} | {' | '.join(shapes)} | {what} |"


def main() -> None:
    """Parse the command line, judge what is missing, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="models or libraries; all when none is given")
    parser.add_argument("--rows", type=Path, default=Path("build/wide.jsonl"))
    parser.add_argument("--skip", default="large", help="leave out entries with this tag")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/wide.md"))
    given = parser.parse_args()
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    chosen = [e for e in wide_entries(given.names) if given.skip not in e.tags]
    rows = judged(one_of_each_first(chosen), given.rows, given.limit)
    given.output.write_text(page(rows))
    unbuilt = [f"{r['name']} ({r['checks']['build']})" for r in rows if r["status"] == "unbuilt"]
    print("not built:", *unbuilt, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    main()
