"""write_report(): plan, costs and quality of a checkpoint at each size, as one offline page."""

from __future__ import annotations

import os
import platform
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch
from torch import nn

from matryoshkafy.deploy.profile import Cost, device_of, profile
from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.files.checkpoint import open_checkpoint
from matryoshkafy.plan.plan import Plan
from matryoshkafy.report import pictures
from matryoshkafy.report.page import sections
from matryoshkafy.report.page.contents import Report, ReportError
from matryoshkafy.report.page.metrics import read_metrics

PathLike = str | os.PathLike[str]


def report_of(folder: PathLike, metrics: PathLike | None = None, *, device: str = "cpu") -> Report:
    """Return the report of a checkpoint: every size is loaded, and a call of it measured.

    metrics: a CSV as `read_metrics` reads it. Latency in seconds, the median of several calls on
    random inputs of the shapes that the model was traced with. Raises what `load` raises,
    `ReportError` for the metrics, `ProfileError` for a device that is not here.
    """
    place = device_of(device)
    checkpoint = open_checkpoint(folder)
    found = {} if metrics is None else read_metrics(metrics, checkpoint.sizes)
    costs = {size: _cost(checkpoint.sub_model(size), place) for size in checkpoint.sizes}
    return Report(Path(folder).resolve().name, checkpoint.plan, costs, found, _made_with(place))


def _cost(model: nn.Module, device: torch.device) -> Cost:
    args, kwargs = example_inputs(model, device=device)
    return profile(model.to(device).eval(), args, kwargs)


def _made_with(device: torch.device) -> str:
    return (
        f"Made by matryoshkafy report with torch {torch.__version__}. Latency: the median of "
        f"calls on {device} ({platform.machine()}, {torch.get_num_threads()} threads), inputs of "
        "the shapes that the model was traced with."
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
