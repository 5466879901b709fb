"""matryoshkafy verify: the laws, on a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Device, Folder, Imports, Json, Quiet
from matryoshkafy_cli.screen import Screen, counted, import_all, stored, table, wrapped

BROKEN = 1
COLUMNS = ("size", "output", "trunk", "beyond", "resliced", "parameters", "bytes")


def verify(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="The original, as convert takes it: a doll in sliced nesting computes the same.",
        ),
    ] = None,
    device: Device = "cpu",
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check the laws of nesting on a CHECKPOINT, on random inputs; exit code 1 when one fails.

    Computes with the graph of the checkpoint, at every size.

    Per size, as relative errors: the sub-model against the doll's output (output) and against the
    prefix of every inner value (trunk); how far the output moves when everything past the prefix
    turns to noise (beyond); whether a slice of the next larger slice is the same (resliced).
    """
    screen = Screen(quiet, json)
    import_all(imports)
    with screen.step(f"loading {checkpoint}"):
        import matryoshkafy
        from matryoshkafy.deploy.profile import device_of
        from matryoshkafy.dolls.example_inputs import example_inputs

        place = device_of(device)
        model = matryoshkafy.load(checkpoint).to(place)
        args, kwargs = example_inputs(model, device=place)
        original = None
        if against is not None:
            from matryoshkafy_cli.models import load_model

            original = load_model(against).model.to(place)
    with screen.step("verifying"):
        report = matryoshkafy.verify(model, args, kwargs, against=original)
    described = _described(report)
    screen.result(described, lambda: _text(described))
    if not report.passed:
        raise typer.Exit(BROKEN)


def _described(report: Any) -> dict[str, Any]:
    rows = [{k: _finite(v) for k, v in asdict(size).items()} for size in report.sizes]
    return {
        "passed": report.passed,
        "tolerance": report.tolerance,
        "tail_share": report.tail_share,
        "sizes": rows,
        "laws": [{**asdict(law), "error": _finite(law.error)} for law in report.laws],
    }


def _finite(value: Any) -> Any:
    """Infinity and NaN are no JSON numbers."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _text(described: dict[str, Any]) -> str:
    from matryoshkafy.plan.text import percent

    rows = [_row(row) for row in described["sizes"]]
    verdict = "every law holds" if described["passed"] else "A LAW FAILS"
    title = (
        f"{verdict}: errors of at most {described['tolerance']:g} are allowed; "
        f"{percent(described['tail_share'])} of the nodes are computed once per size"
    )
    broken = [
        f"law {law['number']} fails: {law['name']} {law['detail']}".rstrip()
        for law in described["laws"]
        if law["holds"] is False
    ]
    return "\n".join([table(title, COLUMNS, rows), *map(wrapped, broken)])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    errors = (f"{float(row[name]):.1e}" for name in ("output_error", "trunk_error", "beyond_error"))
    same = "same" if row["resliced"] else "DIFFERS"
    held = (counted(row["parameters"]), stored(row["bytes"]))
    return (str(row["size"]), *errors, same, *held)
