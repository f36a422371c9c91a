"""How an attempt at a run records its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.records.attempts import attempt
from fusion.records.run import RunFolder

GLOO = "[pair.cc:553] Connection closed by peer [10.0.0.7]:52400. This is typically caused by a remote worker crashing."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(GLOO), 137),
        (RuntimeError("ncclRemoteError: A call failed possibly due to a network error"), 137),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 70),
        (ConnectionResetError("Connection reset by peer"), 70),
    ],
)
def test_a_lost_rank_is_not_recorded_as_a_bug(error: Exception, code: int, tmp_path: Path) -> None:
    with pytest.raises(type(error)), attempt(RunFolder(str(tmp_path))):
        raise error
    end = json.loads((tmp_path / "attempts" / "1" / "exit.json").read_text())
    assert (end["code"], end["error"].endswith(f"{type(error).__name__}: {error}")) == (code, True)
    assert end["error"].startswith("another rank was lost: ") == (code == 137)
