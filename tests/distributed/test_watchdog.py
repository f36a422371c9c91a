from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fusion.all_embeddings import train
from fusion.data.row_store import RowStore
from fusion.distributed import watchdog
from fusion.distributed.world import join_world
from fusion.errors import ExitCode
from fusion.prediction import resumable
from tests.conftest import SMALL

SCRIPT = """
import threading, time
from fusion.command.exit import recorded_by
from fusion.distributed.watchdog import watched

def waits_for_ever():
    threading.Event().wait()

with recorded_by(lambda error: {record}), watched({timeout}, lambda: "rank 0 at step 7") as watchdog:
    for _ in range(6):
        time.sleep({pause})
        {beat}
    {end}
"""


def run(timeout: float, pause: float, beat: str, end: str, record: str = "None") -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(timeout=timeout, pause=pause, beat=beat, end=end, record=record)
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)


def test_no_progress_ends_with_124_and_the_stacks() -> None:
    done = run(2, 0, "watchdog.beat()", "waits_for_ever()", "print(error.message, flush=True)")
    assert done.returncode == ExitCode.STALLED
    assert "event=stalled" in done.stderr
    assert "in waits_for_ever" in done.stderr
    assert done.stdout == "rank 0 at step 7 made no progress for 2 s\n"
    assert "\nerror: rank 0 at step 7 made no progress for 2 s\nhint: see the stacks" in done.stderr


def test_a_record_that_cannot_be_written_is_not_waited_for() -> None:
    started = time.monotonic()
    assert run(2, 0, "watchdog.beat()", "waits_for_ever()", "time.sleep(1000)").returncode == ExitCode.STALLED
    assert 5 < time.monotonic() - started < 60  # and not the 1000 s


@pytest.mark.parametrize(("timeout", "beat"), [(3, "watchdog.beat()"), (0, "pass")], ids=["beating", "switched off"])
def test_a_rank_that_makes_progress_or_is_not_watched_continues(timeout: float, beat: str) -> None:
    assert run(timeout, 0.6, beat, "print('done')").stdout == "done\n"


@pytest.mark.parametrize("method", ["trainer.Fit._train_batch", "saver.Saver._finish"])
def test_a_rank_that_waits_for_another_is_ended(method: str) -> None:
    """The first batch of rank 0, or its last commit, never returns, like a collective operation whose peer is gone."""
    script = """
import sys, time
from fusion.training import trainer, saver
from fusion.all_embeddings import train
from fusion.distributed.world import join_world
from fusion.data.row_store import RowStore
from fusion.demo.catalog import generate
from pathlib import Path
import tempfile

{method} = lambda *_: time.sleep(1000)
folder = tempfile.mkdtemp()
roles = ("clip_image", "siglip_image", "siglip_text", "qwen_text")
generate(Path(folder), n_products=300, dims=dict.fromkeys(roles, 8))
small = "--width 16 --hidden 8 --device cpu --stall-timeout 3 --max-missing 0.2 --epochs 1".split()
sys.exit(train.main(["--data", folder, "--output", folder + "/out", *small]))
"""
    command = [sys.executable, "-c", script.replace("{method}", method)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=180)
    assert done.returncode == ExitCode.STALLED
    assert "<lambda>" in done.stderr


def test_a_suspended_process_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm, a container runtime or Ctrl-Z stops a process for an hour: its clock runs on, its work does not."""
    hour = iter([0.0, *[3600.0] * 1000])
    now, ended = time.monotonic, []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now() + next(hour))
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self: ended.append(self.idle))
    with watchdog.watched(2, lambda: "rank 0"):
        threading.Event().wait(0.7)
    assert ended == []


def test_every_step_and_every_chunk_of_validation_is_a_beat(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []
    monkeypatch.setattr(resumable, "CHUNK", 16)
    monkeypatch.setattr(watchdog.Watchdog, "beat", lambda self: beats.append(1))
    assert train.main(["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1"]) == 0
    assert len(beats) >= 7 + 7  # steps of 64 of the 402 rows, chunks of 16 of the 101 that validate


def test_a_part_that_is_never_written_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store accepts a connection and then never answers. Predictions and evaluations have a watchdog, too."""
    ended = threading.Event()
    monkeypatch.setattr(resumable, "STALL_TIMEOUT", 0.3)
    monkeypatch.setattr(resumable, "_write", lambda *_: ended.wait(60) or pytest.fail("nobody ended it"))
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self: ended.set())
    store = RowStore({"a": torch.ones(3, 2)}, {"a": torch.ones(3, dtype=torch.bool)})
    with join_world("cpu") as world:
        resumable.compute_parts(lambda batch: {"price": batch.inputs["a"][:, 0]}, store, world, str(tmp_path))
