"""Runs `fusion …` for the pages: a process that has loaded torch forks for each command, which saves seconds of each.

    python -m tests.docs.command_server FOLDER

`FOLDER/fusion` is then a program that can be called as the installed one, with the same output and exit code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from tests.fork_server import LARGEST, serve, take_over

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


def _run(connection: socket.socket) -> None:
    """In a process of its own: runs one command, sends its exit code, and ends."""
    code = 70
    try:
        request, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
        arguments, folder, variables = json.loads(request)
        take_over(streams, folder, variables)
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


def main(folder: Path) -> None:
    address, program = folder / "fusion.socket", folder / "fusion"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    serve(address, _run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
