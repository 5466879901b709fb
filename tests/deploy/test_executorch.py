"""ExecuTorch reads what export writes: the same values through its runtime, where it installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshkafy.deploy.export import export
from tests.deploy.test_export import sub_model, tensors

exir: Any = pytest.importorskip("executorch.exir", reason="ExecuTorch's exporter is not installed")
runtime: Any = pytest.importorskip("executorch.runtime")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["tied", "images"])
def test_a_size_runs_in_executorch(tmp_path: Path, name: str) -> None:
    small, inputs = sub_model(name)
    export(small, tmp_path / "m.pt2", to="pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    (tmp_path / "m.pte").write_bytes(exir.to_edge(program).to_executorch().buffer)
    method = runtime.Runtime.get().load_program(str(tmp_path / "m.pte")).load_method("forward")
    found = method.execute(list(inputs))
    for mine, theirs in zip(tensors(small(*inputs)), found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)
