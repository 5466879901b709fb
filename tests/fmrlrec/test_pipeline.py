"""The whole run on a small shop: files, tables, slices that score as the doll does, resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import matryoshkafy as mk
from examples.fmrlrec import pipeline, synthetic
from examples.fmrlrec.__main__ import app, configure
from examples.fmrlrec.config import Config, DataError, RunError, preset, replace
from examples.fmrlrec.data import left_pad
from examples.fmrlrec.pipeline import comparison
from examples.fmrlrec.reporting import write_table
from examples.fmrlrec.serving import recommending

SETTINGS = ["epochs=2", "encoder_size=8", "batch=32", "min_count=3", "seed=3"]
WORDS = [word for pair in SETTINGS for word in ("--set", pair)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    shop = synthetic.generate(root / "shop", synthetic.Shop(items=120, users=150, mean_length=8))
    (shop / "images" / "3.jpg").unlink()
    for number in range(4, 14):
        (shop / "images" / f"{number}.jpg").write_bytes(b"no picture")
    words = ["run", "--data", str(shop), "--run", str(root / "out"), "--preset", "synthetic"]
    done = CliRunner().invoke(app, [*words, "--sizes", "4..16", *WORDS])
    assert done.exit_code == 0, (done.output, done.exception)
    return root / "out"


@pytest.fixture(scope="module")
def opened(folder: Path) -> pipeline.Run:
    return pipeline.open_run(folder, Config.from_json((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def found(opened: pipeline.Run) -> pipeline.Material:
    return pipeline.materials(opened)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_everything_lies_in_the_run_folder(folder: Path) -> None:
    for name in ("data", "nested", "slices", "ablation"):
        assert (folder / "tables" / f"{name}.csv").exists()
    drawing = (folder / "plots" / "sizes.svg").read_text()
    assert all(f">{name}</text>" in drawing for name in ("both", "text", "image", "popularity"))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 3 and environment["packages"]["torch"]
    assert {path.name for path in (folder / "slices").iterdir()} == {"4", "8", "16"}


def test_sliced_files_get_the_metrics_of_the_doll(folder: Path) -> None:
    nested = {(row["size"], row["ranked"]): row for row in rows(folder / "tables" / "nested.csv")}
    sliced = rows(folder / "tables" / "slices.csv")
    assert len(sliced) == 6
    for row in sliced:
        for name, value in nested[row["size"], row["ranked"]].items():
            if name not in ("size", "ranked"):
                assert float(row[name]) == pytest.approx(float(value), abs=1e-6)


def test_a_slice_is_a_file_of_its_own(folder: Path, found: pipeline.Material) -> None:
    sequence = torch.from_numpy(left_pad([found.data.sequence(0)], 9))
    small = mk.load(folder / "slices" / "8").eval()
    streamed = mk.load(folder / "checkpoint", size=8).eval()
    assert torch.equal(small(sequence), streamed(sequence))
    files = list((folder / "slices" / "8").glob("*.safetensors"))
    weights = {name: t for path in files for name, t in load_file(path).items()}
    assert weights["items.project.weight"].shape[0] == 8


def test_problems_are_told(opened: pipeline.Run, capsys) -> None:
    pipeline.materials(opened)
    told = capsys.readouterr().out
    assert "note: items without picture: 1" in told
    assert told.count("note: corrupt picture") > 3


def test_a_finished_run_is_not_trained_again(opened: pipeline.Run) -> None:
    before = (opened.folder / "nested" / "state" / "run.json").read_bytes()
    pipeline.train_nested(opened)
    assert (opened.folder / "nested" / "state" / "run.json").read_bytes() == before


def test_other_settings_need_another_folder(opened: pipeline.Run) -> None:
    with pytest.raises(RunError, match=r"lr=0.5 \(there: 0.002\); use another --run"):
        pipeline.open_run(opened.folder, replace(opened.config, {"lr": 0.5}))
    assert pipeline.open_run(opened.folder, replace(opened.config, {"epochs": 2}))


def test_recommendations_are_new_items_by_title(opened: pipeline.Run, found) -> None:
    user = str(found.data.user_ids[5])
    history = recommending.history_of(found, user)
    doll = pipeline.trained_doll(opened, found)
    table = recommending.recommend(doll, found, history, count=5)
    assert table.columns == ["rank", "size 4", "size 8", "size 16"] and len(table) == 5
    titles = found.data.catalogue["title"].to_list()
    had = {titles[i - 1] for i in history}
    assert all(set(table[size]) <= set(titles) - had for size in table.columns[1:])
    every = recommending.recommend(doll, found, history, count=1000)
    assert len(every) == len(titles) - len(set(history.tolist())), "no padding, nothing twice"


def test_sequences_name_their_unknown_items(found) -> None:
    first = str(found.data.catalogue["item_id"][0])
    assert recommending.history_from(found, [first]).tolist() == [1]
    with pytest.raises(DataError, match="no item 99999"):
        recommending.history_from(found, [first, "99999"])
    with pytest.raises(DataError, match="no user '99999'"):
        recommending.history_of(found, "99999")


def test_recommend_on_the_command_line(folder: Path, found) -> None:
    item = str(found.data.catalogue["item_id"][7])
    done = CliRunner().invoke(app, ["recommend", item, "--run", str(folder), "--count", "3"])
    assert done.exit_code == 0 and "size 16" in done.output
    assert "interactions" not in done.output, "the table of the data belongs to prepare"


def test_commands_and_flags_are_frozen() -> None:
    import typer

    command = typer.main.get_command(app)
    flags = {
        name: sorted(o for p in sub.params for o in (*p.opts, *p.secondary_opts))
        for name, sub in command.commands.items()  # type: ignore[attr-defined]
    }
    common = ["--data", "--preset", "--run", "--set", "--sizes"]
    assert flags == {
        "prepare": common, "encode": common, "train": common, "run": common,
        "evaluate": ["--run"], "ablate": ["--modality", "--run"], "compare": ["--run", "--size"],
        "recommend": ["--count", "--new", "--run", "--user", "items"],
        "export-items": ["--out", "--run", "--size", "-o"],
        "serve": ["--host", "--index", "--port", "--run", "--size"],
    }  # fmt: skip


def test_the_run_folder_remembers_its_settings(opened: pipeline.Run) -> None:
    assert configure(opened.folder, None, None, None, None) == opened.config
    fresh = configure(opened.folder / "none", None, "paper", "8..32", ["lr=0.1"])
    assert fresh == replace(preset("paper"), {"sizes": "8..32", "lr": 0.1})


def test_comparison_names_the_share() -> None:
    def table(value: float):
        return {"all": {"NDCG@10": value, "Recall@10": 2 * value}}

    found = comparison({"8": table(0.4), "16": table(0.1)}, {"8": table(0.5)})
    assert found.rows() == [(8, 0.4, 0.5, 80.0, 0.8, 1.0)]


def test_tables_are_csv_markdown_and_text(tmp_path: Path, capsys) -> None:
    table = pl.DataFrame({"size": [8, 16], "NDCG@10": [0.5, 0.25], "NDCG@5": [0.125, 0.1]})
    write_table(table, "A title", tmp_path / "found")
    assert pl.read_csv(tmp_path / "found.csv").equals(table)
    lines = (tmp_path / "found.md").read_text().splitlines()
    assert lines[0] == "# A title"
    assert [word.strip() for word in lines[4].split("|")][1:4] == ["8", "0.5000", "0.1250"]
    told = capsys.readouterr().out
    assert "A title" in told and "0.2500" in told and "NDCG@5" not in told


def test_the_readme_lists_every_file() -> None:
    home = Path(pipeline.__file__).parent
    listed = (home / "README.md").read_text().partition("## Files, in reading order")[2]
    names = {line.split()[0].rstrip("/") for line in listed.split("```")[1].strip().splitlines()}
    there = {path.name for path in home.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names == there - {"__init__.py", "__pycache__"}
