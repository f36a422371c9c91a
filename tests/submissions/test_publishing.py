"""A consumer that reads the pointer at any moment gets a complete, verified submission."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fusion import storage
from fusion.all_embeddings import train
from fusion.all_embeddings.config import Config
from fusion.config import PredictConfig
from fusion.data.tables import read_table
from fusion.errors import DataError
from fusion.records import pointers
from fusion.records.find_run import open_run
from fusion.records.manifests import SUBMISSION
from fusion.records.schemas import SubmissionPointer
from fusion.submissions import submission
from fusion.verify.__main__ import verify
from tests.conftest import SMALL

N_PUBLICATIONS, AT_ONCE = 20, 5


def publisher(catalog: Path, output: str) -> Callable[[int], None]:
    """Trains a run; returns a function that publishes a different submission for each number."""
    flags = ["--data", str(catalog), "--output", output, "--run-id", "r", *SMALL, "--epochs", "1"]
    assert train.main(flags) == 0
    settings = PredictConfig(output=output, date="2026-01-02", run_id="r")
    run, config, best = open_run(settings, Config)
    table, origin = (
        read_table(str(catalog), "test", priced=False),
        submission.origin_of(run, best, config, str(catalog)),
    )

    def publish(number: int) -> None:
        prices = np.random.default_rng(number).uniform(1, 100, len(table))
        content = submission.submission_csv(list(table.ids[table.file_order]), prices)
        submission.publish(settings, origin, submission.SubmissionContent({SUBMISSION: content}, len(table), None, []))

    return publish


def read_current(output: str) -> list[str]:
    """The findings about the submission that the pointer names; an empty list before the first publication."""
    try:
        return [str(finding) for finding in verify(f"{output}/pointers/submissions/test/current.json")]
    except DataError:
        return []


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slows all writes down, so that a wrong order of writes is visible for longer."""
    original = storage.write

    def write(url: str, data: bytes) -> None:
        time.sleep(0.1)
        original(url, data)

    monkeypatch.setattr(storage, "write", write)


def test_readers_of_the_pointer_always_get_a_complete_submission(
    bucket: str, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"{bucket}/out"
    publish, reads = publisher(catalog, output), list[list[str]]()
    slow_down(monkeypatch)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(publish, number) for number in range(N_PUBLICATIONS)]
        while not all(job.done() for job in jobs):
            reads.append(read_current(output))
    reads.append(read_current(output))
    assert [job.exception() for job in jobs if job.exception()] == []
    while not reads[0]:
        reads.pop(0)
    assert all(reads), "a pointer never disappears once it exists"
    assert [line for read in reads for line in read if not line.startswith("ok ")] == []
    seen = {line for read in reads for line in read if line.startswith("ok   folder's digest: ")}
    assert len(seen) > 1, "no publication happened between two reads"
    check_all(output)


def check_all(output: str) -> None:
    """Every publication is whole, and the pointer names one of them."""
    folders = storage.ls(f"{output}/submissions/test/2026-01-02")
    assert len(folders) == N_PUBLICATIONS
    assert [finding for folder in folders for finding in verify(folder) if finding.verdict != "ok"] == []
    current = pointers.read(SubmissionPointer, output, "submissions", "test", "current")
    assert current is not None and f"{output}/submissions/{current.submission}" in folders
