"""matryoshkafy cascade: thresholds with which small sizes answer for large ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Json, Page, Quiet
from matryoshkafy_cli.screen import CommandError, Screen, table

Logits = Annotated[
    Path,
    typer.Argument(
        metavar="LOGITS",
        help="safetensors of validation samples: a tensor of samples x classes named by each "
        "size, and one of samples named labels.",
        show_default=False,
    ),
]
Test = Annotated[Path | None, typer.Option("--test", help="The same of test samples, to judge on.")]
Floor = Annotated[
    float | None,
    typer.Option("--floor", help="The accuracy to keep at the least cost."),
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", help="The most that a sample costs in the mean, as a share of the "
                 "largest size's cost. Default without --floor: halfway from the smallest's."),
]  # fmt: skip
Costs = Annotated[
    str | None,
    typer.Option("--costs", help="What each size costs, such as 1,4,16. Default: the sizes."),
]
Shared = Annotated[
    bool,
    typer.Option("--shared", help="A larger size continues a smaller one (masked nesting), so "
                 "that only the difference is paid."),
]  # fmt: skip


def cascade(  # noqa: PLR0913  an option is a parameter
    logits: Logits,
    test: Test = None,
    floor: Floor = None,
    budget: Budget = None,
    costs: Costs = None,
    shared: Shared = False,
    report: Page = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn from LOGITS when each size is sure enough to answer, and say what that costs."""
    screen = Screen(quiet, json)
    from matryoshkafy.serving.cascade import fit_cascade

    valid, labels = _read(logits)
    judged, truth = _read(test) if test else (valid, labels)
    paid = _costs(costs) or [float(size) for size in sorted(valid)]
    if floor is None and budget is None:
        budget = (paid[0] / paid[-1] + 1) / 2
    with screen.step("thresholds"):
        learned = fit_cascade(valid, labels, costs=paid, floor=floor, budget=budget, shared=shared)
    described = _described(learned, learned.route(judged), judged, truth)
    if report is not None:
        from matryoshkafy.report.page.tables import cascade_of
        from matryoshkafy.report.report import write_tradeoffs

        write_tradeoffs(f"Cascade of {logits.name}", report, cascade=cascade_of(described))
    screen.result(described, lambda: _text(described))


def _read(path: Path) -> tuple[dict[int, Any], Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CommandError(f"{path} cannot be read as safetensors: {error}") from error
    labels = tensors.pop("labels", None)
    strange = [name for name in tensors if not name.isdecimal()]
    if labels is None or strange or not tensors:
        raise CommandError(
            f"{path} holds {', '.join([*tensors, *(['labels'] if labels is not None else [])])}; "
            "expected `labels` and tensors named by their sizes, such as 16 and 64"
        )
    return {int(name): value for name, value in tensors.items()}, labels


def _costs(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError as error:
        raise CommandError(f"--costs {text!r}: expected numbers such as 1,4,16") from error


def _described(learned: Any, routed: Any, logits: Any, labels: Any) -> dict[str, Any]:
    rows = [
        {
            "size": size,
            "threshold": float(threshold) if threshold < float("inf") else None,
            "temperature": float(temperature),
            "answers": float((routed.sizes == size).mean()),
            "accuracy_alone": float((logits[size].argmax(1) == labels).mean()),
            "cost_alone": float(cost),
        }
        for size, threshold, temperature, cost in zip(
            learned.sizes, learned.thresholds, learned.temperatures, learned.costs, strict=True
        )
    ]
    accuracy = routed.accuracy(labels)
    share = routed.cost / learned.costs[-1]
    return {"accuracy": accuracy, "cost": routed.cost, "cost_share": share, "sizes": rows}


def _text(described: dict[str, Any]) -> str:
    title = (
        f"accuracy {described['accuracy']:.4f} at {described['cost_share']:.0%} of the largest "
        "size's cost"
    )
    rows = [
        (
            str(row["size"]),
            "never" if row["threshold"] is None else f"{row['threshold']:.3f}",
            f"{row['answers']:.0%}",
            f"{row['accuracy_alone']:.4f}",
            f"{row['cost_alone']:g}",
        )
        for row in described["sizes"]
    ]
    head = ("size", "sure from", "answers", "accuracy alone", "cost alone")
    return table(title, head, rows)
