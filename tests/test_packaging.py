"""The wheel, installed into an empty environment, works outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = """
import torch
from torch import nn

model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
example_inputs = torch.tensor([[1, 2, 3], [4, 5, 6]])
"""


def call(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    call(folder / "bin" / "python", "-m", "pip", "install", "-q", wheel, cwd=folder)
    yield folder / "bin"
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_wheel_holds_the_library_its_data_and_its_commands_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "matryoshkafy", "matryoshkafy_cli",
    }  # fmt: skip
    wanted = ["py.typed", "report/page/page.html", "report/page/style.css", "report/page/script.js"]
    assert {f"matryoshkafy/{name}" for name in wanted} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_commands_work_outside_the_checkout(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    command = environment / "matryoshkafy"
    assert "slice" in call(command, "--help", cwd=tmp_path)
    assert "width" in call(command, "inspect", "model.py", cwd=tmp_path)
    call(command, "convert", "model.py", "--sizes", "8..32", "-o", "ckpt", cwd=tmp_path)
    call(command, "slice", "ckpt", "--size", "8", "-o", "ckpt-8", cwd=tmp_path)
    call(command, "report", "ckpt", "-o", "report.html", cwd=tmp_path)
    assert (tmp_path / "ckpt-8" / "model.safetensors").stat().st_size < 10_000
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_importing_pulls_in_torch_and_nothing_heavy(environment: Path, tmp_path: Path) -> None:
    heavy = ["transformers", "sklearn", "polars", "matplotlib", "onnx", "rich", "typer", "pandas"]
    code = (
        "import sys, matryoshkafy as mk; [getattr(mk, name) for name in mk.__all__]; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert call(environment / "python", "-c", code, cwd=tmp_path).strip() == "[]"


@pytest.mark.slow
def test_help_does_not_import_torch(environment: Path, tmp_path: Path) -> None:
    code = "import sys; from matryoshkafy_cli.main import app; app(); print('torch' in sys.modules)"
    assert call(environment / "python", "-c", code, cwd=tmp_path).strip() == "False"
