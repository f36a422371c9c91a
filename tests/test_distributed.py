from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fusion import storage
from fusion.distributed import world
from tests.s3_server import _free_ports as free_ports


@pytest.mark.parametrize(("patience", "minutes"), [(5, 10), (60, 10), (600, 100)])
def test_ranks_wait_for_one_that_asks_the_store_again(
    patience: float, minutes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_patience", patience)
    with world("cpu"):
        assert dist.group.WORLD is not None
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(minutes=minutes)
