"""A rank for the tests of the launcher: `python -m fusion.launch tests.worker BEHAVIOUR FOLDER [CODE]`.

Every rank writes its process id to FOLDER/<rank>.pid when it is ready, and one line per signal to <rank>.signals.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

RANK = int(os.environ.get("RANK", "0"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _ready(folder: Path) -> None:
    part = folder / f"{RANK}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{RANK}.pid")


def _wait_for_ranks(folder: Path) -> None:
    while not all((folder / f"{rank}.pid").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)


def _listen(folder: Path) -> list[int]:
    """Handles stop signals from now on; returns the list to which they are added."""
    got: list[int] = []

    def note(number: int, _: object) -> None:
        got.append(number)
        with (folder / f"{RANK}.signals").open("a") as lines:
            lines.write(f"{signal.Signals(number).name}\n")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note)
    return got


def reduce(folder: Path, code: int) -> int:
    """Sums over all ranks until one gets a stop signal, as training does; then ends with `code`."""
    import torch
    import torch.distributed as dist

    got = _listen(folder)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    for step in range(100_000):
        stop = torch.tensor(float(bool(got)))
        dist.all_reduce(stop)
        if step == 0:
            _ready(folder)
        if stop:
            break
        time.sleep(0.01)
    dist.barrier()
    dist.destroy_process_group()
    return code


def reduce_at_second_try(folder: Path, code: int) -> int:
    """Sums over all ranks once. In the first attempt, rank 1 then ends with `code`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    total = torch.ones(())
    dist.all_reduce(total)
    print(f"attempt {ATTEMPT} sum {int(total)}")
    if ATTEMPT == 0 and RANK == 1:
        os._exit(code)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def stop(folder: Path, code: int) -> int:
    """Waits for a stop signal, then 0.3 s for a second one, and ends with `code`."""
    got = _listen(folder)
    _ready(folder)
    while not got:
        time.sleep(0.01)
    time.sleep(0.3)
    return code


def deaf(folder: Path, code: int) -> int:
    """Handles stop signals, but does not end."""
    _listen(folder)
    _ready(folder)
    time.sleep(600)
    return code


def unready(folder: Path, code: int) -> int:
    """Has no handlers of signals yet, as a rank that is still importing."""
    _ready(folder)
    time.sleep(600)
    return code


def end(folder: Path, code: int) -> int:
    """The last rank ends with `code`, or by signal -`code` if that is negative; the others end with 0."""
    _ready(folder)
    with (folder / "starts").open("a") as lines:
        lines.write(f"{RANK}\n")
    if int(os.environ["WORLD_SIZE"]) > RANK + 1:
        return 0
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def hang(folder: Path, code: int) -> int:
    """Rank 1 ends with `code` when all ranks are ready; the others do not end."""
    if RANK != 1:
        return deaf(folder, code)
    _ready(folder)
    _wait_for_ranks(folder)
    return end(folder, code)


def bug(folder: Path, code: int) -> int:
    raise RuntimeError("no reason")


def report(folder: Path, code: int) -> int:
    """Every rank reports an error, as commands do. Rank 1 is the cause, although its report has the latest time."""
    error, code = {
        0: ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", 70),
        1: ("train.csv is empty", code),
    }.get(RANK, ("expected 2 values, got 1", 70))
    _ready(folder)
    _wait_for_ranks(folder)
    reported = {"code": code, "error": error, "hint": "fill it", "time": 100.0 + (RANK == 1)}
    (Path(os.environ["FUSION_EXIT_DIR"]) / f"{RANK}.json").write_text(json.dumps(reported))
    return code


def arguments(folder: Path, code: int) -> int:
    print(json.dumps(sys.argv[1:]), file=sys.stderr)
    print("a line without its end", end="")
    return code


BEHAVIOURS: dict[str, Callable[[Path, int], int]] = {
    behaviour.__name__: behaviour
    for behaviour in (reduce, reduce_at_second_try, stop, deaf, unready, end, hang, bug, report, arguments)
}

if __name__ == "__main__":
    sys.exit(BEHAVIOURS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
