"""Trackers get each epoch once, over stops and kills, and never decide how a training ends.

`wandb` is not installed here: a module of that name with its few functions stands in for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fusion.all_embeddings import train
from fusion.training import saver
from tests.conftest import SMALL, run_command

Lines = list[dict[str, Any]]

PROBE = """
import json, os
class Probe:
    def write(self, **what):
        with open(os.environ["PROBE"], "a") as file:
            file.write(json.dumps(what) + "\\n")
    def start(self, run_id, config, folder):
        self.write(call="start", run_id=run_id, role=config["sources.clip_image"], folder=folder)
    def epoch(self, number, metrics):
        if os.environ.get("PROBE_FAILS") == str(number):
            raise RuntimeError("no\\nconnection")
        self.write(call="epoch", number=number, **metrics)
    def end(self, state, summary, report):
        self.write(call="end", state=state, report=report, **summary)
def make():
    return Probe()
def broken():
    raise OSError("no such file")
def empty():
    return object()
"""


def flags(catalog: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "3", *more]


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the calls of the tracker `probing:make`."""
    (tmp_path / "probing.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "probing", raising=False)
    monkeypatch.setenv("PROBE", str(tmp_path / "calls.jsonl"))
    return tmp_path / "calls.jsonl"


def calls(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Sends a stop request when the ranks first agree whether to stop at this step or a later one."""
    original = saver.Saver.agree

    def agree(self: saver.Saver, **options: bool) -> None:
        if self.fit.step >= step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, **options)

    patch.setattr(saver.Saver, "agree", agree)


def test_a_tracker_of_ones_own_follows_a_run_over_a_stop(catalog: Path, tmp_path: Path, probe: Path) -> None:
    command = flags(catalog, tmp_path / "out", "--tracker", "probing:make")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 16)
        assert train.main(command) == 75
    stopped = calls(probe)
    assert train.main(command) == 0
    resumed = calls(probe)[len(stopped) :]
    assert [one["call"] for one in stopped] == ["start", "epoch", "epoch", "end"]
    assert [one.get("number") for one in resumed] == [None, 1, 2, 3, None]
    assert stopped[0] == resumed[0] and stopped[0]["run_id"] == "r" and stopped[0]["role"] == "clip_image"
    same = ("number", "loss", "smape", "lr", "step")
    assert [[one[key] for key in same] for one in stopped[1:3]] == [[one[key] for key in same] for one in resumed[1:3]]
    assert stopped[-1]["state"] == "stopped" and resumed[-1]["state"] == "finished"
    assert resumed[-1]["smape"] == resumed[3]["smape"] and resumed[-1]["median_price_smape"] > 0
    assert resumed[-1]["report"] == f"{tmp_path}/out/runs/r/report.html"


def test_the_result_and_the_run_id_are_those_without_a_tracker(catalog: Path, tmp_path: Path, probe: Path) -> None:
    command = [word for word in flags(catalog, tmp_path / "out") if word not in ("--run-id", "r")]
    assert train.main([*command, "--tracker", "probing:make", "--tensorboard"]) == 0
    assert train.main(command) == 0
    assert len(list((tmp_path / "out/runs").iterdir())) == 1
    assert sum(one["call"] == "start" for one in calls(probe)) == 1


def test_a_finished_run_is_reported_again(catalog: Path, tmp_path: Path, probe: Path) -> None:
    """An attempt may have been killed after its last checkpoint, before its trackers had all."""
    assert train.main(flags(catalog, tmp_path / "out")) == 0
    assert train.main(flags(catalog, tmp_path / "out", "--tracker", "probing:make")) == 0
    found = calls(probe)
    assert [one["call"] for one in found] == ["start", "epoch", "epoch", "epoch", "end"]
    assert found[-1]["state"] == "finished" and found[-1]["smape"] == found[-2]["smape"]


def test_a_failing_tracker_warns_once(
    catalog: Path, tmp_path: Path, probe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROBE_FAILS", "2")
    assert train.main(flags(catalog, tmp_path / "out", "--tracker", "probing:make")) == 0
    said = capsys.readouterr().err
    assert said.count("event=tracker_failed") == 1
    assert 'tracker=probing:make call=epoch reason="RuntimeError: no connection"' in said
    assert [one["call"] for one in calls(probe)] == ["start", "epoch"]


def test_a_hanging_tracker_does_not_delay_a_training(
    catalog: Path, tmp_path: Path, probe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import probing  # type: ignore[import-not-found]

    from fusion.tracking import follow

    released = threading.Event()
    monkeypatch.setattr(probing.Probe, "start", lambda *_: released.wait(60))
    monkeypatch.setattr(probing.Probe, "epoch", lambda *_: None)
    monkeypatch.setattr(probing.Probe, "end", lambda *_: None)
    monkeypatch.setitem(follow.PATIENCE, "finished", 0.1)
    monkeypatch.setattr(follow, "SLOW_SECONDS", 0.0)
    started = time.monotonic()
    assert train.main(flags(catalog, tmp_path / "out", "--tracker", "probing:make")) == 0
    said = capsys.readouterr().err
    released.set()
    assert time.monotonic() - started < 30
    assert "event=tracker_slow" in said and "event=tracker_not_done tracker=probing:make" in said


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        ("probing:broken", "--tracker probing:broken made no tracker: OSError: no such file"),
        ("probing:nothing", "--tracker probing:nothing made no tracker: AttributeError"),
        ("no_such_module:make", "--tracker no_such_module:make made no tracker: ModuleNotFoundError"),
        ("probing:empty", "--tracker probing:empty made a object without start, epoch, end"),
        ("wandb", "--tracker wandb needs the package wandb, which is not installed"),
        ("comet", "expected mlflow, wandb, or a function such as"),
    ],
)
def test_a_tracker_that_does_not_exist_is_an_error(
    catalog: Path, tmp_path: Path, probe: Path, capsys: pytest.CaptureFixture[str], tracker: str, expected: str
) -> None:
    assert train.main(flags(catalog, tmp_path / "out", "--tracker", tracker)) == 78
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert expected in error and hint.startswith("hint: ")


def test_two_ranks_have_one_tracker(catalog: Path, tmp_path: Path, probe: Path) -> None:
    env = {"PROBE": str(probe), "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = flags(catalog, tmp_path / "out", "--tracker", "probing:make")
    done = run_command("fusion.all_embeddings.train", *command, ranks=2, env=env)
    assert done.code == 0, done.err
    assert [one["call"] for one in calls(probe)] == ["start", "epoch", "epoch", "epoch", "end"]


WANDB = """
import json, os
class Run:
    def __init__(self, id, resume, **_):
        assert resume == "allow"
        self.path = os.path.join(os.environ["WANDB_DIR"], f"{id}.jsonl")
        steps = []
        if os.path.exists(self.path):
            with open(self.path) as file:
                steps = [json.loads(line)["_step"] for line in file]
        self.step = max(steps) + 1 if steps else 0
        self.summary = {}
    def log(self, metrics, step):
        assert step >= self.step, "wandb drops steps that do not ascend"
        self.step = step
        with open(self.path, "a") as file:
            file.write(json.dumps({**metrics, "_step": step}) + "\\n")
    def finish(self, exit_code):
        with open(self.path + ".end", "a") as file:
            file.write(json.dumps([exit_code, self.summary]) + "\\n")
def init(**settings):
    return Run(**settings)
"""


def test_weights_and_biases_gets_each_epoch_once_over_a_stop(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name, stops in (("straight", []), ("stopped", [16])):
        command = [*flags(catalog, tmp_path / name, "--tracker", "wandb"), "--run-id", name]
        for step in stops:
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, step)
                assert train.main(command) == 75
        assert train.main(command) == 0
    straight, stopped = calls(tmp_path / "straight.jsonl"), calls(tmp_path / "stopped.jsonl")
    assert [one["_step"] for one in straight] == [1, 2, 3] == [one["_step"] for one in stopped]
    assert [one["smape"] for one in straight] == [one["smape"] for one in stopped]
    ends = [json.loads(line) for line in (tmp_path / "stopped.jsonl.end").read_text().splitlines()]
    assert [code for code, _ in ends] == [1, 0] and ends[1][1]["final_smape"] == straight[-1]["smape"]


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "mlruns"


@pytest.mark.filterwarnings("ignore")  # MLflow's own, of its file store
def test_mlflow_gets_each_epoch_once_over_a_stop(catalog: Path, tmp_path: Path, mlflow_store: Path) -> None:
    mlflow = import_module("mlflow.tracking")  # here, because it takes seconds
    for name, stops in (("straight", []), ("stopped", [8, 16])):
        command = [*flags(catalog, tmp_path / name, "--tracker", "mlflow"), "--run-id", name]
        for step in stops:
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, step)
                assert train.main(command) == 75
        assert train.main(command) == 0
        assert train.main(command) == 0, "a finished run changes nothing"
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("fusion").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["stopped", "straight"]
    found = {}
    for run in runs:
        assert run.info.status == "FINISHED" and run.data.params["epochs"] == "3"
        assert run.data.tags["fusion.report"].endswith("/report.html")
        history = client.get_metric_history(run.info.run_id, "smape")
        found[run.info.run_name] = [(metric.step, metric.value) for metric in history]
        assert [one.value for one in client.get_metric_history(run.info.run_id, "final_smape")] == [history[-1].value]
    assert [step for step, _ in found["straight"]] == [1, 2, 3]
    assert found["straight"] == found["stopped"]
