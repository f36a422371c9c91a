"""Ranks for unit tests: one process imports torch and then forks a rank for each, which costs one import for all.

    python -m tests.forked RANKS STALL_TIMEOUT MODULE FUNCTION

Every rank calls `FUNCTION(place)` inside `world("cpu")`. The exit code is that of the first that ends with another
than 0; the others are killed soon after, as a launcher does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from fusion.distributed import World, world
from tests.s3_server import _free_ports as free_ports


def run_ranks(
    n: int, function: Callable[[World], object], stall_timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs a function of a test module as `n` ranks."""
    arguments = [str(n), str(stall_timeout), function.__module__, function.__name__]
    command = [sys.executable, "-m", "tests.forked", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)


def _run(rank: int, n: int, port: int, stall_timeout: float, function: Callable[[World], object]) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code = 1
    try:
        with world("cpu", stall_timeout) as place:
            function(place)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(n: int, stall_timeout: float, module: str, name: str) -> int:
    function, port = getattr(import_module(module), name), free_ports(1)[0]
    ranks = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            _run(rank, n, port, stall_timeout, function)
        ranks.append(pid)
    return _wait(ranks)


def _wait(ranks: list[int]) -> int:
    code, n_left = 0, len(ranks)
    while n_left and code == 0:
        _, status = os.wait()
        code, n_left = os.waitstatus_to_exitcode(status), n_left - 1
    if code < 0:  # killed: how do the others end?
        code = next((other for other in (os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(n_left)) if other), 0)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
