"""Kills training, evaluation, ablation and prediction many times, and compares the results with an undisturbed run.

    python -m tests.chaos.kill_anywhere --data DATA --output URL [--ranks 2] [--kills 200] [--times 2] [--seed 0]
    python -m tests.chaos.kill_anywhere --data DATA --output URL --kills 3 --at model:inside best:before

Processes are killed with SIGKILL at every boundary of `tests.chaos.boundaries` and at random moments, one rank or all
of them. After each kill the same command is started again, until it ends with 0. Then a new run begins, until every
boundary was used --times times and there were --kills kills. Prints the counts as a line of JSON. Exits with 1 when a
byte of `model.safetensors`, the metrics or `submission.csv` differs, and raises an error when `fusion.verify` finds
damage after an attempt.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, TypeVar, cast

import pandas as pd

from fusion import storage
from fusion.ablation import __main__ as ablation
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.prediction import resumable
from fusion.records import manifests
from fusion.records.output import OutputFolder
from fusion.records.run import RunFolder
from fusion.verify.__main__ import verify
from fusion.verify.output import is_output
from tests.chaos.boundaries import ALL, Boundary, arm
from tests.fork_server import preload

SMALL = ["--width", "16", "--hidden", "16", "8", "--batch-size", "64", "--lr", "0.01"]
SMALL += ["--device", "cpu", "--epochs", "4", "--checkpoint-steps", "3", "--run-id", "r"]
COMPUTED = ["--features", "text", "--columns", "category"]
GRACE_SECONDS = 15.0  # after the death of a rank, how long the others may run; the launcher gives them some time too
HANG_SECONDS = 300.0  # an attempt that still runs after this is an error; on an idle machine attempts take seconds
MAX_WITHOUT_PROGRESS = 5  # after so many runs without a kill at a boundary, the remaining ones are never reached

T = TypeVar("T")


@dataclass
class Plan:
    """The kills that are still to be made, and counts of those that were.

    Attributes:
        kills: how many kills to make at least.
        remaining: how often processes are still to be killed at each boundary.
        runs: how many runs have begun.
        left_in_run: the boundaries of `remaining` that are to be used in this run.
        killed_at: number of kills by boundary.
        random: number of kills at random moments.
        victims: number of kills of "one rank" and of "all ranks"; a single rank counts as all.
    """

    rng: random.Random
    kills: int
    remaining: Counter[Boundary]
    runs: int = 0
    left_in_run: list[Boundary] = field(default_factory=list)
    killed_at: Counter[Boundary] = field(default_factory=Counter)
    random: int = 0
    victims: Counter[str] = field(default_factory=Counter)

    @property
    def n_random_left(self) -> int:
        return self.kills - self.killed_at.total() - self.remaining.total() - self.random

    @property
    def done(self) -> bool:
        return not self.remaining and self.n_random_left <= 0

    def begin_run(self) -> None:
        self.runs, self.left_in_run = self.runs + 1, list(self.remaining)

    def note(self, reached: list[Boundary], at_random: bool, group: bool) -> None:
        """Counts the kills of an attempt."""
        for boundary in reached:
            self.killed_at[boundary] += 1
            self.remaining -= Counter([boundary])
            self.left_in_run = [other for other in self.left_in_run if other != boundary]
        self.random += at_random
        self.victims["all ranks" if group else "one rank"] += len(reached) + at_random

    def tally(self) -> dict[str, object]:
        kinds = list(dict.fromkeys(boundary.kind for boundary in ALL))
        by_kind = {
            kind: {b.when: self.killed_at[b] for b in ALL if b.kind == kind and self.killed_at[b]} for kind in kinds
        }
        kills = self.killed_at.total() + self.random
        return {"kills": kills, "at random": self.random, **self.victims, "boundaries": by_kind}


@dataclass(frozen=True)
class Attempt:
    """Where and which ranks are killed in one attempt at a command.

    Attributes:
        boundaries: a rank is killed at the first of these that it reaches.
        skip: how often a boundary that is reached many times is passed over before.
        seconds: without boundaries, when to kill after the start; 0: never.
        rank: the rank to kill after `seconds`.
        group: whether the other ranks are killed as well.
    """

    boundaries: list[Boundary]
    skip: int
    seconds: float
    rank: int
    group: bool


def main() -> int:
    options = _parse()
    preload()  # each rank then starts quickly; forking is safe, as no thread runs yet
    resumable.PART_ROWS = 16
    wanted = Counter(dict.fromkeys(options.at or ALL, options.times))
    plan, n_without_progress = Plan(random.Random(options.seed), options.kills, wanted), 0
    expected = _finish(options, f"{options.output}/undisturbed", Plan(random.Random(0), 0, Counter()))
    while not plan.done:
        before = plan.killed_at.total()
        plan.begin_run()
        found = _finish(options, f"{options.output}/killed-{plan.runs}", plan)
        if found != expected:
            print(f"run {plan.runs} ended with {found}, undisturbed: {expected}")
            return 1
        n_without_progress = 0 if plan.killed_at.total() > before or not plan.remaining else n_without_progress + 1
        if n_without_progress == MAX_WITHOUT_PROGRESS:
            print(f"not reached in {MAX_WITHOUT_PROGRESS} runs: {', '.join(map(str, plan.remaining))}")
            return 1
    print(json.dumps({"identical_runs": plan.runs, **plan.tally()}))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, help="folder or bucket; runs go to numbered folders below it")
    parser.add_argument("--kills", type=int, default=200, help="minimum number of kills; those that are not at "
        "boundaries come at random moments")  # fmt: skip
    parser.add_argument("--times", type=int, default=2, help="how often to kill at each boundary")
    parser.add_argument("--at", nargs="+", type=Boundary.named, metavar="KIND:WHEN", help="boundaries to kill at "
        "(default: all)")  # fmt: skip
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _draw(plan: Plan, ranks: int) -> Attempt:
    rng = plan.rng
    rank, group = rng.randrange(ranks), ranks == 1 or rng.random() < 0.5
    # The first run uses all boundaries in their order. Later ones mix in 30% of random kills, if there are any left.
    share = 0 if plan.runs == 1 else 0.3
    if plan.n_random_left > 0 and (not plan.left_in_run or rng.random() < share):
        return Attempt([], 0, rng.uniform(0.05, 1.5), rank, group)
    return Attempt(plan.left_in_run, rng.randrange(2), 0, rank, group)


def _finish(options: argparse.Namespace, output: str, plan: Plan) -> dict[str, str]:
    """Runs each command until it ends with 0; returns digests of what they published."""
    where = ["--output", output]
    jobs = [
        (train.main, ["--data", options.data, *where, *SMALL, *COMPUTED]),
        (evaluate_by_groups.main, where),
        (ablation.main, [*where, "--run-id", "r"]),
        (predict_test.main, [*where, "--date", "2026-01-02"]),
    ]
    for job, flags in jobs:
        while not _try(job, flags, options.ranks, plan):
            pass
    return _in_a_child(lambda: _published(output))


def _published(output: str) -> dict[str, str]:
    """Digests by name."""
    run = RunFolder.named(output, "r")
    current = json.loads(storage.read(f"{output}/pointers/submissions/test/current.json"))["submission"]
    epochs = pd.read_csv(io.BytesIO(storage.read(f"{run}/metrics/epochs.csv"))).drop(columns="seconds")
    published = {
        "model": manifests.read_file(run.best(), manifests.MODEL),
        "epochs": epochs.to_csv().encode(),
        "metrics": storage.read(f"{run}/metrics/{manifests.MANIFEST}"),
        "ablation": storage.read(f"{run}/metrics/{manifests.ABLATION}"),
        "submission": storage.read(f"{output}/submissions/{current}/submission.csv"),
    }
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in published.items()}


def _in_a_child(function: Callable[[], T]) -> T:
    """The function's result, computed in a forked process.

    This process must not read from a store itself: its connections would be those of the ranks, too.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "wb") as result:
            try:
                pickle.dump(function(), result)
            except BaseException:
                traceback.print_exc()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as result:
        content = result.read()
    os.waitpid(child, 0)
    if not content:
        raise RuntimeError("the output of the attempts cannot be read; see above")
    return cast(T, pickle.loads(content))


def _try(job: Callable[[list[str]], int], flags: list[str], ranks: int, plan: Plan) -> bool:
    """Makes one attempt at a command and notes its kills in the plan; returns whether all ranks ended with 0."""
    attempt = _draw(plan, ranks)
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as met:
        codes = _run(job, flags, ranks, attempt, said, met)
        met.seek(0)
        reached = [Boundary.named(line) for line in met.read().decode().splitlines()]
        killed = any(code == 137 for code in codes)
        if any(codes) and not killed:
            said.seek(0)
            raise RuntimeError(f"an attempt without a kill ended with {codes}: {said.read().decode()[-4000:]}")
    plan.note(reached, killed and not reached, attempt.group)
    _check_undamaged(flags[flags.index("--output") + 1])
    return not any(codes)


def _damage(output: str) -> list[str]:
    if not is_output(OutputFolder(output)):
        return []
    return [str(finding) for finding in verify(output) if finding.verdict == "BAD"]


def _check_undamaged(output: str) -> None:
    """Raises RuntimeError when `fusion.verify` finds damage."""
    wrong = _in_a_child(lambda: _damage(output))
    if wrong:
        raise RuntimeError(f"fusion.verify finds damage after an attempt: {wrong}")


def _run(
    job: Callable[[list[str]], int], flags: list[str], ranks: int, attempt: Attempt, said: IO[bytes], met: IO[bytes]
) -> list[int]:
    """Runs the ranks of one attempt; returns their exit codes, 137 for a rank that was killed."""
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _become_rank(rank, ranks, port, said)
            # At boundaries that all ranks reach, the last rank is killed; at others rank 0, which reaches them alone.
            arm([b for b in attempt.boundaries if rank == (ranks - 1 if b.on_all_ranks else 0)], attempt.skip, met)
            os._exit(job(flags))
        children.append(child)
    return _wait(children, attempt)


def _become_rank(rank: int, ranks: int, port: int, said: IO[bytes]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)


def _wait(children: list[int], attempt: Attempt) -> list[int]:
    started, codes, victims = time.monotonic(), dict[int, int](), set[int]()
    died = math.inf
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = 137 if os.WIFSIGNALED(ended[1]) else os.waitstatus_to_exitcode(ended[1])
        seconds = time.monotonic() - started
        if seconds > HANG_SECONDS:
            raise RuntimeError(f"a rank still runs {HANG_SECONDS:.0f} s after the attempt began: {codes}")
        if not victims and attempt.seconds and seconds > attempt.seconds:
            victims = {children[attempt.rank]}
        if 137 in codes.values():
            died = min(died, seconds)
        # If a rank dies before the process group is formed, the others would wait for it.
        if (attempt.group and (victims or died < math.inf)) or seconds > died + GRACE_SECONDS:
            victims = set(children)
        for victim in victims - set(codes):  # not yet reaped, so their process ids cannot have been reused
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
