"""Which bytes of a mapped file are asked for in advance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fusion.data import mapped_file
from fusion.data.mapped_file import MappedFile

ROW = 16  # bytes


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The first byte and the length of each request."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: found.append((start, length)))
    monkeypatch.setattr(mapped_file, "GAP_BYTES", 2 * ROW)
    monkeypatch.setattr(mapped_file, "REQUEST_BYTES", 5 * ROW)
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([7], [(7, 1)]),
        ([0, 1, 2], [(0, 3)]),
        ([0, 3, 7], [(0, 4), (7, 1)]),  # two rows between are read too, three are not
        ([2, 50, 51, 99], [(2, 1), (50, 2), (99, 1)]),
        ([4, 4, 5], [(4, 2)]),
        (list(range(10, 22)), [(10, 5), (15, 5), (20, 2)]),
    ],
)
def test_runs_of_rows_are_asked_for_at_once(
    rows: list[int], expected: list[tuple[int, int]], requests: list[tuple[int, int]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(100 * ROW))
    MappedFile(tmp_path / "file", (100, 4), torch.float32).expect(torch.tensor(rows))
    assert requests == [(first * ROW, n * ROW) for first, n in expected]
