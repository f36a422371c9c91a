from __future__ import annotations

import subprocess
import sys

import pytest

from fusion.errors import ExitCode

SCRIPT = """
import threading, time
from fusion.watchdog import watched

def waits_for_ever():
    threading.Event().wait()

with watched({timeout}) as watchdog:
    for _ in range(6):
        time.sleep(0.1)
        {beat}
    {end}
"""


def run(timeout: float, beat: str, end: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(timeout=timeout, beat=beat, end=end)
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=30)


def test_no_progress_ends_with_124_and_the_stacks() -> None:
    done = run(0.5, "watchdog.beat()", "waits_for_ever()")
    assert done.returncode == ExitCode.STALLED
    assert "event=stalled" in done.stderr
    assert "in waits_for_ever" in done.stderr


@pytest.mark.parametrize(("timeout", "beat"), [(0.4, "watchdog.beat()"), (0, "pass")], ids=["beating", "switched off"])
def test_who_makes_progress_or_is_not_watched_goes_on(timeout: float, beat: str) -> None:
    assert run(timeout, beat, "print('done')").stdout == "done\n"


def test_a_rank_that_waits_for_another_is_ended() -> None:
    """The first batch of rank 0 never comes back, as in a collective whose other side has gone."""
    script = """
import sys, time
from fusion import fitting
from fusion.all_embeddings import train
from fusion.demo_catalog import generate
from pathlib import Path
import tempfile

fitting.Fit._train_batch = lambda self, batch: time.sleep(1000)
folder = tempfile.mkdtemp()
roles = ("clip_image", "siglip_image", "siglip_text", "qwen_text")
generate(Path(folder), n_products=300, dims=dict.fromkeys(roles, 8))
small = "--width 16 --n-heads 2 --hidden 8 --device cpu --stall-timeout 3 --max-missing 0.2".split()
sys.exit(train.main(["--data", folder, "--output", folder + "/out", *small]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.STALLED
    assert "_train_batch" in done.stderr or "<lambda>" in done.stderr
