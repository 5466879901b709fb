"""write_report(): plan, costs and quality of a checkpoint at each size, as one offline page."""

from __future__ import annotations

import os
import platform
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch
from torch.utils import _pytree as pytree

from matryoshkafy.deploy.profile import Cost, device_of, profile
from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.files.checkpoint import open_checkpoint
from matryoshkafy.plan.plan import Plan
from matryoshkafy.report import pictures
from matryoshkafy.report.page import sections
from matryoshkafy.report.page.contents import Report, ReportError
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
        model = checkpoint.sub_model(size).to(place).eval()
        args, kwargs = example_inputs(model, device=place, batch=batch, length=length)
        costs[size], shapes = profile(model, args, kwargs), _shapes(args, kwargs)
    made = _made_with(place, shapes)
    return Report(Path(folder).resolve().name, checkpoint.plan, costs, found, made)


def _shapes(args: object, kwargs: object) -> str:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return ", ".join(" x ".join(map(str, t.shape)) for t in tensors[:4])


def _made_with(device: torch.device, shapes: str) -> str:
    return (
        f"Made by matryoshkafy report with torch {torch.__version__}. Latency: the median of "
        f"calls on {device} ({platform.machine()}, {torch.get_num_threads()} threads), inputs of "
        f"{shapes or 'no tensor'}."
    )


def write_report(report: Report, path: PathLike) -> Path:
    """Write the page: HTML with its pictures, style and script inside. Returns the path.

    Raises `ReportError` where the path cannot be written.
    """
    target = Path(path)
    try:
        target.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise ReportError(
            f"the report cannot be written to {target} ({error.strerror}); give another file"
        ) from error
    return target


def page(report: Report) -> str:
    """Return the page as HTML text. It refers to nothing outside itself."""
    parts = (
        sections.costs_section,
        sections.quality_section,
        sections.layer_section,
        sections.plan_section,
        sections.whole_section,
    )
    return Template(_asset("page.html")).substitute(
        title=escape(report.name),
        subtitle=escape(_subtitle(report.plan)),
        style=_asset("style.css") + pictures.STYLE,
        script=_asset("script.js"),
        dial=sections.dial(report),
        sections="\n".join(part(report) for part in parts),
        footer=escape(report.footer),
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
