"""Starts a command's ranks on this node, waits for all of them, and exits with their exit code and a single message.

    python -m fusion.launch --nproc-per-node 4 fusion.all_embeddings.train --data s3://b/data --output s3://b/output
    python -m fusion.launch --nproc-per-node 2 fusion.all_embeddings.train --device cpu --epochs 5 …    (on a CPU)

Use it in place of torchrun. It sets the same variables (RANK, WORLD_SIZE, MASTER_ADDR, …), which torch's `env://`
reads. It differs from torchrun in three ways: torchrun exits with 1 whatever the ranks' exit codes are, signals all
ranks again when the first one exits, and waits 30 s for ranks that hang. Linux only, because there the kernel kills the
ranks if the launcher is killed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusion.environment import for_libraries, prepare_libraries, threads_per_rank, usable_cores, variable
from fusion.errors import ConfigError, ExitCode, FusionError, Parser, StopRequested, UsageError, seconds
from fusion.launch.processes import Ending, Group, Rank, Stop
from fusion.launch.rendezvous import MultiNodeRendezvous, Rendezvous
from fusion.terminal.error_display import print_report
from fusion.terminal.help_screen import Rare
from fusion.terminal.spelling import module_of
from fusion.terminal.streams import unfailing

# Exit codes after which a restart would not help.
FINAL = (ExitCode.DONE, ExitCode.USAGE, ExitCode.DATA, ExitCode.STOPPED, ExitCode.CREDENTIALS, ExitCode.CONFIG)


@dataclass(frozen=True)
class Options:
    nproc_per_node: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    max_restarts: int
    grace: float
    command: tuple[str, ...]


def launch(options: Options, stop: Stop) -> int:
    """Runs the ranks of this node. Prints the cause of a failure, and returns the exit code of all nodes together.

    Raises:
        StopRequested: a stop was requested before any rank was started.
    """
    if stop.name:
        raise StopRequested(f"asked to stop ({stop.name}) before any rank was started", "run the same command again")
    _temporary_folder()  # raises a ConfigError if there is none; done first, before a port is reserved
    rendezvous = _rendezvous(options, stop)
    for restart in range(options.max_restarts + 1):
        ending = _attempt(options, rendezvous, stop, restart)
        if ending.code in FINAL or stop.name or restart == options.max_restarts:
            break
        _say(f"{ending.report}\nrestart {restart + 1} of {options.max_restarts}: starting all ranks again")
    ending = rendezvous.conclude(ending, stop)
    _say(ending.report)
    return ending.code


def _rendezvous(options: Options, stop: Stop) -> Rendezvous:
    if options.nnodes == 1:
        return Rendezvous()
    address = options.master_addr, options.master_port
    return MultiNodeRendezvous(options.node_rank, options.nnodes, address, options.grace, stop)


def _attempt(options: Options, rendezvous: Rendezvous, stop: Stop, restart: int) -> Ending:
    with tempfile.TemporaryDirectory(prefix="fusion-", dir=_temporary_folder()) as folder:
        shared = {**_environment(options, restart), **rendezvous.environment(), "FUSION_EXIT_DIR": folder}
        first = options.node_rank * options.nproc_per_node
        ranks = [
            Rank(first + local, options.command, {**shared, "RANK": str(first + local), "LOCAL_RANK": str(local)})
            for local in range(options.nproc_per_node)
        ]
        group = Group(ranks, options.grace)
        try:
            group.watch(stop, rendezvous)
        finally:
            group.kill()
        return group.ending(Path(folder))


def _temporary_folder() -> str:
    from fusion.storage.scratch import temporary_folder  # loads fsspec, which --help does not need

    return temporary_folder()


def _environment(options: Options, restart: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": variable("OMP_NUM_THREADS") or str(threads_per_rank(options.nproc_per_node)),
        **for_libraries(),
        "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": str(options.nnodes * options.nproc_per_node),
        "LOCAL_WORLD_SIZE": str(options.nproc_per_node),
        "GROUP_RANK": str(options.node_rank),
        "TORCHELASTIC_RESTART_COUNT": str(restart),
    }


def _say(report: str) -> None:
    if report:
        print_report(report)


def _parser() -> Parser:
    parser = Parser("python -m fusion.launch", description=__doc__)
    parser.example = "fusion.all_embeddings.train --data s3://my-bucket/data --output s3://my-bucket/output"
    add = parser.add_argument
    add("--nproc-per-node", metavar="N", type=_n_ranks, help="ranks of this node: a number, gpu (one per GPU), cpu "
        "(one per core), or auto: one per GPU, or a single one without")  # fmt: skip
    add("--nnodes", metavar="N", type=_number(1), help="number of nodes; each runs one launcher")
    add("--node-rank", metavar="N", type=_number(0), help="number of this node, from 0")
    address = variable("MASTER_ADDR", "PET_MASTER_ADDR") or _first_host(variable("SLURM_STEP_NODELIST") or "")
    add("--master-addr", metavar="HOST", default=address, help="name or address of node 0")
    add("--master-port", metavar="PORT", type=_number(1), help="free port of node 0; with a single node, one is found "
        "automatically")  # fmt: skip
    add("--rdzv-endpoint", metavar="ADDR:PORT", default="",
        help=Rare("--master-addr and --master-port in one flag"))  # fmt: skip
    add("--max-restarts", metavar="N", type=_number(0), default=0, help=Rare("how often all ranks are started again "
        "after one has failed; never after exit codes that a retry cannot change (64, 65, 75, 77, 78)"))  # fmt: skip
    add("--grace", metavar="S", type=seconds, default=60.0, help=Rare("seconds that the ranks get to end after a stop "
        "signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2), which reaches them as one SIGTERM"))  # fmt: skip
    add("module", metavar="MODULE", help="module to run, such as fusion.all_embeddings.train; or train VARIANT")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _n_ranks(text: str) -> int:
    if text == "cpu":
        return usable_cores()
    if text not in ("auto", "gpu"):
        return _number(1)(text)
    import torch  # takes seconds to load, and is not needed for a number or for --help

    if text == "gpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"is gpu, but torch {torch.__version__} finds none")
    return torch.cuda.device_count() or 1


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"is {text}, expected at least {least}")
        return int(text)

    return number


# For each option: the variables that set it if its flag is not given, its type, and its default.
VARIABLES: dict[str, tuple[tuple[str, ...], Callable[[str], int], str | None]] = {
    "nproc_per_node": (("PET_NPROC_PER_NODE",), _n_ranks, "auto"),
    "nnodes": (("PET_NNODES", "SLURM_STEP_NUM_NODES"), _number(1), "1"),
    "node_rank": (("PET_NODE_RANK", "JOB_COMPLETION_INDEX", "SLURM_NODEID"), _number(0), None),
    "master_port": (("MASTER_PORT", "PET_MASTER_PORT"), _number(1), "29500"),
}


def _parse(argv: Sequence[str] | None) -> Options:
    given = _parser().parse_args(argv)
    _add_variables(given)
    module, *arguments = module_of([given.module, *given.arguments])
    given.command = (sys.executable, "-m", _known(module), *arguments)
    if given.rdzv_endpoint:
        address, _, port = given.rdzv_endpoint.rpartition(":")
        given.master_addr = address.strip("[]")
        given.master_port = int(port) if port.isdecimal() else 0
    if given.nnodes == 1:
        given.node_rank = 0
    else:
        _check_nodes(given)
    return Options(**{name: getattr(given, name) for name in Options.__dataclass_fields__})


def _add_variables(given: argparse.Namespace) -> None:
    """Sets options whose flags are not given, from variables of torchrun, Kubernetes and Slurm, or by default."""
    for key, (names, kind, default) in VARIABLES.items():
        if getattr(given, key) is not None:
            continue
        name = next((name for name in names if variable(name)), "")
        text = variable(name) or default
        try:
            setattr(given, key, None if text is None else kind(text))
        except (ValueError, argparse.ArgumentTypeError) as error:
            problem = error if isinstance(error, argparse.ArgumentTypeError) else f"is {text!r}, expected one number"
            remedy = f"set {name} to one number, or give --{key.replace('_', '-')}"
            raise ConfigError(f"{name} {problem}", remedy) from None


def _check_nodes(given: argparse.Namespace) -> None:
    if given.node_rank is None or given.node_rank >= given.nnodes:
        message = f"--nnodes is {given.nnodes}, but --node-rank is {given.node_rank}"
        raise UsageError(message, f"give --node-rank 0..{given.nnodes - 1}; Kubernetes sets it as JOB_COMPLETION_INDEX")
    if not given.master_addr or not 0 < given.master_port < 65536:
        message = (
            f"--nnodes is {given.nnodes}, but the address of node 0 is {given.master_addr or '?'}:{given.master_port}"
        )
        raise UsageError(message, "give --master-addr and --master-port, or MASTER_ADDR and MASTER_PORT")
    if given.max_restarts:
        message = f"--max-restarts is {given.max_restarts} with --nnodes {given.nnodes}, expected 0"
        raise UsageError(message, "let the JobSet or Slurm start all nodes again")


def _known(module: str) -> str:
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec(module):
            return module
    raise UsageError(f"there is no module {module!r}", "name one as in python -m, such as fusion.all_embeddings.train")


def _first_host(nodes: str) -> str:
    """First name of a Slurm node list.

    >>> [_first_host(nodes) for nodes in ("gpu[003-007,9]", "gpu1,gpu2", "rack[1-2]-n4", "")]
    ['gpu003', 'gpu1', 'rack1-n4', '']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else "")


def main(argv: Sequence[str] | None = None) -> int:
    stop = Stop()  # before anything slow, such as counting the GPUs, so that no stop signal is missed
    prepare_libraries()  # with several nodes, the launcher loads torch, for its store
    with unfailing():
        return _guarded(argv, stop)


def _guarded(argv: Sequence[str] | None, stop: Stop) -> int:
    try:
        return launch(_parse(argv), stop)
    except FusionError as error:
        _say(error.report())
        return error.code
    except Exception:
        _say(f"{traceback.format_exc()}error: this is a bug in fusion.launch\nhint: report it with the lines above")
        return ExitCode.BUG
