"""Ranks for tests: the process of a fork server, which has loaded torch, forks all ranks.

    python -m tests.forked RANKS STALL_TIMEOUT MODULE FUNCTION
    python -m tests.forked RANKS '[["fusion.all_embeddings.train", "--data", …], …]'

Every rank calls `FUNCTION(world)` inside `join_world("cpu")`, or runs the commands one after the other. The exit code
is that of the first rank that fails; the others are killed soon after, as a launcher does. With
FUSION_TEST_RANKS_PER_NODE, the ranks are those of several nodes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import cast

from fusion.distributed.world import World, join_world
from tests import fork_server
from tests.s3_server import _free_ports as free_ports


def run_ranks(
    n: int, function: Callable[[World], object], stall_timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs a function of a test module as `n` ranks."""
    return _python("tests.forked", str(n), str(stall_timeout), function.__module__, function.__name__)


def run_commands(
    n: int, commands: Sequence[Sequence[str]], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs commands such as `("fusion.all_embeddings.train", "--data", …)` one after the other, each as `n` ranks."""
    return _python("tests.forked", str(n), json.dumps(commands), env=env)


def _python(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return fork_server.run(*arguments, timeout=240, env=environment)


def _function(module: str, name: str, stall_timeout: float) -> Callable[[], int]:
    function = getattr(import_module(module), name)

    def action() -> int:
        with join_world("cpu", stall_timeout) as world:
            function(world)
        return 0

    return action


def _commands(text: str) -> list[Callable[[], int]]:
    commands = [(import_module(module).main, flags) for module, *flags in json.loads(text)]
    return [lambda main=main, flags=flags: cast(int, main(flags)) for main, flags in commands]  # type: ignore[misc]


def _run(rank: int, n: int, port: int, action: Callable[[], int]) -> None:
    local = int(os.environ.get("FUSION_TEST_RANKS_PER_NODE", n))
    variables = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": local}
    variables["MASTER_PORT"] = port
    os.environ.update({name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code = 1
    try:
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _forked(n: int, action: Callable[[], int]) -> int:
    port, ranks = free_ports(1)[0], []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            _run(rank, n, port, action)
        ranks.append(pid)
    return _wait(ranks)


def _wait(ranks: list[int]) -> int:
    code, n_left = 0, len(ranks)
    while n_left and code == 0:
        _, status = os.wait()
        code, n_left = os.waitstatus_to_exitcode(status), n_left - 1
    if code < 0:  # A rank was killed. The exit code is that of another rank that notices, if one does.
        code = next((other for other in (os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(n_left)) if other), 0)
    _end(ranks)
    return code


def _end(ranks: list[int]) -> None:
    """Gives the other ranks two seconds to end by themselves, as a launcher does: rank 0 may not have printed yet."""
    until = time.monotonic() + 2
    with suppress(ChildProcessError):  # all have ended
        while time.monotonic() < until:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(n: int, *arguments: str) -> int:
    if len(arguments) == 1:
        actions = _commands(arguments[0])
    else:
        stall_timeout, module, name = arguments
        actions = [_function(module, name, float(stall_timeout))]
    return next((code for action in actions if (code := _forked(n, action))), 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
