"""Kills a training and a prediction again and again, and compares what they end with to an undisturbed run.

    python benchmarks/kill_anywhere.py --data DATA --output URL --kills 200 [--ranks 2] [--seed 0]

SIGKILL strikes at a random moment, or at a random write to the store: just before it, in the middle of it, or just
after it. Every write is such a boundary: the start of an attempt, each file of a checkpoint, its manifest, a pointer, a
prune, the end of an epoch, the submission. One rank or all of them die. The same command then starts again, until it
ends with 0; then a new run begins, until as many kills have struck as were asked for. Prints a line of JSON with the
counts; exits 1 when a single byte of `model.safetensors` or `submission.csv` differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Loaded before the ranks are forked, so that each starts at once. No thread runs yet.
import fusion.prediction
import fusion.training  # noqa: F401
from fusion import manifests, storage
from fusion.all_embeddings import predict_test, train

SMALL = ["--width", "16", "--n-heads", "2", "--hidden", "16", "8", "--batch-size", "64", "--lr", "0.01"]
SMALL += ["--device", "cpu", "--epochs", "4", "--checkpoint-steps", "3", "--run-id", "r"]
PATIENCE = 60.0  # seconds after which an attempt that still runs counts as hung


@dataclass(frozen=True)
class Kill:
    """Where SIGKILL strikes: after `seconds`, or at the `write`-th write, "before", "inside" or "after" it."""

    seconds: float = 0.0
    write: int = 0
    when: str = "before"
    rank: int = 0
    group: bool = True


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    runs: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, help="folder or bucket; runs go to numbered places below it")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, tally = random.Random(options.seed), Tally()
    expected = _finish(options, storage.join(options.output, "undisturbed"), lambda: None, Tally())
    while sum(tally.kills.values()) < options.kills:
        tally.runs += 1
        place = storage.join(options.output, f"killed-{tally.runs}")
        found = _finish(options, place, lambda: _plan(rng, options.ranks), tally)
        if found != expected:
            print(f"run {tally.runs} ended with {found}, undisturbed: {expected}")
            return 1
    print(json.dumps({"kills": sum(tally.kills.values()), "identical_runs": tally.runs, **tally.kills}))
    return 0


def _plan(rng: random.Random, ranks: int) -> Kill:
    rank, group = rng.randrange(ranks), ranks == 1 or rng.random() < 0.5
    if rng.random() < 0.3:
        return Kill(seconds=rng.uniform(0.05, 1.5), rank=rank, group=group)
    # Only rank 0 writes.
    return Kill(write=rng.randint(1, 30), when=rng.choice(["before", "inside", "after"]), group=group)


def _finish(options: argparse.Namespace, output: str, plan: Callable[[], Kill | None], tally: Tally) -> dict[str, str]:
    """Runs both commands until each ends with 0; digests of what they published."""
    where = ["--output", output]
    jobs = [
        (train.main, ["--data", options.data, *where, *SMALL]),
        (predict_test.main, [*where, "--date", "2026-01-02"]),
    ]
    for job, flags in jobs:
        while True:
            tally.attempts += 1
            codes, struck = _attempt(job, flags, options.ranks, plan())
            if struck:
                tally.kills[struck] += 1
            elif any(codes):
                raise RuntimeError(f"an attempt that nobody killed ended with {codes}")
            if not any(codes):
                break
    model = manifests.read_file(manifests.best(storage.join(output, "runs", "r")), manifests.MODEL)
    current = json.loads(storage.read(f"{output}/pointers/submissions/test/current.json"))["submission"]
    submission = storage.read(f"{output}/submissions/{current}/submission.csv")
    digests = {"model": hashlib.sha256(model).hexdigest(), "submission": hashlib.sha256(submission).hexdigest()}
    return {name: digest[:16] for name, digest in digests.items()}


def _attempt(job: Callable[[list[str]], int], flags: list[str], ranks: int, kill: Kill | None) -> tuple[list[int], str]:
    """Exit codes of the ranks (137: killed), and where the kill struck, if it did."""
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _be_rank(rank, ranks, port, job, flags, kill)
        children.append(child)
    struck = _strike(children, kill) if kill and kill.seconds else ""
    codes = _wait(children, kill)
    if kill and kill.write and codes[0] == 137:
        struck = f"{kill.when} a write"
    return codes, struck


def _be_rank(
    rank: int, ranks: int, port: int, job: Callable[[list[str]], int], flags: list[str], kill: Kill | None
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    if kill and kill.write and rank == 0:
        _arm(kill)
    os._exit(job(flags))


def _arm(kill: Kill) -> None:
    """From now on, the `kill.write`-th write of this process is its end."""
    count, lock = 0, threading.Lock()

    def deadly(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                mine = count == kill.write
            if mine and kill.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if mine and kill.when == "inside":  # while another thread is writing
                threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGKILL)).start()
            result = write(*arguments, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in ("_put", "_create", "_replace"):
        setattr(storage, name, deadly(name, getattr(storage, name)))
    storage.remove = deadly("remove", storage.remove)


def _strike(children: list[int], kill: Kill) -> str:
    time.sleep(kill.seconds)
    victims = children if kill.group else [children[kill.rank]]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)  # children are not yet waited for, so their ids are still theirs
    return "at a random moment"


def _wait(children: list[int], kill: Kill | None) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = 137 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
                if codes[child] == 137 and kill and kill.group:
                    for other in children:
                        if other not in codes:
                            os.kill(other, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"a rank still runs {PATIENCE:.0f} s after another died: {codes}")
        time.sleep(0.01)
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
