"""An ensemble is loaded like a run, and gives the prices of the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fusion
from fusion.all_embeddings import train as train_all
from fusion.compare.standard_errors import Estimate
from fusion.ensemble import __main__ as ensemble
from fusion.ensemble import predict_test
from fusion.errors import ConfigError, DataError
from fusion.qwen_clip import train as train_two
from tests.api.test_model import arrays_of, assert_equal, files_of, frame_of, published
from tests.conftest import SMALL

BEST = ["--components", "8", "--neighbours", "16"]


@pytest.fixture(scope="module")
def output(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two variants, one of which computes sources from texts, and its submission."""
    folder = tmp_path_factory.mktemp("ensemble")
    where = ["--data", str(catalog), "--output", str(folder), "--epochs", "2", "--folds", "2", *SMALL, *BEST]
    assert train_two.main([*where, "--run-id", "two", "--features", "text"]) == 0
    assert train_all.main([*where, "--run-id", "all"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimate, "is_significant", False)  # forces equal weights; fitted ones may be 0
        assert ensemble.main(["two", "all", "--output", str(folder), "--run-id", "mix"]) == 0
    assert predict_test.main(["--output", str(folder), "--device", "cpu", "--name", "mix"]) == 0
    return folder


def test_prices_are_those_of_the_command(output: Path, catalog: Path) -> None:
    for model in (
        fusion.load(output, "ensemble", device="cpu"),
        fusion.load(output, run="mix", device="cpu"),
        fusion.load(output / "runs" / "mix", device="cpu"),
    ):
        assert model.columns == ["catalog_content"]
        assert_equal(model.predict(frame_of(catalog), files_of(catalog, model.sources)), published(output, "mix"))
        assert_equal(model.predict(frame_of(catalog), arrays_of(catalog, model.sources)), published(output, "mix"))


def test_the_only_thing_in_an_output_is_loaded(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "out")
    for variant in ("qwen_clip", "all_embeddings"):
        shutil.rmtree(tmp_path / "out/pointers/runs" / variant)
    assert fusion.load(tmp_path / "out", device="cpu").run_id == "mix"
    assert fusion.load(tmp_path / "out", run="latest", device="cpu").run_id == "mix"


def test_an_ensemble_knows_its_members(output: Path) -> None:
    model = fusion.load(output, "ensemble", device="cpu")
    assert (model.run_id, model.variant, model.members) == ("mix", "ensemble", {"two": 0.5, "all": 0.5})
    assert model.sources == {"clip_image": 12, "qwen_text": 14, "siglip_image": 10, "siglip_text": 8}
    assert model.metrics["count"] == len(model.validation) == 503
    assert "mix: SMAPE" in repr(model) and "two 50%" in model._repr_html_()
    assert fusion.load(output, "qwen_clip", device="cpu").members == {}


def test_what_only_its_members_have_is_named(output: Path, catalog: Path) -> None:
    model = fusion.load(output, "ensemble", device="cpu")
    hint = "an ensemble has no {} of its own, only its members have\nhint: load one: fusion.load.*run='two'"
    with pytest.raises(ConfigError, match=hint.format("settings")):
        model.config  # noqa: B018
    with pytest.raises(ConfigError, match=hint.format("history")):
        model.history  # noqa: B018
    with pytest.raises(ConfigError, match=hint.format("evaluation")):
        model.evaluate()
    with pytest.raises(DataError, match="has no column 'catalog_content', which the model was trained with"):
        model.predict(frame_of(catalog)[["sample_id"]], arrays_of(catalog, model.sources))
    with pytest.raises(DataError, match="no ensemble under"):
        fusion.load(output / "runs", "ensemble")
