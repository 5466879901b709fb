"""The model card of a native size: what it is, its table of sizes, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matryoshkafy.natives.tree import Changes, named, value_at
from matryoshkafy.plan.plan import Plan

LOADING: Mapping[str, str] = {
    "hf": "import transformers\n\nmodel = transformers.{kind}.from_pretrained(FOLDER{more})",
    "st": "from sentence_transformers import SentenceTransformer\n\n"
    "model = SentenceTransformer(FOLDER)",
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:" + FOLDER, pretrained=True)',
    "open_clip": 'import open_clip\n\nmodel = open_clip.create_model("local-dir:" + FOLDER)',
    "class": "from matryoshkafy.natives.loading import load_native\n\n"
    "model = load_native(FOLDER, build=YOUR_CLASS)",
}


@dataclass(frozen=True)
class About:
    """What a card says: library, class, plan up to this size, parameters by size, error.

    keywords: what the class takes beside its configuration.
    """

    library: str
    kind: str
    plan: Plan
    full: int
    parameters: Mapping[int, int]
    changes: Mapping[str, tuple[object, object]]
    error: float
    notes: tuple[str, ...] = ()
    keywords: Mapping[str, object] = field(default_factory=dict[str, object])


def card(facts: About, original: str | None) -> str:
    """Return the README.md of a native size; the original's licence stays."""
    size = facts.plan.sizes[-1]
    rows = [f"| {s} | {n:,} |" for s, n in facts.parameters.items()]
    more = "".join(f", {name}={value!r}" for name, value in facts.keywords.items())
    fields = [f"| `{name}` | {old} | {new} |" for name, (old, new) in facts.changes.items()]
    return "\n".join(
        [
            *_front(original, facts.library),
            f"# Size {size} of {facts.full}",
            "",
            f"The first {size} of the {facts.full} units of a model that was converted with "
            "[matryoshkafy](https://pypi.org/project/matryoshkafy/), as a plain "
            f"`{facts.kind}`. On fresh inputs it differs from the slice by at most "
            f"{facts.error:.0e} (relative, float32).",
            "",
            "```python",
            LOADING[facts.library].format(kind=facts.kind, more=more),
            "```",
            "",
            "| size | parameters |",
            "|---:|---:|",
            *rows,
            "",
            *(["| field | original | here |", "|---|---|---|", *fields, ""] if fields else []),
            *(f"{note}\n" for note in facts.notes),
        ]
    )


def card_of_every(kind: str, parameters: Mapping[int, int], original: str | None) -> str:
    """Return the README.md of a folder that holds every size; the original's licence stays.

    parameters: {size: how many}.
    """
    rows = [f"| {s} | {n:,} |" for s, n in sorted(parameters.items())]
    return "\n".join(
        [
            *_front(original, "hf"),
            f"# Sizes {', '.join(map(str, sorted(parameters)))}",
            "",
            "One folder that holds a model and the smaller models inside it, made with "
            "[matryoshkafy](https://pypi.org/project/matryoshkafy/). Each size loads as a plain "
            f"`{kind}`, and only its own weights are read:",
            "",
            "```python",
            "import transformers",
            "from matryoshkafy import MatryoshkaConfig",
            "",
            f"size = MatryoshkaConfig(size={min(parameters)})",
            f"model = transformers.{kind}.from_pretrained(FOLDER, quantization_config=size)",
            "```",
            "",
            "| size | parameters |",
            "|---:|---:|",
            *rows,
            "",
        ]
    )


def _front(original: str | None, library: str) -> list[str]:
    found = re.match(r"---\n(.*?)\n---\n", original or "", re.DOTALL)
    lines = found.group(1).splitlines() if found else []
    kept = [
        line for line in lines if re.match(r"(license|license_name|license_link|language):", line)
    ]
    libraries = {"hf": "transformers", "st": "sentence-transformers", "timm": "timm"}
    name = libraries.get(library, library)
    return ["---", *kept, f"library_name: {name}", "tags: [matryoshka]", "---", ""]


def changes_of(changes: Changes, tree: object) -> dict[str, tuple[Any, Any]]:
    """Return {field as text: (value before, value now)}."""
    return {named(field): (value_at(tree, field), value) for field, value in changes.items()}
