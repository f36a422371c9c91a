"""`fusion.train` makes the run that the command makes, from files or from data in memory."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pytest
import torch
import torch.distributed as dist

import fusion
from fusion import storage
from fusion.config import RunConfig
from fusion.errors import ConfigError, DataError, StopRequested
from fusion.qwen_clip import evaluate_by_groups
from fusion.qwen_clip import train as command
from fusion.qwen_clip.config import Config, Sources
from fusion.training.trainer import Fit
from tests.test_third_variant import FILES

ROLES = ("clip_image", "qwen_text")
SHAPE = {"width": 16, "hidden": (16, 8), "batch_size": 64, "lr": 0.01, "device": "cpu", "epochs": 2}


def frame_of(catalog: Path) -> pd.DataFrame:
    return pd.read_csv(catalog / "train.csv")


def sources_of(catalog: Path) -> dict[str, Any]:
    return {role: pd.read_parquet(catalog / f"embeddings/train/{role}.parquet") for role in ROLES}


def config_of(folder: Path, **settings: Any) -> RunConfig:
    where = {"data": str(folder / "data"), "output": str(folder / "out"), "run_id": "one"}
    return fusion.make_config("qwen_clip", **{**where, **SHAPE, **settings})


def weights_of(model: fusion.Model) -> bytes:
    return (Path(model.url) / "checkpoints" / model.checkpoint / "model.safetensors").read_bytes()


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path): (stat.st_mtime_ns, path.read_bytes()) for path, stat in found.items()}


@pytest.fixture(scope="module")
def trained(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that the command trains from the files of the catalog."""
    config = config_of(tmp_path_factory.mktemp("command"), data=str(catalog))
    flags = ["--width", "16", "--hidden", "16", "8", "--batch-size", "64", "--lr", "0.01", "--epochs", "2"]
    where = ["--data", config.data, "--output", config.output, "--run-id", "one", "--device", "cpu"]
    assert command.main([*where, *flags]) == 0
    return weights_of(fusion.load(config.output, device="cpu"))


def test_files_give_the_run_of_the_command(trained: bytes, catalog: Path, tmp_path: Path) -> None:
    assert weights_of(fusion.train(config_of(tmp_path, data=str(catalog)), quiet=True)) == trained


def test_data_in_memory_give_the_run_of_the_command(trained: bytes, catalog: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    model = fusion.train(config, frame_of(catalog), sources_of(catalog), quiet=True)
    assert weights_of(model) == trained
    # The data and the run can be used by commands, and without the frame.
    again = fusion.train(config_of(tmp_path, run_id="two"), quiet=True)
    assert weights_of(again) == trained
    assert evaluate_by_groups.main(["--output", config.output, "--run-id", "one", "--device", "cpu"]) == 0


def test_the_same_call_does_nothing_again(catalog: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = fusion.train(config_of(tmp_path), frame_of(catalog), sources_of(catalog), quiet=True)
    before = files_below(tmp_path)
    second = fusion.train(config_of(tmp_path), frame_of(catalog), sources_of(catalog))
    assert files_below(tmp_path) == before and weights_of(first) == weights_of(second)
    shown = capfd.readouterr()
    assert "event=finished_before" in shown.err and shown.out == ""


def test_files_of_a_data_folder_are_recognised(trained: bytes, catalog: Path, tmp_path: Path) -> None:
    """Those that commands use are CSV, in another order, and have ids as numbers."""
    before = files_below(catalog)
    frame = polars.from_pandas(frame_of(catalog).sample(frac=1, random_state=0))
    model = fusion.train(config_of(tmp_path, data=str(catalog)), frame, sources_of(catalog), quiet=True)
    assert files_below(catalog) == before and weights_of(model) == trained


def _one_vector_changed(sources: dict[str, Any]) -> dict[str, Any]:
    vectors = sources["clip_image"]["embedding"].copy()
    vectors.iloc[5] = vectors.iloc[5] + np.float16(1)
    return {**sources, "clip_image": sources["clip_image"].assign(embedding=vectors)}


Change = Callable[[pd.DataFrame, dict[str, Any]], tuple[pd.DataFrame, dict[str, Any]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame, sources: (frame.assign(price=frame["price"] + 1), sources), "503 prices are not the same"),
        (lambda frame, sources: (frame.tail(500), sources), "503 and 500 rows, of which 500 have the same sample_id"),
        (lambda frame, sources: (frame.assign(category="x"), sources), "the values of the column 'category'"),
        (lambda frame, sources: (frame.assign(more=1), sources), "only one of them has the column 'more'"),
        (lambda frame, sources: (frame, _one_vector_changed(sources)), "source 'clip_image' in .* has other vectors"),
    ],
)
def test_other_data_are_never_overwritten(change: Change, message: str, catalog: Path, tmp_path: Path) -> None:
    fusion.train(config_of(tmp_path), frame_of(catalog), sources_of(catalog), quiet=True)
    before = files_below(tmp_path)
    with pytest.raises(DataError, match=rf"{message}(.|\n)*hint: write to another folder, such as data='.*/data-2'"):
        fusion.train(config_of(tmp_path), *change(frame_of(catalog), sources_of(catalog)), quiet=True)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame, sources: (frame, {"clip_image": sources["clip_image"]}), "sources lacks qwen_text"),
        (lambda frame, sources: (frame, {**sources, "qwen": 1}), "'qwen' is not a role of qwen_clip\nhint: did you"),
        (lambda frame, sources: (frame, [1]), "sources is a list, expected"),
        (lambda frame, sources: (frame.drop(columns="price"), sources), "the frame has no column 'price'"),
        (lambda frame, sources: (frame.assign(price=-1.0), sources), "503 of 503 rows of the frame have no price"),
    ],
)
def test_wrong_data_are_named_and_not_written(change: Change, message: str, catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        fusion.train(config_of(tmp_path), *change(frame_of(catalog), sources_of(catalog)), quiet=True)
    assert not files_below(tmp_path)


def test_source_names_are_those_of_the_settings(catalog: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, sources={"clip_image": "cnn"})
    fusion.train(config, frame_of(catalog), sources_of(catalog), quiet=True)
    assert {path.name for path in (tmp_path / "data/embeddings/train").iterdir()} == {
        "cnn.parquet",
        "qwen_text.parquet",
    }
    assert Config(sources=Sources(clip_image="cnn")).bindings() == config.bindings()


def test_roles_with_one_source_are_refused(catalog: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, sources={"clip_image": "cnn", "qwen_text": "cnn"})
    with pytest.raises(ConfigError, match="several roles are bound to the source 'cnn'"):
        fusion.train(config, frame_of(catalog), sources_of(catalog), quiet=True)
    assert not files_below(tmp_path)


def test_rows_without_a_price_can_be_dropped(catalog: Path, tmp_path: Path) -> None:
    frame = frame_of(catalog)
    frame.loc[:2, "price"] = np.nan
    config = config_of(tmp_path, drop_bad_prices=True, epochs=1)
    first = fusion.train(config, frame, sources_of(catalog), quiet=True)
    assert weights_of(fusion.train(config, frame, sources_of(catalog), quiet=True)) == weights_of(first)


def test_each_run_keeps_its_own_log(catalog: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        fusion.train(config_of(tmp_path, data=str(catalog), run_id=name, epochs=1))
        kept = (tmp_path / f"out/runs/{name}/attempts/1/log.txt").read_text()
        assert kept.count("event=start ") == 1 and f"run={name} " in kept
    shown = capfd.readouterr()
    assert shown.out == "" and "run=second rank=0/1 epoch=1" in shown.err
    assert not dist.is_initialized()


def test_nothing_is_printed_on_a_terminal(
    catalog: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    fusion.train(config_of(tmp_path, data=str(catalog), epochs=1), quiet=True)
    assert capfd.readouterr().out == ""


def test_random_generators_are_left_as_they_were(catalog: Path, tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), np.random.random(), float(torch.rand(()))]

    fusion.set_seed(7)
    expected = drawn()
    fusion.set_seed(7)
    fusion.train(config_of(tmp_path, data=str(catalog), epochs=1), quiet=True)
    assert drawn() == expected


def interrupts_at(step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends SIGINT, as Ctrl-C and "interrupt the kernel" do, before a step of the next training."""
    share, left = Fit.share_loss, [times]

    def share_and_interrupt(self: Fit, *flags: float) -> Any:
        if self.step == step and left[0]:
            for _ in range(left[0]):
                left[0] -= 1
                os.kill(os.getpid(), signal.SIGINT)
        return share(self, *flags)

    monkeypatch.setattr(Fit, "share_loss", share_and_interrupt)


@pytest.mark.parametrize(("times", "error"), [(1, StopRequested), (2, KeyboardInterrupt)])
def test_the_same_call_continues_after_an_interrupt(
    times: int,
    error: type[BaseException],
    trained: bytes,
    catalog: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(tmp_path, checkpoint_steps=2)
    before = signal.getsignal(signal.SIGINT)
    interrupts_at(4, times, monkeypatch)
    with pytest.raises(error):
        fusion.train(config, frame_of(catalog), sources_of(catalog), quiet=True)
    assert not dist.is_initialized() and signal.getsignal(signal.SIGINT) is before
    model = fusion.train(config, frame_of(catalog), sources_of(catalog), quiet=True)
    assert weights_of(model) == trained
    assert (tmp_path / "out/runs/one/attempts/2/exit.json").exists()
    assert len(model.predict(frame_of(catalog), sources_of(catalog))) == 503  # the stop request is forgotten


def test_a_thread_may_train(trained: bytes, catalog: Path, tmp_path: Path) -> None:
    models: list[fusion.Model] = []
    config = config_of(tmp_path, data=str(catalog))
    thread = threading.Thread(target=lambda: models.append(fusion.train(config, quiet=True)))
    thread.start()
    thread.join()
    assert [weights_of(model) for model in models] == [trained]


def test_a_variant_of_ones_own_is_trained(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text_only").mkdir()
    for name in ("__init__.py", "config.py", "model.py"):
        (tmp_path / "text_only" / name).write_text(FILES[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    from text_only.config import Config as OwnConfig  # type: ignore[import-not-found]

    config = OwnConfig(data=str(catalog), output=str(tmp_path / "out"), device="cpu", epochs=1)
    model = fusion.train(config, quiet=True)
    assert model.variant == "text_only" and model.sources == {"qwen_text": 14}
    assert fusion.load(tmp_path / "out", OwnConfig, device="cpu").run_id == model.run_id
    del sys.modules["text_only"]


def test_wrong_arguments_are_named(catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config is a str, expected settings\nhint: .*fusion.make_config"):
        fusion.train("all_embeddings")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="table is given without sources"):
        fusion.train(config_of(tmp_path), frame_of(catalog))
    with pytest.raises(ConfigError, match="sources is given without table"):
        fusion.train(config_of(tmp_path), sources=sources_of(catalog))
    with pytest.raises(ConfigError, match="has no module `model` beside it"):
        fusion.train(RunConfig())


def test_several_ranks_read_files(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="data in memory cannot be given to several ranks"):
        fusion.train(config_of(tmp_path), frame_of(catalog), sources_of(catalog), quiet=True)


def test_a_foreign_process_group_is_named(catalog: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="is in a process group of torch"):
            fusion.train(config_of(tmp_path, data=str(catalog)), quiet=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "'epoch' is not a setting of fusion.qwen_clip.config\nhint: did you mean epochs"),
        ({"epochs": 0}, "epochs is 0: input should be greater than or equal to 1\nhint: give epochs an allowed value"),
        ({"warmup": 0.1, "schedule": "plateau"}, "warmup has no effect with schedule plateau"),
        ({"folds": 2, "fold": 2}, r"fold is 2, expected one of 0..1 for folds 2\nhint: change fold or folds"),
        ({"sources": {"clip": "cnn"}}, "sources.clip"),
    ],
)
def test_wrong_settings_are_named_as_keywords(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fusion.make_config("qwen_clip", **settings)
    with pytest.raises(ConfigError, match=r"there is no variant 'qwen'\nhint: did you mean qwen_clip\? use one of"):
        fusion.make_config("qwen")


def test_settings_may_be_made_either_way() -> None:
    assert fusion.make_config("qwen_clip", epochs=3, output="o") == Config(epochs=3, output="o")


def test_data_in_memory_are_written_to_a_bucket(bucket: str, trained: bytes, catalog: Path) -> None:
    config = fusion.make_config("qwen_clip", **SHAPE, data=f"{bucket}/data", output=f"{bucket}/out", run_id="one")
    for _ in range(2):
        model = fusion.train(config, frame_of(catalog), sources_of(catalog), quiet=True)
        assert storage.read(f"{model.url}/checkpoints/{model.checkpoint}/model.safetensors") == trained
    with pytest.raises(DataError, match="prices are not the same"):
        fusion.train(config, frame_of(catalog).assign(price=1.0), sources_of(catalog), quiet=True)
