"""A shop of one's own: it runs at once at any ladder, and changed files are noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from examples.fmrlrec import pipeline, synthetic
from examples.fmrlrec.__main__ import app
from examples.fmrlrec.config import Config

FEW = ["--set", "epochs=1", "--set", "encoder_size=8"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "shop"
    return synthetic.generate(folder, synthetic.Shop(items=60, users=150, mean_length=7))


def called(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    return str(done.exception)


def test_a_small_shop_trains_at_any_ladder_without_settings(shop: Path, tmp_path: Path) -> None:
    told = called("train", "--data", str(shop), "--run", str(tmp_path), "--sizes", "3,7,20", *FEW)
    assert "150 users" in told and "texts and pictures\nSettings chosen" in told
    assert {p.name for p in (tmp_path / "slices").iterdir()} == {"3", "7", "20"}
    config = Config.from_json((tmp_path / "config.json").read_text())
    assert (config.modality, config.min_count, config.sizes) == ("both", 1, "3,7,20")


@pytest.fixture(scope="module")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    called("train", "--data", str(shop), "--run", str(run), "--sizes", "4..8", *FEW)
    return run


def test_a_new_item_is_recommended_without_training(shop: Path, trained: Path) -> None:
    items = pl.read_csv(shop / "items.csv")
    new = items.filter(pl.col("item_id") == 1).with_columns(
        item_id=pl.lit(999), title=pl.lit("Fresh " + str(items["title"][0])))  # fmt: skip
    path = shop.parent / "new.csv"
    image = pl.lit(str(shop / "images" / "1.jpg"))
    new.with_columns(image=image).write_csv(path)
    told = called("recommend", "2", "5", "--run", str(trained), "--new", str(path), "--count", "61")
    assert told.count("(new)") == 2, "once at each size"
    assert "no item" in refused("recommend", "999", "--run", str(trained))
    both = refused("recommend", "2", "--user", "3", "--run", str(trained))
    assert "not both" in both
    assert "not those of the run" in refused("compare", "--size", "5", "--run", str(trained))


def test_changed_files_are_said_and_prepared_again(
    shop: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pipeline.open_run(trained, Config.from_json((trained / "config.json").read_text()))
    before = pipeline.prepare(run)
    assert "changed" not in capsys.readouterr().out
    table = pl.read_csv(shop / "interactions.csv")
    table.head(table.height // 2).write_csv(shop / "interactions.csv")
    assert len(pipeline.prepared(run).data.items) == len(before.items), (
        "answers stay what they were"
    )
    assert "interactions.csv changed since" in capsys.readouterr().out
    after = pipeline.prepare(run)
    told = capsys.readouterr().out
    assert "interactions.csv changed since it was prepared; prepared again" in told
    assert len(after.items) < len(before.items)
    assert (trained / "before-1" / "nested" / "best.safetensors").exists()
    assert not (trained / "nested").exists(), "weights of other items must not be found"


def test_a_run_over_ids_in_the_folder_of_its_data(tmp_path: Path) -> None:
    """What a run writes there is none of the data, and its curve is called by what it is over."""
    (tmp_path / "seq.txt").write_text("".join(f"{u} 1 2 3 4 5\n" for u in range(9)), "utf-8")
    words = ["--data", str(tmp_path), "--run", str(tmp_path / "runs" / "own"), "--sizes", "3,5"]
    assert "items with ids" in called("run", *words, *FEW)
    drawing = (tmp_path / "runs" / "own" / "plots" / "sizes.svg").read_text()
    assert ">id</text>" in drawing and ">both</text>" not in drawing
    assert "changed" not in called("prepare", *words)


def test_a_table_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    rows = "user_id,item_id,timestamp\na,x,1\na,y,2,3,4\n"
    (tmp_path / "interactions.csv").write_text(rows)
    words = ["prepare", "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "examples.fmrlrec", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: a table cannot be read: found more" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "epoch=3"], "no setting 'epoch'"),
        (["--set", "weights=1,2,3"], "are no numbers by share of the width"),
        (["--set", "every=1:0.5"], "should be whole numbers of steps"),
        (["--sizes", "0.5,1.0"], "give units"),
        (["--set", "image_encoder=ViT-B-32"], "names no model"),
    ],
)
def test_a_wrong_setting_is_told_before_work_starts(
    words: list[str], message: str, shop: Path, tmp_path: Path
) -> None:
    ladder = [] if "--sizes" in words else ["--sizes", "4..8"]
    told = refused("run", "--data", str(shop), "--run", str(tmp_path / "run"), *ladder, *words)
    assert message in told
    assert not (tmp_path / "run" / "data" / "report.json").exists()


def test_missing_data_and_runs_are_named(tmp_path: Path) -> None:
    assert "no data at" in refused("run", "--data", str(tmp_path / "none"), "--run", str(tmp_path))
    assert "make one with `run`" in refused("evaluate", "--run", str(tmp_path / "empty"))
