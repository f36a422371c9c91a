from __future__ import annotations

from pathlib import Path

import pytest

from fusion.errors import ConfigError
from fusion.sharing import _shared_file


def test_ranks_share_memory_only_where_it_fits() -> None:
    path = Path(_shared_file("of-a-test", 1000))
    assert (path.parent, path.stat().st_size) == (Path("/dev/shm"), 1000)
    path.unlink()
    with pytest.raises(ConfigError, match=r"array of 1048576 MiB, which fits neither /dev/shm \(No space left"):
        _shared_file("of-a-test", 1 << 40)
    assert not path.exists()
