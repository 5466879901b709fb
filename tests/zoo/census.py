"""Exports every entry of the zoo and counts what its graph is made of.

    python -m tests.zoo.census --json census.json --markdown census.md [names or families ...]

Entries run in worker processes of a few dozen each; one that passes its time limit is killed with
its worker and the rest goes on in a new one.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.zoo.registry import Entry, entries
from tests.zoo.workers import Worker

if TYPE_CHECKING:
    from torch import fx

Record = dict[str, Any]


def export(entry: Entry) -> Record:
    """Builds, runs and exports one entry; says what went wrong and where if it did."""
    import torch

    record: Record = {"name": entry.name, "family": entry.family, "stage": "build"}
    start = time.perf_counter()
    try:
        model, args, kwargs = entry.build()
        record |= {"stage": "forward", "parameters": sum(p.numel() for p in model.parameters())}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            expected = model(*args, **kwargs)
        record |= {"stage": "export", "ready_seconds": round(time.perf_counter() - start, 2)}
        start = time.perf_counter()
        program = torch.export.export(model, args, kwargs, strict=False)
        record |= {"seconds": _since(start), "stage": "run"}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            record["error_of_graph"] = worst(expected, program.module()(*args, **kwargs))
    except Exception as error:  # noqa: BLE001 - the census records whatever a library raises
        return record | {"ok": False, "seconds": _since(start)} | _failure(error)
    return record | {"ok": True, "stage": "done"} | anatomy(program.graph)


def worst(expected: Any, given: Any) -> float:
    """Gives the largest difference of two structures of tensors, relative to the largest value."""
    import torch
    from torch.utils._pytree import tree_leaves

    pairs = zip(tree_leaves(expected), tree_leaves(given), strict=True)
    errors = [_relative(a, b) for a, b in pairs if torch.is_tensor(a) and a.numel()]
    return max(errors, default=0.0)


def _relative(a: Any, b: Any) -> float:
    if a.shape != b.shape:
        return float("inf")
    wide = (lambda t: t.cdouble()) if a.is_complex() else (lambda t: t.double())
    gap = (wide(a) - wide(b)).abs().max()
    return float(gap / wide(a).abs().max().clamp(min=1e-30))


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _failure(error: Exception) -> Record:
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    place = f"{last.filename.split('site-packages/')[-1]}:{last.lineno}"
    return {"error": type(error).__name__, "message": lines[:12], "place": place}


def anatomy(graph: fx.Graph) -> Record:
    """Counts nodes and ops of a graph and of the graphs inside its higher-order ops."""
    ops: Counter[str] = Counter()
    nodes = 0
    for inner in _graphs(graph):
        nodes += len(inner.nodes)
        ops.update(str(node.target) for node in inner.nodes if node.op == "call_function")
    in_place = sorted(op for op in ops if re.search(r"[a-z0-9]_\.|__i\w+__", op.split("aten.")[-1]))
    higher = sorted(op for op in ops if "." not in op and "<" not in op)
    return {"nodes": nodes, "ops": dict(ops), "in_place": in_place, "higher_order": higher}


def _graphs(graph: fx.Graph) -> Iterable[fx.Graph]:
    import torch

    yield graph
    owner = graph.owning_module
    children = owner.children() if owner is not None else ()
    for child in children:
        if isinstance(child, torch.fx.GraphModule):
            yield from _graphs(child.graph)


def answer(name: str) -> Record:
    """Exports the entry of a name."""
    return export({entry.name: entry for entry in entries()}[name])


def asked(worker: Worker, entry: Entry, limit: float) -> Record:
    """Gives the record of one entry, or a record of the time-out or crash."""
    found, failure = worker.ask(entry.name, limit)
    if not failure:
        return found
    message = f"over {limit} s" if failure == "Timeout" else "the process died"
    base: Record = {"name": entry.name, "family": entry.family, "stage": "?", "ok": False}
    return base | {"error": failure, "message": [message], "place": ""}


def run(wanted: Iterable[Entry], *, limit: float = 60.0, per_worker: int = 40) -> list[Record]:
    """Exports every entry wanted and gives one record for each."""
    records: list[Record] = []
    worker = Worker(answer)
    for entry in wanted:
        record = asked(worker, entry, limit + (20.0 if worker.served == 0 else 0.0))
        records.append(record)
        print(_line(record), flush=True)
        if record.get("error") in {"Timeout", "Crash"} or worker.served >= per_worker:
            worker.end()
            worker = Worker(answer)
    worker.end()
    return records


def _line(record: Record) -> str:
    head = f"{record['name']:28} {record.get('seconds', 0):6.2f} s "
    if record["ok"]:
        size = f"{record['nodes']:5} nodes {len(record['ops']):3} ops"
        return head + f"{size} {record['error_of_graph']:.1e}"
    return head + f"{record['stage']} {record['error']}: {' '.join(record['message'])[:160]}"


def markdown(records: list[Record]) -> str:
    """Writes the census as tables: failures, ops by number of graphs, in-place, higher-order."""
    good = [record for record in records if record["ok"]]
    users: dict[str, list[Record]] = defaultdict(list)
    for record in good:
        for op in record["ops"]:
            users[op].append(record)
    ranked = sorted(users.items(), key=lambda item: (-len(item[1]), item[0]))
    inner = {op for record in good for op in record["in_place"]}
    higher = {op for record in good for op in record["higher_order"]}
    parts = [
        f"{len(good)} of {len(records)} export; {len(users)} distinct ops.",
        _failures(records),
    ]
    for title, keep in (("In-place ops", inner), ("Higher-order ops", higher)):
        parts.append(_table(title, [item for item in ranked if item[0] in keep], models=12))
    parts.append(_table("Ops", ranked, models=1))
    return "\n\n".join(parts) + "\n"


def _failures(records: list[Record]) -> str:
    lines = ["## Failures", ""]
    for record in records:
        if not record["ok"]:
            message = "\n    ".join(record["message"][:6])
            head = f"- **{record['name']}** ({record['stage']}, {record['place']})"
            lines.append(f"{head} {record['error']}\n    {message}")
    return "\n".join(lines)


def _differing(good: list[Record]) -> str:
    lines = ["## Graphs that differ from the model by more than 1e-4", ""]
    wrong = [record for record in good if not record["error_of_graph"] <= 1e-4]
    return "\n".join(lines + [f"- {r['name']}: {r['error_of_graph']:.1e}" for r in wrong])


def _table(title: str, ranked: list[tuple[str, list[Record]]], *, models: int) -> str:
    lines = [f"## {title}", "", "| op | graphs | calls | models |", "|---|---|---|---|"]
    for op, users in ranked:
        calls = sum(record["ops"][op] for record in users)
        small = sorted(users, key=lambda record: record["nodes"])[:models]
        names = " ".join(record["name"] for record in small)
        lines.append(f"| {op} | {len(users)} | {calls} | {names} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, runs the census and writes its files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="entries or families; all when none is given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per entry")
    given = parser.parse_args()
    wanted = [e for e in entries() if not given.names or {e.name, e.family} & set(given.names)]
    records = run(wanted, limit=given.limit)
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))
    if given.markdown:
        given.markdown.write_text(markdown(records))


if __name__ == "__main__":
    main()
