"""Which run a command uses, and the errors if it does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.config import ReadRunConfig
from fusion.errors import DataError
from fusion.qwen_clip.config import Config
from fusion.records.find_run import data_of, open_run
from tests.made_runs import make_run


def test_the_hint_for_an_unknown_id_names_the_most_similar(tmp_path: Path) -> None:
    make_run(str(tmp_path), "qwen-clip-b427c785")
    with pytest.raises(DataError) as caught:
        open_run(ReadRunConfig(output=str(tmp_path), run_id="qwen-clip-b427c758"), Config)
    assert caught.value.message == f"no run qwen-clip-b427c758 under {tmp_path}"
    listing = f"`python jobs/pull.py runs --output {tmp_path}` lists what is there"
    assert caught.value.remedy == f"did you mean qwen-clip-b427c785? {listing}"


def test_no_run_in_the_output(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run old under"):
        open_run(ReadRunConfig(output=str(tmp_path), run_id="old"), Config)


def test_data_in_a_folder_that_does_not_exist_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_of(ReadRunConfig(), "data") == "data"
    assert data_of(ReadRunConfig(), "s3://bucket/data") == "s3://bucket/data"
    monkeypatch.chdir("data")
    assert data_of(ReadRunConfig(data="x"), "data") == "x"
    with pytest.raises(DataError, match="from the folder data, as seen from where its training was started") as caught:
        data_of(ReadRunConfig(), "data")
    assert caught.value.remedy == "name the folder with --data"
    with pytest.raises(DataError, match="from the folder /nowhere, which does not exist here"):
        data_of(ReadRunConfig(), "/nowhere")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/config.json does not exist"):
        open_run(ReadRunConfig(run_dir=str(tmp_path)), Config)
