"""The command line: every command on a model of one's own, its flags, its formats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from matryoshkafy_cli.main import app
from typer.testing import CliRunner

import matryoshkafy as mk
from matryoshkafy.report.page.numbers import timed

MODEL = """
import torch
from torch import nn

WIDTH = 32

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.second(torch.relu(self.first(x))))))

def build():
    return Net(16)

def with_inputs():
    return Net(8), {"x": torch.ones(3, 6)}

torch.manual_seed(0)
model = Net(WIDTH)
example_inputs = torch.randn(2, 6)
"""
FLAGS = {
    "inspect": "--debug --json --keep --nesting --quiet --scope --sizes --weights -q",
    "convert": "--debug --force --json --keep --multiple-of --nesting --norm --output --quiet "
    "--scope --sizes --trust-remote-code --weights -o -q",
    "slice": "--all --class --debug --force --import --json --output --quiet --size --to -o -q",
    "pack": "--debug --force --import --json --output --quiet --to -o -q",
    "verify": "--against --debug --device --import --json --quiet -q",
    "report": "--batch --cascade --debug --device --import --json --length --metrics --output "
    "--quiet --retrieval -o -q",
    "info": "--batch --debug --device --import --json --length --quiet --runs -q",
    "export": "--batch --debug --force --import --json --length --output --quiet --size --to -o -q",
    "retrieve": "--budget --debug --encoder --json --k --query --quiet --report --stages --text "
    "--tune --vectors -q",
    "family": "--column --data --debug --device --json --length --output --quiet --seed --sizes "
    "--steps --task --untie --weights -o -q",
    "cascade": "--budget --costs --debug --floor --json --quiet --report --shared --test -q",
}


def run(*words):
    return CliRunner().invoke(app(), [str(word) for word in words])


def said(*words):
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "model.py").write_text(MODEL)
    said("convert", folder / "model.py", "--sizes", "8..32", "-o", folder / "ckpt", "-q")
    return folder


def test_the_flags_are_frozen():
    commands = typer.main.get_command(app()).commands
    for name, flags in FLAGS.items():
        parameters = commands[name].params
        options = {flag for p in parameters if p.param_type_name == "option" for flag in p.opts}
        assert options == set(flags.split()), name


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from matryoshkafy_cli.main import app\n"
        "for words in ([], ['convert']):\n"
        "    try:\n"
        "        app()([*words, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'matryoshkafy'} & set(sys.modules)\n"
    )
    text = printed_by(code)
    assert "inspect" in text
    assert "RUNS ITS CODE" in " ".join(text.replace("│", " ").split())


def printed_by(code):
    """What a fresh interpreter prints, which must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inspect_prints_the_plan_and_changes_nothing(place):
    before = sorted(place.iterdir())
    text = said("inspect", place / "model.py", "--sizes", "8..32")
    assert "width 32" in text
    assert "first" in text
    plan = mk.Plan.from_json(said("inspect", place / "model.py", "--sizes", "8..32", "--json"))
    assert plan.sizes == (8, 16, 32)
    assert sorted(p for p in before if p.name != "__pycache__") == sorted(
        p for p in place.iterdir() if p.name != "__pycache__"
    )


def test_convert_writes_what_load_reads(place):
    doll = mk.load(place / "ckpt")
    assert doll.sizes == [8, 16, 32]
    assert doll.plan.options.nesting == "masked"


def test_convert_takes_its_options(place, tmp_path):
    words = ("--nesting", "sliced", "--norm", "prefix", "--keep", "head.*", "--json")
    summary = json.loads(
        said("convert", place / "model.py:build", "--sizes", "0.5,1", "-o", tmp_path / "c", *words)
    )
    assert summary["sizes"] == [8, 16]
    options = mk.load(tmp_path / "c").plan.options
    assert (options.nesting, options.norm, options.keep) == ("sliced", "prefix", ("head.*",))


def test_a_factory_may_bring_its_inputs(place, tmp_path):
    said("convert", place / "model.py:with_inputs", "--sizes", "4,8", "-o", tmp_path / "c")
    assert mk.load(tmp_path / "c")(x=torch.ones(2, 6)).shape == (2, 5)


def test_a_factory_of_a_module(place, tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    said("convert", "some_package.nets:build", "--sizes", "8,16", "-o", tmp_path / "c")
    assert mk.load(tmp_path / "c").sizes == [8, 16]


def test_weights_are_read(place, tmp_path):
    state = mk.load(place / "ckpt").state_dict()
    filled = {name: torch.full_like(t, 0.25) for name, t in state.items()}
    safetensors.torch.save_file(filled, tmp_path / "w.safetensors")
    out = tmp_path / "c"
    words = ("--sizes", "8..32", "-o", out, "--weights", tmp_path / "w.safetensors")
    said("convert", place / "model.py", *words)
    assert all(bool((p == 0.25).all()) for p in mk.load(out).parameters())


def test_slice_one_size_or_several(place, tmp_path):
    said("slice", place / "ckpt", "--size", "16", "-o", tmp_path / "one")
    rows = json.loads(said("slice", place / "ckpt", "--all", "-o", tmp_path / "all", "--json"))
    assert [row["size"] for row in rows] == [8, 16, 32]
    # 6 -> m -> m -> 5 with biases, and two vectors of the norm.
    expected = [6 * m + m + m * m + m + 2 * m + 5 * m + 5 for m in (8, 16, 32)]
    assert [row["parameters"] for row in rows] == expected
    one, doll = mk.load(tmp_path / "one"), mk.load(place / "ckpt")
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(one(x), mk.slice(doll, 16)(x))
        assert torch.equal(one(x), mk.load(tmp_path / "all" / "16")(x))


def test_slice_of_a_slice(place, tmp_path):
    said("slice", place / "ckpt", "--size", "16", "-o", tmp_path / "16")
    said("slice", tmp_path / "16", "--size", "8", "-o", tmp_path / "8")
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(mk.load(tmp_path / "8")(x), mk.load(place / "ckpt", size=8)(x))


def test_verify_tells_whether_the_laws_hold(place):
    report = json.loads(said("verify", place / "ckpt", "--json"))
    assert report["passed"] is True
    assert [row["size"] for row in report["sizes"]] == [8, 16, 32]
    assert "every law holds" in said("verify", place / "ckpt")


def test_verify_exits_with_1_where_a_law_fails(place, monkeypatch):
    from matryoshkafy.dolls.verify import Report, SizeReport

    broken = Report(1e-5, 0.0, (SizeReport(8, 0.5, float("inf"), 0.0, 0.0, True, 3, 10, 40),))
    monkeypatch.setattr(mk, "verify", lambda *args, **kwargs: broken)
    result = run("verify", place / "ckpt")
    assert result.exit_code == 1
    assert "A LAW FAILS" in result.stdout
    result = run("verify", place / "ckpt", "--json")
    assert json.loads(result.stdout)["sizes"][0]["trunk_error"] == "inf"


def test_info_counts(place):
    described = json.loads(said("info", place / "ckpt", "--json", "--runs", "1"))
    for row in described["sizes"]:
        m = row["size"]
        assert row["parameters"] == 6 * m + m + m * m + m + 2 * m + 5 * m + 5
        assert row["bytes"] == 4 * row["parameters"]
        # Two for each multiply-add of three linears, on a batch of 2.
        assert row["flops"] == 2 * 2 * (6 * m + m * m + 5 * m)
        assert row["latency_seconds"] > 0
    told = said("info", place / "ckpt", "--runs", "1")
    assert "doll of width 32" in told and "takes 2 × 6\n" in told


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_export_writes_beside_the_checkpoint(place, tmp_path, to):
    pytest.importorskip("onnxruntime")
    said("slice", place / "ckpt", "--size", "16", "-o", tmp_path / "c")
    summary = json.loads(said("export", tmp_path / "c", "--to", to, "--json"))
    assert Path(summary["file"]) == tmp_path / f"c.{to}"
    assert summary["relative_error"] < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", f"c.{to}"]


def test_export_of_another_batch(place, tmp_path):
    said("slice", place / "ckpt", "--size", "16", "-o", tmp_path / "c")
    words = ("export", tmp_path / "c", "--to", "pt2", "--force", "--json")
    sizes = {}
    for batch in (None, 5):
        more = ("--batch", batch) if batch else ()
        file = json.loads(said(*words, *more))["file"]
        ((x,), _) = torch.export.load(file).example_inputs
        sizes[batch] = tuple(x.shape)
    assert sizes == {None: (2, 6), 5: (5, 6)}
    refused = run(*words, "--length", "7")
    assert refused.exit_code == 2 and "Traceback" not in refused.output


def test_quiet_prints_no_progress(place, tmp_path):
    loud = run("slice", place / "ckpt", "--size", "8", "-o", tmp_path / "a")
    quiet = run("slice", place / "ckpt", "--size", "8", "-o", tmp_path / "b", "--quiet")
    assert "slicing 8" in loud.stderr
    assert quiet.stderr == ""


def test_python_m_runs_the_same_program_and_its_help_needs_no_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['matryoshkafy', '--help']\n"
        "try:\n"
        "    runpy.run_module('matryoshkafy', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    assert "convert" in printed_by(code)


@pytest.mark.parametrize(("weights", "nesting"), [("bert", "sliced"), ("random", "masked")])
def test_a_folder_with_weights_keeps_its_function(
    tmp_path: Path, weights: str, nesting: str
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30, intermediate_size=24, **sizes)
    made = transformers.BertModel(config) if weights == "bert" else config
    made.save_pretrained(tmp_path / weights)
    words = (tmp_path / weights, "--sizes", "8,16", "-o", tmp_path / "doll", "--json")
    found = json.loads(run("convert", *words).stdout)
    assert found["nesting"] == nesting
    assert found["weights"] == (weights if weights == "random" else str(tmp_path / weights))


def test_the_version_is_told() -> None:
    assert run("--version").stdout == f"matryoshkafy {mk.__version__}\n"


def test_pack(place, tmp_path):
    """A file per level; the files of the small sizes are enough for them."""
    target = tmp_path / "packed"
    rows = json.loads(said("pack", place / "ckpt", "-o", target, "--json"))["levels"]
    assert [row["size"] for row in rows] == [8, 16, 32]
    assert [row["bytes"] for row in rows] == [(target / r["file"]).stat().st_size for r in rows]
    (target / "level-2.safetensors").unlink()
    said("slice", target, "--size", "16", "-o", tmp_path / "16")
    assert [s["size"] for s in json.loads(said("info", target, "--json"))["sizes"]] == [8, 16]
    assert "level-2" in run("slice", target, "--size", "32", "-o", tmp_path / "32").stderr
    assert "with those before" in said("pack", place / "ckpt", "-o", tmp_path / "again")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    words = [sys.executable, "-m", "matryoshkafy", "inspect", str(tmp_path / "model.py"), "-q"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.5e-4, "850 us"), (0.0123, "12.3 ms"), (1.13, "1.13 s"), (59.9, "1 min 0 s")],
)
def test_times_are_in_human_units(seconds: float, text: str) -> None:
    assert timed(seconds) == text


def test_costs_of_another_batch(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    run("convert", tmp_path / "model.py", "--sizes", "8..32", "-o", tmp_path / "doll", "-q")
    words = ("info", tmp_path / "doll", "--json", "--runs", "1")
    two, eight = (json.loads(run(*words, *more).stdout) for more in ((), ("--batch", "8")))
    for one, other in zip(two["sizes"], eight["sizes"], strict=True):
        assert other["flops"] == 4 * one["flops"]


def test_verify_against_the_original(tmp_path: Path) -> None:
    model, other = tmp_path / "model.py", tmp_path / "other.py"
    model.write_text(MODEL)
    other.write_text(MODEL.replace("manual_seed(0)", "manual_seed(1)"))
    words = ("--sizes", "8..32", "--nesting", "sliced", "-o", tmp_path / "doll", "-q")
    run("convert", model, *words)
    assert run("verify", tmp_path / "doll", "--against", model).exit_code == 0
    result = run("verify", tmp_path / "doll", "--against", other)
    assert result.exit_code == 1 and "law 1 fails" in result.stdout
