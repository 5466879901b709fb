"""Bad input to the command line: what was given, what was expected, what to do; nothing written."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from matryoshkafy_cli.main import app
from typer.testing import CliRunner

import matryoshkafy as mk
from tests.cli.test_cli import MODEL

ERROR, SIZES = 2, ("--sizes", "8..32")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "model.py").write_text(MODEL)
    words = ["convert", str(folder / "model.py"), "--sizes", "8..32", "-o", str(folder / "ckpt")]
    assert CliRunner().invoke(app(), words).exit_code == 0
    return folder


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    shutil.copytree(sound / "ckpt", tmp_path / "ckpt")
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    found = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


def refused(place, *words):
    """Return the message of a command that must fail without a traceback and write nothing."""
    before = tree(place)
    result = CliRunner().invoke(app(), [str(word) for word in words])
    assert result.exit_code == ERROR, result.stdout
    assert tree(place) == before
    assert "Traceback" not in result.stderr
    assert "error: unexpected" not in result.stderr
    return result.stderr.split("error: ", 1)[1]


def assert_says(message, *parts):
    for part in parts:
        assert part in message, (part, message)


def written(place, code, name="bad.py"):
    (place / name).write_text(code)
    return name


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("nowhere.py", ("nowhere.py was given", "no such file", "Check the path")),
        ("model.py:nothing", ("defines no 'nothing'", "expected a torch.nn.Module", "give")),
        ("model.py:WIDTH", ("is a int", "expected a torch.nn.Module")),
        ("nonsense", ("'nonsense' was given", "expected model.py", "Check the spelling")),
        ("some/folder", ("'some/folder' was given", "expected", "check the path")),
        ("ckpt", ("'ckpt' was given", "config.json", "check the path")),
        (
            "no_such_package.x:build",
            ("no_such_package.x cannot be imported", "Expected", "install"),
        ),
        ("json:dumps", ("json:dumps() fails", "Expected a function without arguments")),
    ],
)
def test_a_model_that_is_none(place, spec, parts):
    assert_says(refused(place, "convert", spec, *SIZES, "-o", "out"), *parts)
    assert_says(refused(place, "inspect", spec), *parts)


def test_no_model_in_the_file(place):
    name = written(place, "net = 3\nexample_inputs = 1\n")
    message = refused(place, "convert", name, *SIZES, "-o", "out")
    assert_says(message, "bad.py defines no 'model'", "expected a torch.nn.Module", "define one")


def test_no_model_but_another_module_in_the_file(place):
    name = written(place, MODEL.replace("model = Net", "net = Net"))
    message = refused(place, "convert", name, *SIZES, "-o", "out")
    assert_says(message, "defines no 'model'", "it has net: give bad.py:net")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("import no_such_library\n", ("ModuleNotFoundError", "bad.py:1", "install")),
        ("x = 1\ny = x +\n", ("SyntaxError", "bad.py:2")),
        ("\n\nraise SystemExit(3)\n", ("SystemExit", "bad.py:3")),
        ("\n1 / 0\n", ("ZeroDivisionError", "bad.py:2", "Correct it")),
    ],
)
def test_an_import_error_in_the_file(place, code, parts):
    message = refused(place, "convert", written(place, code), *SIZES, "-o", "out")
    assert_says(message, "bad.py cannot be imported", "Expected Python code", *parts)


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ("", ("defines no example_inputs", "expected a tensor", "Define them")),
        ("example_inputs = 3", ("are a int", "expected a tensor", "Change them")),
        ("example_inputs = lambda: 1 / 0", ("example_inputs() fails", "ZeroDivisionError")),
        ("example_inputs = torch.randn(2, 7)", ("fails on its example inputs", "[2, 7]", "fit")),
        ("example_inputs = {'y': torch.ones(2, 6)}", ("y=float32[2, 6]", "forward(x)", "Correct")),
        ("example_inputs = (torch.ones(2, 6), 1)", ("float32[2, 6], int", "forward(x)")),
    ],
)
def test_example_inputs_that_do_not_fit(place, inputs, parts):
    code = MODEL.replace("example_inputs = torch.randn(2, 6)", inputs)
    message = refused(place, "convert", written(place, code), *SIZES, "-o", "out")
    assert_says(message, *parts)


def test_a_forward_that_fails(place):
    code = MODEL.replace("return self.head", "raise RuntimeError('boom')\n        return self.head")
    message = refused(place, "convert", written(place, code), *SIZES, "-o", "out")
    assert_says(message, "the forward of bad.py fails", "RuntimeError: boom", "bad.py:14")


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ("16,8,32", ("16 is followed by 8", "ascend")),
        ("0,32", ("0 is not positive",)),
        ("-8,32", ("-8 is not positive",)),
        ("8,8,32", ("8 is repeated",)),
        ("8,64", ("above the model's width, 32", "leave out")),
        ("8,16", ("below the model's width, 32", "append 32")),
        ("", ("is empty", "at least one size")),
        ("a,b", ("neither a size nor a ratio", "64..1024")),
        ("0.5,2.0", ("above 1", "(0, 1]")),
        ("32..8", ("START..END", "START <= END")),
    ],
)
def test_sizes_that_do_not_fit(place, sizes, parts):
    message = refused(place, "convert", "model.py", f"--sizes={sizes}", "-o", "out")
    assert_says(message, *parts, "width")


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [("--nesting", "nested", "masked, sliced"), ("--norm", "none", "block, prefix"),
     ("--scope", "all", "full, ffn, output")],
)  # fmt: skip
def test_choices_that_are_none(place, option, value, known):
    message = refused(place, "convert", "model.py", *SIZES, "-o", "out", option, value)
    assert_says(message, f"{value!r} was given", "expected", known)


def test_scope_ffn_is_for_sliced_nesting(place):
    words = ("--scope", "ffn", "--nesting", "masked")
    message = refused(place, "convert", "model.py", *SIZES, "-o", "out", *words)
    assert_says(message, "ffn", "sliced")


@pytest.mark.parametrize("command", ["slice", "export"])
def test_a_size_that_is_not_in_the_checkpoint(place, command):
    target = ("-o", "out") if command == "slice" else ("--to", "pt2")
    message = refused(place, command, "ckpt", "--size", "12", *target)
    assert_says(message, "size 12", "8, 16, 32")


def test_one_size_that_is_not_there_stops_all(place):
    message = refused(place, "slice", "ckpt", "--size", "8", "--size", "12", "-o", "out")
    assert_says(message, "size 12", "8, 16, 32")


def test_neither_a_size_nor_all(place):
    message = refused(place, "slice", "ckpt", "-o", "out")
    assert_says(message, "neither --size nor --all", "expected one")
    message = refused(place, "slice", "ckpt", "-o", "out", "--size", "8", "--all")
    assert_says(message, "were given", "expected one")


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "model.py", *SIZES, "-o", "ckpt"),
        ("slice", "source", "--size", "8", "-o", "ckpt"),
    ],
)
def test_an_existing_folder(place, words):
    shutil.copytree(place / "ckpt", place / "source")
    message = refused(place, *words)
    assert_says(message, "ckpt exists and is not empty", "Choose another folder", "--force")


@pytest.mark.parametrize("output", ["ckpt", "ckpt/small", "."])
def test_a_slice_over_its_own_source(place, output):
    message = refused(place, "slice", "ckpt", "--size", "8", "-o", output, "--force")
    assert_says(message, f"-o {output} was given", "the larger sizes are needed", "Choose another")


def test_force_leaves_the_files_of_others(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("mine")
    message = refused(place, "slice", "ckpt", "--size", "8", "-o", "out", "--force")
    assert_says(message, "holds 'thesis.tex'", "of no checkpoint", "remove that file yourself")


def test_an_export_of_size_zero(place):
    message = refused(place, "export", "ckpt", "--to", "pt2", "--size", "0")
    assert_says(message, "size 0 was asked for", "this model has the sizes 8, 16, 32")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_escapes_out_of_a_file_do_not_reach_the_terminal(place, command):
    path = place / "ckpt" / "matryoshka.json"
    manifest = json.loads(path.read_text())
    manifest["notes"] = ["\x1b]0;owned\x07", "\u202etxt.exe"]
    manifest["versions"]["\x1b[2Jtorch"] = "\x1b[31m9"
    manifest["plan"]["groups"][0]["name"] = "\x1b[2J"
    path.write_text(json.dumps(manifest))
    result = CliRunner().invoke(app(), [command, "ckpt"])
    for text in (result.stdout, result.stderr):
        assert all(c.isprintable() or c == "\n" for c in text), text


@pytest.mark.parametrize("command", ["info", "verify", "export"])
def test_the_help_says_who_computes_with_the_graph(command):
    for words, said in (
        ([command, "--help"], "Computes with the graph"),
        (["--help"], "COMPUTE WITH ITS GRAPH"),
    ):
        assert said in " ".join(CliRunner().invoke(app(), words).stdout.split())


def test_an_existing_file(place):
    (place / "out").write_text("mine")
    message = refused(place, "convert", "model.py", *SIZES, "-o", "out")
    assert_says(message, "out is a file", "expected a folder", "Choose another name")
    (place / "c.pt2").write_text("mine")
    message = refused(place, "export", "ckpt", "--to", "pt2", "-o", "c.pt2")
    assert_says(message, "c.pt2 exists", "Choose another name", "--force")


def test_force_replaces_a_checkpoint(place):
    result = CliRunner().invoke(app(), ["slice", "ckpt", "--size", "8", "-o", "out"])
    assert result.exit_code == 0
    words = ["slice", "ckpt", "--size", "16", "-o", "out", "--force"]
    assert CliRunner().invoke(app(), words).exit_code == 0
    assert mk.load(place / "out").meta["matryoshka"][1].sizes == (8, 16)


def test_an_unwritable_folder(place):
    (place / "file").write_text("mine")
    message = refused(place, "convert", "model.py", *SIZES, "-o", "file/out")
    assert_says(message, "cannot write", "out", "Choose a folder that you may write to")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(place):
    (place / "closed").mkdir(mode=0o500)
    message = refused(place, "convert", "model.py", *SIZES, "-o", "closed/out")
    assert_says(message, "cannot write", "Choose a folder that you may write to")


@pytest.mark.parametrize("command", [("verify",), ("info",), ("export", "--to", "pt2")])
def test_a_folder_that_is_no_checkpoint(place, command):
    (place / "empty").mkdir()
    name, *rest = command
    assert_says(refused(place, name, "empty", *rest), "empty is no checkpoint", "Give a folder")
    assert_says(
        refused(place, name, "nowhere", *rest), "nowhere is no checkpoint", "no such folder"
    )
    assert_says(refused(place, name, "model.py", *rest), "is no checkpoint", "it is a file")


def test_a_checkpoint_of_a_newer_format(place):
    manifest = json.loads((place / "ckpt" / "matryoshka.json").read_text())
    (place / "ckpt" / "matryoshka.json").write_text(json.dumps(manifest | {"format": 3}))
    message = refused(place, "verify", "ckpt")
    assert_says(message, "checkpoint format 3", "reads up to 2", "Upgrade matryoshkafy")


def test_a_damaged_checkpoint(place):
    with open(place / "ckpt" / "model.safetensors", "ab") as file:
        file.write(b"\0")
    message = refused(place, "slice", "ckpt", "--size", "8", "-o", "out")
    assert_says(message, "model.safetensors", "SHA-256", "Copy it again")


def test_nan_weights_are_warned_of(place):
    code = MODEL + "\nmodel.second.weight.data[0, 0] = float('nan')\n"
    words = ["convert", written(place, code), *SIZES, "-o", "out", "--quiet"]
    result = CliRunner().invoke(app(), words)
    assert result.exit_code == 0
    assert_says(result.stderr, "warning: ", "NaN", "second.weight", "Check the training run")


@pytest.mark.parametrize("body", ["return x * 2", "return torch.relu(x).sum()"])
def test_a_model_without_parameters(place, body):
    code = (
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n"
        f"    def forward(self, x):\n        {body}\n"
        "model, example_inputs = Net(), torch.randn(2, 6)\n"
    )
    message = refused(place, "convert", written(place, code), *SIZES, "-o", "out")
    assert_says(message, "has no parameters", "give a model with weights")


def test_a_model_without_any_width(place):
    code = "import torch\nmodel, example_inputs = torch.nn.Linear(6, 5), torch.randn(2, 6)\n"
    message = refused(place, "convert", written(place, code), *SIZES, "-o", "out")
    assert_says(message, "no axis of the model is a width", "classes", "input", "Try")


def test_weights_that_do_not_fit(place):
    assert_says(
        refused(place, "convert", "model.py", *SIZES, "-o", "out", "--weights", "none.safetensors"),
        "none.safetensors was given", "no such file", "Check the path",
    )  # fmt: skip
    torch.save({"a": torch.ones(1)}, place / "w.pt")
    assert_says(
        refused(place, "convert", "model.py", *SIZES, "-o", "out", "--weights", "w.pt"),
        "w.pt", "pickle", "Convert it to safetensors",
    )  # fmt: skip
    state = mk.load(place / "ckpt").state_dict()
    safetensors.torch.save_file({"first.weight": torch.ones(3, 3)}, place / "few.safetensors")
    assert_says(
        refused(place, "convert", "model.py", *SIZES, "-o", "out", "--weights", "few.safetensors"),
        "it lacks", "first.bias", "expected exactly the names", "Give the weights",
    )  # fmt: skip
    state["first.weight"] = torch.ones(3, 3)
    safetensors.torch.save_file(state, place / "odd.safetensors")
    assert_says(
        refused(place, "convert", "model.py", *SIZES, "-o", "out", "--weights", "odd.safetensors"),
        "first.weight of shape (3, 3)", "expects (32, 6)", "Give the weights",
    )  # fmt: skip


def test_a_device_that_is_not_here(place):
    message = refused(place, "info", "ckpt", "--device", "toaster")
    assert_says(message, "'toaster' was given", "expected a device", "cpu")


def test_an_export_to_nowhere(place):
    message = refused(place, "export", "ckpt", "--to", "gguf")
    assert_says(message, "'gguf' was given", "expected one of onnx, onnx-fp16, onnx-int8, pt2")


def test_an_import_that_is_none(place):
    message = refused(place, "verify", "ckpt", "--import", "no_such_module")
    assert_says(message, "--import no_such_module was given", "expected a module", "install")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("timm:vit_tiny_patch16_225", ("knows no such model", "Close to it: vit_tiny_patch16_224")),
        ("open_clip:ViT-B-33", ("knows no such model", "Close to it: ViT-B-32")),
    ],
)
def test_names_of_libraries_that_are_none(place, spec, parts):
    pytest.importorskip(spec.partition(":")[0])
    message = refused(place, "convert", spec, *SIZES, "-o", "out")
    assert_says(message, f"{spec} was given", "expected one of", *parts)


def test_a_transformers_folder_of_pickles(place):
    pytest.importorskip("transformers")
    (place / "hf").mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8,
              "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16,
              "vocab_size": 20}  # fmt: skip
    (place / "hf" / "config.json").write_text(json.dumps(config))
    torch.save({}, place / "hf" / "pytorch_model.bin")
    message = refused(place, "convert", "hf", "--sizes", "0.5,1", "-o", "out")
    assert_says(
        message, "pytorch_model.bin is a pickle", "Expected", "safetensors", "Save the model"
    )


def test_debug_shows_the_traceback(place):
    result = CliRunner().invoke(app(), ["verify", "nowhere", "--debug"])
    assert result.exit_code != 0
    assert isinstance(result.exception, mk.MatryoshkafyError)


def test_a_usage_error_is_code_2(place):
    assert CliRunner().invoke(app(), ["convert", "model.py"]).exit_code == ERROR
    assert CliRunner().invoke(app(), ["fly"]).exit_code == ERROR
