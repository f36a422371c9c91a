"""`fusion.verify` finds every change of an output, and passes an output of a job that was killed at any write.

A small output is written and verified after each single write, since a kill could come at any of them. Then the output
is changed in many ways, one at a time, and verified: every field of every document is edited; every file is removed,
truncated and given a flipped bit; every two files of the same kind are swapped. `summary.json` has hundreds of fields
under one digest, of which a sample is edited.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fusion.training.saver
from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.demo.catalog import generate
from fusion.verify.__main__ import verify
from tests.conftest import DIMS, SMALL

# Mutations that look the same as the output of a job that was killed, so that no check can find them, and why.
INVISIBLE = {
    "runs/r/attempts/1/exit.json: removed": "an attempt that was killed has none; verify notes it",
    "runs/r/attempts/2/exit.json: removed": "an attempt that was killed has none; verify notes it",
    "runs/r/model_card.md: removed": "earlier versions wrote none, and a job may be killed before it",
    "runs/r/report.html: removed": "earlier versions wrote none, and a job may be killed before it",
}


N_OF_SUMMARY = 50  # mutations of summary.json that are tried


def wrong(url: Path) -> list[str]:
    return [str(finding) for finding in verify(str(url)) if finding.verdict == "BAD"]


@dataclass
class Made:
    """An output, the number of writes after which it was verified, and what was BAD, after which write."""

    output: Path
    n_moments: int
    alarms: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A run that was stopped once and has two checkpoints, its metrics, and submissions of two dates."""
    workspace = tmp_path_factory.mktemp("made")
    data, output = workspace / "data", workspace / "output"
    generate(data, n_products=203, dims=DIMS)
    made = Made(output, 0, [])
    with pytest.MonkeyPatch.context() as patch:
        verify_after_each_write(patch, made)
        build(patch, data, output)
    yield made
    assert wrong(output) == [], "each mutation was undone"


def build(patch: pytest.MonkeyPatch, data: Path, output: Path) -> None:
    where = ["--output", str(output), "--run-id", "r"]
    training = ["--data", str(data), *where, *SMALL, "--epochs", "5", "--checkpoint-steps", "2"]
    training += ["--max-missing", "0.5", "--features", "text", "--columns", "category"]
    with pytest.MonkeyPatch.context() as stop:
        stop_at(stop, 4)
        assert train.main(training) == 75
    assert train.main(training) == 0
    assert evaluate_by_groups.main([*where, "--by", "category"]) == 0
    assert predict_test.main([*where, "--date", "2026-01-02"]) == 0
    other = data.with_name("other")
    shutil.copytree(data, other)
    table = pd.read_csv(other / "test.csv", dtype="str")
    table.iloc[1:].to_csv(other / "test.csv", index=False)
    assert predict_test.main([*where, "--date", "2026-01-03", "--data", str(other)]) == 0


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Sends a stop request when the ranks first agree whether to stop at this step or a later one."""
    original = fusion.training.saver.Saver.agree

    def agree(self: fusion.training.saver.Saver, **options: bool) -> None:
        if self.fit.step >= step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, **options)

    patch.setattr(fusion.training.saver.Saver, "agree", agree)


def verify_after_each_write(patch: pytest.MonkeyPatch, made: Made) -> None:
    def check(action: str, url: str) -> None:
        made.n_moments += 1
        if made.output.exists() and any(path.is_file() for path in made.output.rglob("*")):
            made.alarms += [f"after {action} of {url}: {line}" for line in wrong(made.output)]

    def watched(action: str) -> None:
        original: Callable[..., Any] = getattr(storage, action)

        def call(url: str, *arguments: Any) -> Any:
            done = original(url, *arguments)
            check(action, url)
            return done

        patch.setattr(storage, action, call)

    for action in ("write", "create", "replace", "remove"):
        watched(action)
    removed = storage.remove

    def remove(url: str) -> None:
        for path in sorted(Path(url).rglob("*")):  # a kill may come between any two
            if path.is_file():
                path.unlink()
                check("removal", str(path))
        removed(url)

    patch.setattr(storage, "remove", remove)


def test_an_output_passes_after_every_single_write(made: Made) -> None:
    assert made.alarms == []
    assert made.n_moments > 50


def objects(output: Path) -> list[Path]:
    return sorted(path for path in output.rglob("*") if path.is_file())


def kind(path: Path, output: Path) -> str:
    """A text that is the same for files that could be confused with each other, and so are swapped."""
    first = path.relative_to(output).parts[0]
    return f"{first}: {'*' if first == 'pointers' and 'runs' in path.parts else path.name}"


def edits(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """All values of the same type that differ from this one in one key or item; each with a description."""
    if isinstance(value, dict):
        yield f"{where} has another key", {**value, "another": 1}
        for key, inner in value.items():
            yield f"{where}.{key} removed", {other: kept for other, kept in value.items() if other != key}
            yield from ((name, {**value, key: changed}) for name, changed in edits(inner, f"{where}.{key}"))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield f"{where}[{i}] removed", [*value[:i], *value[i + 1 :]]
            yield from ((name, [*value[:i], new, *value[i + 1 :]]) for name, new in edits(inner, f"{where}[{i}]"))
    else:
        yield f"{where} changed", changed(value)


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if value is None:
        return 1
    return f"{value[:-1]}{'0' if value[-1:] != '0' else '1'}"


Mutation = tuple[str, dict[Path, bytes | None]]  # a description, and file to its new content; None removes the file


def mutations(output: Path) -> Iterator[Mutation]:
    """All changes that are tried, see the module's docstring."""
    before = {path: path.read_bytes() for path in objects(output)}
    for path, content in before.items():
        name = str(path.relative_to(output))
        yield f"{name}: removed", {path: None}
        yield f"{name}: cut off", {path: content[: len(content) // 2]}
        middle = len(content) // 2
        yield f"{name}: bit", {path: content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]}
        if path.suffix == ".json":
            found = list(edits(json.loads(content)))
            chosen = random.Random(1).sample(found, N_OF_SUMMARY) if path.name == "summary.json" else found
            yield from ((f"{name}: {what}", {path: storage.as_json(value)}) for what, value in chosen)
    for one, two in combinations(before, 2):
        if kind(one, output) == kind(two, output) and before[one] != before[two]:
            yield (
                f"{one.relative_to(output)}: swapped with {two.relative_to(output)}",
                {one: before[two], two: before[one]},
            )


def is_found(mutation: dict[Path, bytes | None], output: Path) -> bool:
    """Changes the output, verifies it, and restores it; whether something was BAD."""
    before = {path: path.read_bytes() for path in mutation}
    try:
        for path, content in mutation.items():
            path.unlink() if content is None else path.write_bytes(content)
        run = output / "runs/r"
        if all(path.is_relative_to(run) for path in mutation) and wrong(run):  # which is faster than all of the output
            return True
        return bool(wrong(output))
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_every_change_is_found(made: Made) -> None:
    tried = dict(mutations(made.output))
    missed = {name for name, mutation in tried.items() if not is_found(mutation, made.output)}
    print(f"\n{len(tried)} mutations, {len(tried) - len(missed)} found")
    assert missed == INVISIBLE.keys()
    assert len(tried) >= 500
