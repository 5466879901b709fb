"""write_report(): plan, costs and quality of a checkpoint at each size, as one offline page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch

from matryoshkafy.deploy.profile import Cost, device_of, profile_at
from matryoshkafy.files.checkpoint import open_checkpoint
from matryoshkafy.plan.plan import Plan
from matryoshkafy.report import pictures
from matryoshkafy.report.page import sections, tradeoffs
from matryoshkafy.report.page.contents import Cascading, Report, ReportError, Search
from matryoshkafy.report.page.metrics import read_metrics

PathLike = str | os.PathLike[str]


def report_of(
    folder: PathLike,
    metrics: PathLike | None = None,
    *,
    device: str = "cpu",
    batch: int | None = None,
    length: int | None = None,
) -> Report:
    """Return the report of a checkpoint: every size is loaded, and a call of it measured.

    Args:
        folder: the checkpoint.
        metrics: a CSV as `read_metrics` reads it.
        device: where latency is measured, in seconds, the median of several calls.
        batch: rows of the random inputs; those of the trace by default.
        length: their length; that of the trace by default.

    Raises:
        ReportError: for the metrics.
        ProfileError: for a device that is not here. Also what `load` raises.
    """
    place = device_of(device)
    checkpoint = open_checkpoint(folder)
    found = {} if metrics is None else read_metrics(metrics, checkpoint.sizes)
    costs: dict[int, Cost] = {}
    shapes = ""
    for size in checkpoint.sizes:
        small = checkpoint.sub_model(size)
        costs[size], shapes = profile_at(small, place, batch=batch, length=length)
    name = Path(folder).resolve().name
    return Report(name, checkpoint.plan, costs, found, _made_with(place, shapes), shapes)


def _made_with(device: torch.device, shapes: str) -> str:
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return (
        f"Made by matryoshkafy report with torch {torch.__version__}. Latency: the median of "
        f"calls on {device} ({platform.machine()}, {threads}), inputs of "
        f"{shapes or 'no tensor'}."
    )


def write_report(report: Report, path: PathLike) -> Path:
    """Write the page: HTML with its pictures, style and script inside. Returns the path.

    Args:
        report: what `report_of` returned.
        path: the file; replaced where it exists.

    Raises:
        ReportError: where the path cannot be written.
    """
    return _written(page(report), Path(path))


def write_tradeoffs(
    name: str,
    path: PathLike,
    *,
    searches: Sequence[Search] = (),
    cascade: Cascading | None = None,
) -> Path:
    """Write a page of trade-offs alone: ways to search, or a cascade. Returns the path.

    Args:
        name: the title.
        path: the file; replaced where it exists.
        searches: settings, cheapest first.
        cascade: a cascade beside its sizes.

    Raises:
        ReportError: where the path cannot be written.
    """
    body = tradeoffs.retrieval(searches) + tradeoffs.cascading(cascade)
    return _written(_filled(name, body, footer="Made by matryoshkafy."), Path(path))


def _written(text: str, target: Path) -> Path:
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(
            f"the report cannot be written to {target} ({error.strerror}); give another file"
        ) from error
    return target


def page(report: Report) -> str:
    """Return the page as HTML text. It refers to nothing outside itself.

    Args:
        report: what `report_of` returned.
    """
    parts = (
        sections.costs_section(report),
        sections.quality_section(report),
        tradeoffs.quality_against_cost(report),
        tradeoffs.retrieval(report.searches),
        tradeoffs.cascading(report.cascade),
        sections.plan_section(report),
        sections.whole_section(report),
    )
    return _filled(
        report.name,
        "\n".join(parts),
        subtitle=_subtitle(report.plan),
        dial=sections.dial(report),
        footer=report.footer,
    )


def _filled(title: str, body: str, *, subtitle: str = "", dial: str = "", footer: str = "") -> str:
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=_asset("style.css") + pictures.STYLE,
        script=_asset("script.js"),
        dial=dial,
        sections=body,
        footer=escape(footer),
    )


def _subtitle(plan: Plan) -> str:
    o = plan.options
    norm = f", norm {o.norm}" if plan.masked else ""
    return (
        f"Width {plan.width}, {plan.levels} sizes, nesting {o.nesting}, scope {o.scope}{norm}; "
        f"{len(plan.groups)} groups over {len(plan.parameters)} tensors"
    )


def _asset(name: str) -> str:
    return (files("matryoshkafy.report") / "page" / name).read_text(encoding="utf-8")
