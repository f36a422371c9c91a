"""Runs `python -m MODULE …` in a process that a server forks after it has loaded torch, which saves seconds of each.

    python -m tests.fork_server FOLDER

The processes are real ones: with arguments, variables, folder, files for their output, and an exit code of their own.
Variables that libraries read when they are loaded, such as GOMP_SPINCOUNT, are those of the server. For tests of how
Python starts, and of signals from outside, `subprocess` is the right choice.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO

from fusion import environment

# What most commands load. Loading it starts no threads, which forked processes would lack.
LOADED = ("fusion.training.loop", "fusion.evaluation.evaluate", "fusion.submissions.submission", "fusion.report.pages")
LOADED += ("matplotlib.backends.backend_svg", "matplotlib.figure", "s3fs", "pyarrow.dataset", "torch._dynamo")
ROOT = Path(__file__).parents[1]
LARGEST = 1 << 17  # bytes of a request, most of which are the variables
_started: list[tuple[subprocess.Popen[bytes], str]] = []  # the server of this process, and its address


def preload() -> None:
    """Loads modules, and computes what each command would: to be called before a process forks commands."""
    environment.prepare_libraries()
    for name in LOADED:
        import_module(name)
    from fusion.records.provenance import ENSEMBLE_CODE, code_digest

    for code in ("training", "prediction", ENSEMBLE_CODE):
        code_digest(code)
    gc.freeze()  # the processes need not look for garbage among all this


def run(
    *arguments: str, env: Mapping[str, str], timeout: float | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, …)`."""
    request = json.dumps([arguments, str(cwd or Path.cwd()), dict(env)]).encode()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        open(os.devnull) as nothing,
    ):
        server.connect(_address())
        socket.send_fds(server, [request], [nothing.fileno(), out.fileno(), err.fileno()])
        process = int(server.recv(16))
        server.settimeout(timeout)
        try:
            code = int(server.recv(16))
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            raise subprocess.TimeoutExpired(arguments, timeout or 0, _content(out), _content(err)) from None
        return subprocess.CompletedProcess(arguments, code, _content(out).decode(), _content(err).decode())


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _address() -> str:
    """Of this process's server, which is started when it is first needed."""
    if not _started:
        folder = tempfile.TemporaryDirectory(prefix="fusion-fork-server-")
        command = [sys.executable, "-m", "tests.fork_server", folder.name]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, cwd=ROOT)  # a test may be in another folder
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        server.stdout.close()
        _started.append((server, str(Path(folder.name, "socket"))))
        atexit.register(folder.cleanup)
        atexit.register(server.wait)
        atexit.register(server.kill)
    return _started[0][1]


def serve(address: Path, attend: Callable[[socket.socket], None]) -> None:
    """Forks a process for each connection, which attends to it, until the parent of this process has ended."""
    preload()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address))
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets children that have ended
    print("ready", flush=True)
    listener.settimeout(5.0)
    parent = os.getppid()
    while os.getppid() == parent:  # it ends with the tests, even if they are killed
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.settimeout(None)
            attend(connection)
            os._exit(0)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Runs one command in a process of its own; sends the process's id, and later its exit code."""
    request, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
    process = os.fork()
    if process == 0:
        connection.close()
        _become(streams, *json.loads(request))
    connection.send(str(process).encode())
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])).encode())


def take_over(streams: list[int], folder: str, variables: dict[str, str]) -> None:
    """Gives this process the standard streams, the folder and the variables of another."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [folder, *variables.get("PYTHONPATH", "").split(":")]


def _become(streams: list[int], arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    """Runs a module as `python -m` does, and ends this process."""
    code = 1
    try:
        take_over(streams, folder, variables)
        import torch

        torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", environment.usable_cores())))
        module, *flags = arguments
        sys.argv = [module, *flags]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = _code(end)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


if __name__ == "__main__":
    serve(Path(sys.argv[1], "socket"), _attend)
