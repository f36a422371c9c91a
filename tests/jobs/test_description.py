"""Which packages are variants, and which are installed: `pytest tests/jobs/test_description.py`."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

import fusion
from fusion.config import PredictConfig
from fusion.errors import UsageError
from fusion.jobs.schedulers.description import Job, config_class
from fusion.variants import variants

ROOT = Path(__file__).parents[2]
CONFIG = """
from fusion.config import RunConfig

class Config(RunConfig):
    pass
"""


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages are importable as packages of fusion during the test."""
    monkeypatch.setattr(fusion, "__path__", [*fusion.__path__, str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fusion.room")]:
        del sys.modules[name]


def package(folder: Path, name: str, **modules: str) -> None:
    (folder / name).mkdir()
    for module, text in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(text)


def test_a_package_without_a_config_is_not_a_variant(rooms: Path) -> None:
    heavy = "raise AssertionError('loaded')"
    package(rooms, "room_of_tools", __init__=heavy, model=heavy)
    package(rooms, "room_of_settings", config="Config = dict")
    package(rooms, "room_of_words", config="")
    assert variants() == ["all_embeddings", "qwen_clip"]
    with pytest.raises(UsageError, match="--variant is 'room_of_tools', expected one of all_embeddings, qwen_clip"):
        Job("room_of_tools", "train")


def test_a_package_with_settings_of_a_run_is_a_variant(rooms: Path) -> None:
    package(rooms, "room_of_texts", config=CONFIG)
    assert variants() == ["all_embeddings", "qwen_clip", "room_of_texts"]
    assert config_class("room_of_texts", "train").__module__ == "fusion.room_of_texts.config"


def test_an_ensemble_only_predicts() -> None:
    assert Job("ensemble", "predict").module == "fusion.ensemble.predict_test"
    assert config_class("ensemble", "predict") is PredictConfig
    for task in ("train", "evaluate"):
        with pytest.raises(UsageError, match="--variant is 'ensemble', expected one of all_embeddings, qwen_clip"):
            Job("ensemble", task)


def test_every_package_is_installed() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    shipped = find_packages(str(ROOT), include=found["include"])
    folders = {path.parent for path in (ROOT / "fusion").rglob("__init__.py")}
    assert set(shipped) == {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders}
