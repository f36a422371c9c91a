"""Ranks for unit tests: one process imports torch and then forks a rank for each, which costs one import for all.

    python -m tests.forked RANKS MODULE FUNCTION

Every rank calls `FUNCTION(place)` inside `world("cpu")`. The exit code is the first that is not 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module

from tests.s3_server import _free_ports as free_ports


def run_ranks(n: int, function: Callable[..., object], **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a function of a test module as `n` ranks."""
    command = [sys.executable, "-m", "tests.forked", str(n), function.__module__, function.__name__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)


def _run(rank: int, n: int, port: int, function: Callable[..., object]) -> None:
    from fusion.distributed import world

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code = 1
    try:
        with world("cpu") as place:
            function(place)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(n: int, module: str, name: str) -> int:
    function, port = getattr(import_module(module), name), free_ports(1)[0]
    ranks = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            _run(rank, n, port, function)
        ranks.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
