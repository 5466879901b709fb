"""Settings: types, names, presets and what the errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.fmrlrec import config
from examples.fmrlrec.config import ConfigError
from examples.fmrlrec.formats import Survey


def test_defaults_are_the_papers() -> None:
    found = config.Config()
    assert (found.sizes, found.blocks, found.dropout, found.lr) == ("8..1024", 2, 0.5, 1e-3)
    assert (found.batch, found.clip, found.warmup, found.patience) == (32, 5.0, 100, 10)
    assert (found.weight_decay, found.r_min, found.epochs, found.max_length) == (0.01, 0.0, 500, 50)


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_round_trip(name: str) -> None:
    found = config.preset(name)
    assert config.Config.from_json(found.model_dump_json()) == found


def test_texts_take_the_type_of_their_setting() -> None:
    pairs = config.parse_settings(["lr=0.01", "epochs=3", "alone=no", "sizes=8..64"])
    found = config.replace(config.Config(), pairs)
    assert (found.lr, found.epochs, found.alone, found.sizes) == (0.01, 3, False, "8..64")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("learning=1", "no setting 'learning'; the settings are data, sizes"),
        ("epochs=many", "epochs='many': Input should be a valid integer"),
        ("alone=perhaps", "Input should be a valid boolean"),
        ("norm=layer", "norm='layer': Input should be 'block' or 'prefix'"),
        ("epochs", "has no '='"),
        ("batch=0", "batch='0': Input should be greater than 0"),
        ("lr=nan", "lr='nan': Input should be a finite number"),
        ("dropout=1", "Input should be less than 1"),
        ("max_length=1", "Input should be greater than or equal to 2"),
    ],
)
def test_bad_settings_are_named(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.replace(config.Config(), config.parse_settings([pair]))


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match="the presets are paper, synthetic"):
        config.preset("big")


def test_texts_are_written_whole(tmp_path: Path) -> None:
    config.write_text(tmp_path / "a" / "b.txt", "one")
    config.write_text(tmp_path / "a" / "b.txt", "two")
    assert [p.read_text() for p in (tmp_path / "a").iterdir()] == ["two"]


@pytest.mark.parametrize("modality", config.MODALITIES)
def test_own_data_choose_by_size_and_modality(modality: str) -> None:
    def chosen(interactions: int, *, gpu: bool = False, minilm: bool = False) -> config.Config:
        found = Survey(150, 60, interactions, modality)
        return config.replace(config.Config(), config.own(found, gpu=gpu, minilm=minilm))

    assert {chosen(n).modality for n in (900, 900_000)} == {modality}
    assert chosen(900).modality == chosen(900_000, gpu=True).modality
    assert (chosen(900).sizes, chosen(900).min_count) == ("8..64", 1)
    assert chosen(900_000).min_count == 5
    assert chosen(900_000, gpu=True).sizes == "8..1024"
    assert chosen(900_000).text_encoder == "tfidf"


def test_a_survey_reads_as_a_sentence() -> None:
    found = str(Survey(150, 60, 900, "text"))
    assert found == "150 users, 60 items, 900 interactions; items with texts"
