"""Processes that outlive the one that started them: any process stops and starts them by the files that they leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_started: list[subprocess.Popen[bytes]] = []  # kept: Python warns of a process that runs on when its object goes


@dataclass(frozen=True)
class Service:
    """A program with its command in `<folder>/<name>.json`, its output in `.log` and its process in `.pid`."""

    folder: Path
    name: str

    def run(self, *command: str | Path) -> None:
        (self.folder / f"{self.name}.json").write_text(json.dumps([str(word) for word in command]))
        self.start()

    def start(self) -> None:
        """Starts it, with the command of the time before."""
        command = json.loads((self.folder / f"{self.name}.json").read_text())
        with (self.folder / f"{self.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._pid.write_text(str(process.pid))
        _started.append(process)

    def stop(self, patience: float = 10) -> None:
        """Asks it to end, and kills it where it does not."""
        if not self._pid.exists():
            return
        pid = int(self._pid.read_text())
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            if _has_ended(pid, seconds):
                break
        self._pid.unlink()

    def end_of_log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")[-2000:]

    @property
    def _pid(self) -> Path:
        return self.folder / f"{self.name}.pid"


def _has_ended(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":  # ended, and its parent has not looked
            return True
        time.sleep(0.05)
    return False


def until(holds: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.3) -> None:
    """Returns once a condition holds; an AssertionError says what was waited for in vain."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not in {seconds:.0f} s"
        time.sleep(pause)


def succeeds(*command: str | Path) -> bool:
    """Whether a command ends with 0."""
    return not subprocess.run(command, check=False, capture_output=True).returncode


def free_ports(n: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listens(port: int) -> bool:
    """Whether somebody answers on a port of loopback."""
    with socket.socket() as one:
        return not one.connect_ex(("127.0.0.1", port))
