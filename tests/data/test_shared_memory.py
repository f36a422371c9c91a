from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusion.data.shared_memory import _reserved, _shared_folders
from fusion.errors import ConfigError


def test_shared_memory_leaves_no_file_and_must_fit() -> None:
    before = set(Path("/dev/shm").iterdir())
    with _reserved(1000, _shared_folders(), "") as file:
        assert os.fstat(file.fileno()).st_size == 1000
        assert os.fstat(file.fileno()).st_dev == Path("/dev/shm").stat().st_dev
        assert set(Path("/dev/shm").iterdir()) <= before, "a killed rank leaves no file"
    with pytest.raises(ConfigError, match=r"array of 1099511627776 MiB, .* not fit in /dev/shm \(No space left"):
        _reserved(1 << 60, _shared_folders(), "")
