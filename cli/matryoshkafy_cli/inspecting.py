"""matryoshkafy inspect: the plan of a model, as a table."""

from __future__ import annotations

from typing import Annotated

import typer

from matryoshkafy_cli.options import Debug, Json, Keep, ModelSpec, Nesting, Quiet, Scope, Weights
from matryoshkafy_cli.screen import Screen


def inspect(  # noqa: PLR0913  an option is a parameter
    model: ModelSpec,
    sizes: Annotated[
        str | None, typer.Option("--sizes", help="Default: a quarter, a half, all.")
    ] = None,
    nesting: Nesting = None,
    scope: Scope = "full",
    keep: Keep = None,
    weights: Weights = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print which axes of a MODEL are widths, what stays whole, and why. Changes nothing.

    A Python file or module that you name is RUN.
    """
    screen = Screen(quiet, json)
    with screen.step(f"loading {model}"):
        import matryoshkafy
        from matryoshkafy_cli.models import load_model

        loaded = load_model(model, weights)
    with screen.step("tracing and planning"):
        plan = matryoshkafy.inspect(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            sizes=sizes,
            scope=scope,
            keep=tuple(keep or ()),
            nesting=loaded.nesting(nesting, scope),
        )
    print(plan.to_json() if json else plan)
