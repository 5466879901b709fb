"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelSpec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="model.py, model.py:build, package.module:factory, a folder of transformers or "
        "sentence-transformers, timm:NAME[:pretrained] or open_clip:NAME[:TAG]. The code of a "
        "Python file or module is run; it defines the model, and example_inputs: a tensor, a tuple "
        "(positional), a dictionary (by name), or a function that returns one of them.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A folder that convert or slice wrote.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.", show_default=False)]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="safetensors: a file, a sharded index or a folder of them."),
]
Nesting = Annotated[
    str | None,
    typer.Option(
        "--nesting",
        help="masked: one pass holds every size, to train. sliced: keeps a trained function. "
        "Default: sliced where trained weights were loaded and for scope ffn, else masked.",
        show_default=False,
    ),
]
Scope = Annotated[str, typer.Option("--scope", help="Which axes nest: full, ffn or output.")]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", help="A pattern of names whose axes stay whole. May repeat."),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module that registers operators which the checkpoint calls (runs its "
        "code). May repeat.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1, mps.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Rows of the random inputs.")]
Length = Annotated[
    int | None,
    typer.Option("--length", min=1, help="Length of the random inputs: tokens, steps."),
]
Page = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write the table and its plot as a page, too."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
