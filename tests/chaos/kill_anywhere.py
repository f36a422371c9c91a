"""Kills training, evaluation, ablation and prediction again and again, and compares their ends to an undisturbed run.

    python -m tests.chaos.kill_anywhere --data DATA --output URL [--ranks 2] [--kills 200] [--times 2] [--seed 0]
    python -m tests.chaos.kill_anywhere --data DATA --output URL --kills 3 --at model:inside best:before

SIGKILL strikes at every boundary of `tests.chaos.boundaries`, before, inside and after it, and at random moments. One
rank or all of them die. The same command then starts again, until it ends with 0; then a new run begins, until every
boundary has been struck as often as was asked for, and there were as many kills. Prints a line of JSON with the counts;
exits 1 when a byte of `model.safetensors`, the metrics or `submission.csv` differs, and fails when `fusion.verify`
calls anything damaged that an attempt has left.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

import pandas as pd

# Loaded before the ranks are forked, so that each starts at once. No thread runs yet.
import pyarrow.dataset  # noqa: F401
import s3fs  # noqa: F401
import torch._dynamo  # noqa: F401

import fusion.ablation.source_worth
import fusion.training.loop  # noqa: F401
from fusion import storage
from fusion.ablation import __main__ as ablation
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.prediction import resumable
from fusion.records import manifests
from fusion.records.run import RunFolder
from fusion.verify.__main__ import verify
from fusion.verify.output import is_output
from tests.chaos.boundaries import ALL, Boundary, arm

SMALL = ["--width", "16", "--hidden", "16", "8", "--batch-size", "64", "--lr", "0.01"]
SMALL += ["--device", "cpu", "--epochs", "4", "--checkpoint-steps", "3", "--run-id", "r"]
COMPUTED = ["--features", "text", "--columns", "category"]
SETTLE = 15.0  # seconds that the others get to end by themselves, as the launcher gives them some
PATIENCE = 300.0  # seconds after which an attempt that still runs counts as hung
IN_VAIN = 5  # runs in a row in which no boundary was met: those still owed do not exist


@dataclass
class Plan:
    """What is still to be struck, and what has been.

    Attributes:
        owed: times that each boundary is still to be struck.
        runs: begun so far.
        left: of the owed, what is to be struck in this run.
        struck: kills by boundary.
        random: kills at a random moment.
        victims: kills of "one rank" and of "all ranks"; a single rank is all.
    """

    rng: random.Random
    kills: int
    owed: Counter[Boundary]
    runs: int = 0
    left: list[Boundary] = field(default_factory=list)
    struck: Counter[Boundary] = field(default_factory=Counter)
    random: int = 0
    victims: Counter[str] = field(default_factory=Counter)

    @property
    def n_random_left(self) -> int:
        return self.kills - self.struck.total() - self.owed.total() - self.random

    @property
    def done(self) -> bool:
        return not self.owed and self.n_random_left <= 0

    def begin_run(self) -> None:
        self.runs, self.left = self.runs + 1, list(self.owed)

    def note(self, told: list[Boundary], at_random: bool, group: bool) -> None:
        for boundary in told:
            self.struck[boundary] += 1
            self.owed -= Counter([boundary])
            self.left = [other for other in self.left if other != boundary]
        self.random += at_random
        self.victims["all ranks" if group else "one rank"] += len(told) + at_random

    def tally(self) -> dict[str, object]:
        kinds = list(dict.fromkeys(boundary.kind for boundary in ALL))
        by_kind = {kind: {b.when: self.struck[b] for b in ALL if b.kind == kind and self.struck[b]} for kind in kinds}
        kills = self.struck.total() + self.random
        return {"kills": kills, "at random": self.random, **self.victims, "boundaries": by_kind}


@dataclass(frozen=True)
class Attempt:
    """How one try of a command goes: where SIGKILL waits for it, and whom it takes.

    Attributes:
        boundaries: the first of these that is met is the end,
        skip: or the next one but so many, of what comes again and again;
        seconds: else this long after the start, if not 0.
        rank: the one that dies at a random moment; at boundaries it is the one that meets them.
        group: the others die with it.
    """

    boundaries: list[Boundary]
    skip: int
    seconds: float
    rank: int
    group: bool


def main() -> int:
    options = _parse()
    resumable.PART_ROWS = 16
    wanted = Counter(dict.fromkeys(options.at or ALL, options.times))
    plan, in_vain = Plan(random.Random(options.seed), options.kills, wanted), 0
    expected = _finish(options, storage.join(options.output, "undisturbed"), Plan(random.Random(0), 0, Counter()))
    while not plan.done:
        before = plan.struck.total()
        plan.begin_run()
        found = _finish(options, storage.join(options.output, f"killed-{plan.runs}"), plan)
        if found != expected:
            print(f"run {plan.runs} ended with {found}, undisturbed: {expected}")
            return 1
        in_vain = 0 if plan.struck.total() > before or not plan.owed else in_vain + 1
        if in_vain == IN_VAIN:
            print(f"not met in {IN_VAIN} runs: {', '.join(map(str, plan.owed))}")
            return 1
    print(json.dumps({"identical_runs": plan.runs, **plan.tally()}))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, help="folder or bucket; runs go to numbered places below it")
    parser.add_argument("--kills", type=int, default=200, help="at least; what boundaries leave strikes at random")
    parser.add_argument("--times", type=int, default=2, help="that each boundary is struck")
    parser.add_argument("--at", nargs="+", type=Boundary.named, metavar="KIND:WHEN", help="instead of all boundaries")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _draw(plan: Plan, ranks: int) -> Attempt:
    rng = plan.rng
    rank, group = rng.randrange(ranks), ranks == 1 or rng.random() < 0.5
    share = 0 if plan.runs == 1 else 0.3  # the first run meets all boundaries, from the first to the last
    if plan.n_random_left > 0 and (not plan.left or rng.random() < share):
        return Attempt([], 0, rng.uniform(0.05, 1.5), rank, group)
    return Attempt(plan.left, rng.randrange(2), 0, rank, group)


def _finish(options: argparse.Namespace, output: str, plan: Plan) -> dict[str, str]:
    """Runs the commands until each ends with 0; digests of what they published."""
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
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in _published(output).items()}


def _published(output: str) -> dict[str, bytes]:
    run = storage.join(output, "runs", "r")
    current = json.loads(storage.read(f"{output}/pointers/submissions/test/current.json"))["submission"]
    epochs = pd.read_csv(io.BytesIO(storage.read(f"{run}/metrics/epochs.csv"))).drop(columns="seconds")
    return {
        "model": manifests.read_file(RunFolder(run).best(), manifests.MODEL),
        "epochs": epochs.to_csv().encode(),
        "metrics": storage.read(f"{run}/metrics/{manifests.MANIFEST}"),
        "ablation": storage.read(f"{run}/metrics/{manifests.ABLATION}"),
        "submission": storage.read(f"{output}/submissions/{current}/submission.csv"),
    }


def _try(job: Callable[[list[str]], int], flags: list[str], ranks: int, plan: Plan) -> bool:
    """Whether all ranks ended with 0; the plan learns what struck."""
    attempt = _draw(plan, ranks)
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as met:
        codes = _run(job, flags, ranks, attempt, said, met)
        met.seek(0)
        told = [Boundary.named(line) for line in met.read().decode().splitlines()]
        killed = any(code == 137 for code in codes)
        if any(codes) and not killed:
            said.seek(0)
            raise RuntimeError(f"an attempt that nobody killed ended with {codes}: {said.read().decode()[-4000:]}")
    plan.note(told, killed and not told, attempt.group)
    _check_whole(flags[flags.index("--output") + 1])
    return not any(codes)


def _check_whole(output: str) -> None:
    """Nothing that a kill leaves is damage."""
    wrong = [str(finding) for finding in verify(output) if finding.verdict == "BAD"] if is_output(output) else []
    if wrong:
        raise RuntimeError(f"verify calls what an attempt has left damaged: {wrong}")


def _run(
    job: Callable[[list[str]], int], flags: list[str], ranks: int, attempt: Attempt, said: IO[bytes], met: IO[bytes]
) -> list[int]:
    """Exit codes of the ranks; 137: killed."""
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _be_rank(rank, ranks, port, said)
            # Only parts and ends of epochs are everybody's: there the last rank dies, elsewhere the one that writes.
            arm([b for b in attempt.boundaries if rank == (ranks - 1 if b.everybodys else 0)], attempt.skip, met)
            os._exit(job(flags))
        children.append(child)
    return _wait(children, attempt)


def _be_rank(rank: int, ranks: int, port: int, said: IO[bytes]) -> None:
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
        if seconds > PATIENCE:
            raise RuntimeError(f"a rank still runs {PATIENCE:.0f} s after the attempt began: {codes}")
        if not victims and attempt.seconds and seconds > attempt.seconds:
            victims = {children[attempt.rank]}
        if 137 in codes.values():
            died = min(died, seconds)
        # A rank that dies before the group has met leaves the others waiting for it.
        if (attempt.group and (victims or died < math.inf)) or seconds > died + SETTLE:
            victims = set(children)
        for victim in victims - set(codes):  # not yet waited for, so their ids are still theirs
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
