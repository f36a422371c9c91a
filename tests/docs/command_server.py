"""Runs `fusion …` for the pages: a process that has loaded torch forks for each command, which saves seconds of each.

    python -m tests.docs.command_server FOLDER

`FOLDER/fusion` is then a program that can be called as the installed one, with the same output and exit code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

from tests.fork_server import LARGEST, preload

# Passes arguments, folder, environment and the three standard streams to the server, and waits for the exit code.
CLIENT = """\
#!{python} -SE
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [request], [0, 1, 2])
sys.exit(int(server.recv(16) or b"70"))
"""


def serve(folder: Path) -> None:
    preload()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = str(folder / "fusion.socket")
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets children that have ended
    program = folder / "fusion"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    listener.settimeout(5.0)
    print("ready", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # it ends with the tests, even if they are killed
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        if os.fork() == 0:
            listener.close()
            _run(connection)
        connection.close()


def _run(connection: socket.socket) -> None:
    """In a process of its own: runs one command, sends its exit code, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 70
    try:
        request, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
        arguments, folder, variables = json.loads(request)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        sys.path.insert(0, folder)
        code = _command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        connection.send(str(code).encode())
        os._exit(0)


def _command(arguments: list[str]) -> int:
    from fusion.cli.main import main

    sys.argv = ["fusion", *arguments]
    try:
        return main(arguments)
    except SystemExit as end:  # --help
        return int(end.code or 0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
