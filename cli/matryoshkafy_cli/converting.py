"""matryoshkafy convert: a model becomes a doll, in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import (
    Debug,
    Force,
    Json,
    Keep,
    ModelSpec,
    Nesting,
    Output,
    Quiet,
    Scope,
    Weights,
)
from matryoshkafy_cli.screen import Screen, counted, heed, stored, wrapped


def convert(  # noqa: PLR0913  an option is a parameter
    model: ModelSpec,
    sizes: Annotated[
        str,
        typer.Option("--sizes", help='"64..1024", "64..768:64", "64,128,1024" or "0.25,0.5,1".'),
    ],
    output: Output,
    nesting: Nesting = None,
    norm: Annotated[
        str, typer.Option("--norm", help="Statistics of masked norms: block or prefix.")
    ] = "block",
    scope: Scope = "full",
    multiple_of: Annotated[
        int, typer.Option("--multiple-of", help="Round every width up to a multiple: 64, a head.")
    ] = 1,
    keep: Keep = None,
    weights: Weights = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the code that a folder's config.json names."),
    ] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a MODEL into a matryoshka doll and write it as a checkpoint.

    A Python file or module that you name is RUN.
    """
    screen = Screen(quiet, json)
    with screen.step(f"loading {model}"):
        import matryoshkafy
        from matryoshkafy.files.checkpoint import CheckpointWarning
        from matryoshkafy.files.folders import check_target
        from matryoshkafy_cli.models import load_model, source_of_spec

        check_target(output, force=force)
        loaded = load_model(model, weights, trusted=trust_remote_code)
    with screen.step("tracing and planning"):
        chosen = loaded.nesting(nesting, scope)
        options = {"nesting": chosen, "norm": norm, "scope": scope, "keep": tuple(keep or ())}
        options["multiple_of"] = multiple_of
        doll = matryoshkafy.convert(
            loaded.model, loaded.args, loaded.kwargs, sizes=sizes, **options
        )
    heed(CheckpointWarning)
    with screen.step(f"writing {output}"):
        matryoshkafy.save(doll, output, source=source_of_spec(model), force=force)
    summary = _summary(doll, output, loaded.weights)
    screen.result(summary, lambda: _text(summary))
    screen.note(f"next: matryoshkafy verify {output}")


def _summary(doll: Any, output: Path, weights: str) -> dict[str, Any]:
    from matryoshkafy.deploy.profile import size_of

    parameters, held = size_of(doll)
    return {
        "checkpoint": str(output),
        "width": doll.plan.width,
        "sizes": doll.sizes,
        "nesting": doll.plan.options.nesting,
        "weights": weights,
        "groups": len(doll.plan.groups),
        "parameters": parameters,
        "bytes": held,
        "remarks": list(doll.plan.remarks),
    }


def _text(summary: dict[str, Any]) -> str:
    from matryoshkafy.plan.text import told

    lines = [
        f"{summary['checkpoint']}: a doll of width {summary['width']} with the sizes "
        f"{', '.join(map(str, summary['sizes']))}",
        f"{counted(summary['parameters'])} parameters, {stored(summary['bytes'])}, "
        f"{summary['groups']} groups, {summary['nesting']} nesting",
        *(f"weights: {summary['weights']}" for _ in range(bool(summary["weights"]))),
        *(f"remark: {remark}" for remark in told(summary["remarks"])),
    ]
    return wrapped("\n".join(lines))
