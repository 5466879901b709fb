"""matryoshkafy retrieve: search a parquet of texts in stages, or tune the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Json, Page, Quiet
from matryoshkafy_cli.screen import CommandError, Screen, table

Texts = Annotated[
    Path, typer.Argument(metavar="PARQUET", help="A table with texts.", show_default=False)
]
Encoder = Annotated[
    Path, typer.Option("--encoder", help="A sentence-transformers folder.", show_default=False)
]
Vectors = Annotated[
    Path,
    typer.Option("--vectors", help="Where the vectors are kept, or are to be kept.",
                 show_default=False),
]  # fmt: skip
Column = Annotated[str, typer.Option("--text", help="The column of the documents.")]
Query = Annotated[list[str] | None, typer.Option("--query", help="What to search for. May repeat.")]
Tune = Annotated[
    str | None,
    typer.Option("--tune", metavar="COLUMN", help="Choose stages with this column as queries, "
                 "each row's own text being the right answer."),
]  # fmt: skip
Stages = Annotated[
    str | None,
    typer.Option("--stages", help="size:kept of each stage, such as 32:200,384:10. Default: the "
                 "full size alone."),
]  # fmt: skip
Budget = Annotated[
    float | None, typer.Option("--budget", help="With --tune: most multiply-adds per query.")
]
Most = Annotated[int, typer.Option("--k", help="How many documents are wanted.")]
TUNED = 1000


def retrieve(  # noqa: PLR0913  an option is a parameter
    texts: Texts,
    encoder: Encoder,
    vectors: Vectors,
    text: Column = "text",
    query: Query = None,
    tune: Tune = None,
    stages: Stages = None,
    budget: Budget = None,
    k: Most = 10,
    report: Page = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search a PARQUET of texts with nested vectors: many by a short prefix, few by the whole.

    The column --text is encoded once and kept in the file --vectors, turned so that its first units
    tell most. With --query the nearest rows are printed; with --tune the stages worth choosing.
    """
    screen = Screen(quiet, json)
    if bool(query) == bool(tune):
        raise CommandError("give --query TEXT to search, or --tune COLUMN to choose the stages")
    rows = _rows(texts, [text, *([tune] if tune else [])])
    with screen.step(f"loading {encoder}"):
        from matryoshkafy.serving import texts as serving

        model = serving.load_encoder(encoder)
    with screen.step(f"vectors of {len(rows[text]):,} texts"):
        documents, turn = _documents(model, rows[text], vectors)
    if tune:
        settings = _tuned(screen, (model, turn), (rows[tune], documents), (budget, k))
        _drawn(settings, texts.name, report)
        return
    asked = turn(serving.encode(model, query or [], documents.sizes))
    sizes, keep = _stages(stages, documents.width, k)
    _found(screen, asked, documents, (sizes, keep, query or [], rows[text]))


def _rows(path: Path, columns: list[str]) -> dict[str, list[str]]:
    from matryoshkafy.errors import first_line

    try:
        import polars
    except ImportError as error:
        raise CommandError(
            'reading parquet needs polars: pip install "matryoshkafy[serving]"'
        ) from error
    try:
        found = polars.read_parquet(path, columns=columns)
    except (OSError, polars.exceptions.PolarsError) as error:
        raise CommandError(
            f"{path} cannot be read as a parquet table with the columns {', '.join(columns)}: "
            f"{first_line(error)}"
        ) from error
    if not len(found):
        raise CommandError(f"{path} has no rows; expected a text a row")
    for name in columns:
        if found[name].null_count():
            row = found[name].is_null().arg_max()
            raise CommandError(
                f"{path}: row {row} has no {name} ({found[name].null_count()} such rows); leave "
                "them out, or give them a text"
            )
    return {name: [str(v) for v in found[name].to_list()] for name in columns}


def _documents(model: Any, texts: list[str], path: Path) -> tuple[Any, Any]:
    """Return the turned table and the rotation; encoded where the file is not there yet."""
    from matryoshkafy.serving import Vectors as Table
    from matryoshkafy.serving import fit_rotation
    from matryoshkafy.serving import texts as serving

    if path.exists():
        plain = Table.load(path)
    else:
        plain = serving.encode(model, texts)
        plain.save(path)
    if (plain.model, len(plain)) != (serving.model_of(model), len(texts)):
        raise CommandError(
            f"{path} holds {len(plain)} vectors of model {plain.model}; expected {len(texts)} of "
            f"{serving.model_of(model)}. Name another file, or remove this one"
        )
    turn = fit_rotation(plain)
    return turn(plain), turn


def _stages(text: str | None, width: int, k: int) -> tuple[list[int], list[int]]:
    words = (text or f"{width}:{k}").split(",")
    pairs = [word.partition(":")[::2] for word in words]
    if not all(a.strip().isdecimal() and b.strip().isdecimal() for a, b in pairs):
        raise CommandError(f"--stages {text!r}: expected size:kept pairs such as 32:200,384:10")
    return [int(a) for a, _ in pairs], [int(b) for _, b in pairs]


def _drawn(settings: dict[str, Any], name: str, path: Path | None) -> None:
    if path is not None:
        from matryoshkafy.report.page.tables import searches_of
        from matryoshkafy.report.report import write_tradeoffs

        write_tradeoffs(f"Search in {name}", path, searches=searches_of(settings))


def _tuned(screen: Screen, how: Any, data: Any, limits: tuple[float | None, int]) -> dict[str, Any]:
    import numpy

    from matryoshkafy.serving import texts as serving
    from matryoshkafy.serving import tune

    (model, turn), (asked, documents) = how, data
    chosen = numpy.random.default_rng(0).permutation(len(asked))[:TUNED]
    with screen.step(f"{len(chosen)} queries, every ladder of stages"):
        queries = turn(serving.encode(model, [asked[i] for i in chosen], documents.sizes))
        budget, k = limits
        settings = tune(queries, documents, chosen, budget=budget, k=k)
    described = [
        {
            "stages": ",".join(f"{s}:{n}" for s, n in zip(each.sizes, each.keep, strict=True)),
            "recall": each.recall,
            "reciprocal_rank": each.reciprocal_rank,
            "products": each.products,
        }
        for each in settings
    ]
    lines = [
        (row["stages"], f"{row['recall']:.4f}", f"{row['reciprocal_rank']:.4f}",
         f"{row['products']:,.0f}")
        for row in described
    ]  # fmt: skip
    title = f"each line is better than all cheaper ones ({len(chosen)} queries)"
    head = ("--stages", f"recall@{k}", f"MRR@{k}", "multiply-adds")
    screen.result({"settings": described}, lambda: table(title, head, lines))
    return {"settings": described}


def _found(screen: Screen, asked: Any, documents: Any, about: Any) -> None:
    from matryoshkafy.serving import funnel

    sizes, keep, queries, texts = about
    found = funnel(asked, documents, sizes=sizes, keep=keep)
    described = [
        {
            "query": query,
            "rows": [
                {"row": int(i), "score": round(float(s), 6), "text": texts[i]}
                for i, s in zip(ids, scores, strict=True)
            ],
        }
        for query, ids, scores in zip(queries, found.ids, found.scores, strict=True)
    ]
    screen.result({"queries": described}, lambda: "\n\n".join(map(_text, described)))


def _text(found: dict[str, Any]) -> str:
    lines = [(r["text"][:60].replace("\n", " "), str(r["row"]), f"{r['score']:.3f}")
             for r in found["rows"]]  # fmt: skip
    return table(found["query"], ("text", "row", "score"), lines)
