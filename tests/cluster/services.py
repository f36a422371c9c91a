"""Background processes that any other process can stop and start again, by means of files in a folder."""

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

# References to the processes: Python warns when a Popen object is deleted while its process runs.
_started: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Service:
    """A program. Its command is in `<folder>/<name>.json`, its output in `.log`, its process id in `.pid`."""

    folder: Path
    name: str

    def run(self, *command: str | Path) -> None:
        (self.folder / f"{self.name}.json").write_text(json.dumps([str(word) for word in command]))
        self.start()

    def start(self) -> None:
        """Starts the program with the command of the last `run`."""
        command = json.loads((self.folder / f"{self.name}.json").read_text())
        with (self.folder / f"{self.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._pid.write_text(str(process.pid))
        _started.append(process)

    def stop(self, patience: float = 10) -> None:
        """Sends SIGTERM, and after `patience` seconds SIGKILL."""
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
        if stat.rpartition(")")[2].split()[0] == "Z":  # a zombie: it has ended, and its parent has not reaped it
            return True
        time.sleep(0.05)
    return False


def until(holds: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.3) -> None:
    """Waits until a condition holds; on timeout raises AssertionError with `what`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not in {seconds:.0f} s"
        time.sleep(pause)


def succeeds(*command: str | Path) -> bool:
    """Whether a command ends with 0."""
    return not subprocess.run(command, check=False, capture_output=True).returncode


def free_ports(n: int) -> list[int]:
    """Ports on loopback that no process listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listens(port: int) -> bool:
    """Whether a process listens on a port of loopback."""
    with socket.socket() as one:
        return not one.connect_ex(("127.0.0.1", port))
