"""Every old spelling works for one version, with a warning that names the new one."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.old_names import MODULES, PARENTS, RENAMED
from matryoshkafy.plan import OLD

# What the reference of version 0.1 showed of each module that has moved since.
NAMES = {
    "checkpoint": ("save", "load", "open_checkpoint", "Checkpoint"),
    "checks": ("verify", "Report", "SizeReport"),
    "converting": ("inspect", "convert"),
    "dims": ("Nested", "Cat", "size", "size_at"),
    "doll": ("Doll",),
    "exporting": ("export", "Exported"),
    "heads": ("MRLHead", "MRLEHead"),
    "profiling": ("profile", "Cost"),
    "report_page.metrics": ("read_metrics",),
    "reporting": ("report_of", "write_report", "page"),
    "slicing": ("slice",),
    "plan": OLD,
}


def home(module: str) -> str:
    return {**MODULES, "plan": "plan.plan"}[module]


def test_the_list_is_whole() -> None:
    assert set(NAMES) == {*MODULES, "plan"}
    assert all(name in NAMES[module] for module, names in RENAMED.items() for name in names)
    assert {name.rpartition(".")[0] for name in MODULES} - {""} == PARENTS


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, ns in NAMES.items() for n in ns])
def test_a_module_is_found_where_it_was(module: str, name: str) -> None:
    new = f"matryoshkafy.{home(module)}"
    old, now = import_module(f"matryoshkafy.{module}"), RENAMED.get(module, {}).get(name, name)
    with pytest.warns(DeprecationWarning, match=rf"is {new}\.{now} now") as caught:
        found = getattr(old, name)
    assert found is getattr(import_module(new), now)
    assert caught[0].filename == __file__


def test_a_from_import_warns_at_its_own_line() -> None:
    with pytest.warns(DeprecationWarning, match=r"losses\.heads\.MRLHead now") as caught:
        from matryoshkafy.heads import MRLHead  # pyright: ignore[reportMissingImports]
    assert MRLHead.__module__ == "matryoshkafy.losses.heads"
    assert caught[0].filename == __file__


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"matryoshkafy\.nowhere"):
        import_module("matryoshkafy.nowhere")
    with pytest.raises(AttributeError, match="nothing"):
        _ = import_module("matryoshkafy.heads").nothing
    with pytest.raises(ImportError, match="nothing"):
        from matryoshkafy.plan import nothing  # noqa: F401  # pyright: ignore


def test_inputs_among_the_overrides_are_free() -> None:
    stream = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    wide = torch.randn(3, 4, 16)
    with pytest.warns(DeprecationWarning, match=r"free=\['input'\]"):
        old = mk.convert(stream, wide, sizes=[4, 16], overrides={"inputs": ["input"]})
    assert old.plan == mk.convert(stream, wide, sizes=[4, 16], free="input").plan


def test_the_library_uses_no_old_name_itself() -> None:
    used = "import matryoshkafy as mk; [getattr(mk, name) for name in mk.__all__]"
    told = "import sys; assert not {f'matryoshkafy.{n}' for n in " + repr(set(MODULES)) + "}"
    words = [sys.executable, "-W", "error::DeprecationWarning:matryoshkafy", "-c",
             f"{used}; {told} & set(sys.modules)"]  # fmt: skip
    subprocess.run(words, check=True)
