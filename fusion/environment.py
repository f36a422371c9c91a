"""Environment variables: reading them (an empty one counts as unset), this process's rank, and library defaults."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import ConfigError

# Defaults for variables that libraries read when torch loads them.
# GOMP_SPINCOUNT, KMP_BLOCKTIME: by default, an OpenMP thread that waits for the other threads polls 300,000 times (GNU)
# or for 200 ms (Intel, LLVM) before it sleeps. If another process uses one of the cores, even at the lowest priority,
# a training step then takes ten times as long. With 2,000 polls it takes twice as long, and a third longer on a machine
# that is otherwise idle, because threads are woken up more often. (Measured by benchmarks/busy_neighbour.py: steps of
# the default model, which are short.)
# TORCH_CPP_LOG_LEVEL: the warnings of torch's C++ code concern host names and sockets. They do not follow our log
# format, and users can do nothing about them.
LIBRARIES = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
# The variables that set how OpenMP threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


def variable(*names: str) -> str | None:
    """The first of these variables that is set and not empty."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def for_libraries() -> dict[str, str]:
    """`LIBRARIES` without the variables that the user has set. If one of `WAITING` is set, all three are left out."""
    own = WAITING if variable(*WAITING) else ()
    return {name: value for name, value in LIBRARIES.items() if name not in own and not variable(name)}


def prepare_libraries() -> None:
    """Sets the variables of `for_libraries` in this process. Call it before torch is imported."""
    os.environ.update(for_libraries())


def prepare_threads() -> None:
    """Sets OMP_NUM_THREADS, unless it is set, to this rank's share of the usable cores, before torch is imported.

    By default OpenMP starts a thread per core of the machine. In a container whose quota is fewer cores, these threads
    use up the quota at once, and then all of them are stopped until the next period of the quota begins.
    """
    if not variable("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(_local_size()))


def threads_per_rank(n_ranks: int) -> int:
    """The threads of each of the ranks of a node."""
    return max(1, usable_cores() // n_ranks)


def _local_size() -> int:
    try:
        return rank_variables().local_size
    except ConfigError:  # it is raised again where the ranks join
        return 1


@dataclass(frozen=True)
class RankVariables:
    """This process's rank and the number of ranks, among all ranks and among those of its node.

    Attributes:
        ignored: names of variables that are set, but have no effect because others of `RANKS` are not.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    ignored: tuple[str, ...] = ()


def rank_variables() -> RankVariables:
    """The variables of `RANKS` as the launcher (`fusion.launch`, torchrun, srun) has set them; else one single rank.

    Clusters and notebooks sometimes set a few of these variables although there is only one process. So if RANK or
    WORLD_SIZE is missing, the others are ignored.

    Raises:
        ConfigError: the variables contradict each other.
    """
    numbers = {name: _number(name) for name in RANKS if variable(name)}
    _expect_below(numbers, "RANK", "WORLD_SIZE")
    _expect_below(numbers, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in numbers or "WORLD_SIZE" not in numbers:
        return RankVariables(ignored=tuple(numbers))
    if numbers["WORLD_SIZE"] == 1:
        return RankVariables()
    _check_complete(numbers)
    local_rank, local_size = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", 1)
    return RankVariables(numbers["RANK"], numbers["WORLD_SIZE"], local_rank, local_size)


def rank() -> int:
    """This process's rank; 0 if the variables contradict each other, so that at least one process prints the error."""
    try:
        return rank_variables().rank
    except ConfigError:
        return 0


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise _wrong(f"{name} is {text!r}, expected a number")
    return int(text)


def _expect_below(numbers: dict[str, int], name: str, limit: str) -> None:
    if numbers.get(limit) == 0:
        raise _wrong(f"{limit} is 0, expected at least 1")
    if name in numbers and limit in numbers and numbers[name] >= numbers[limit]:
        raise _wrong(f"{name} is {numbers[name]}, expected less than {limit}, which is {numbers[limit]}")


def _check_complete(numbers: dict[str, int]) -> None:
    given = f"RANK is {numbers['RANK']} and WORLD_SIZE is {numbers['WORLD_SIZE']}"
    absent = [name for name in RENDEZVOUS if not variable(name)]
    if ("LOCAL_RANK" in numbers) != ("LOCAL_WORLD_SIZE" in numbers):
        absent += [name for name in RANKS if name not in numbers]
    if absent:
        raise _wrong(f"{given}, but {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set")


def _wrong(message: str) -> ConfigError:
    return ConfigError(
        message, "start the ranks with python -m fusion.launch, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    )


def usable_memory() -> int:
    """Bytes of memory that this job may use: the limit of its cgroups, else the machine's memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, memory_limit() or physical)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The smallest memory limit, in bytes, of the cgroups that this process is in (version 2 or 1); None: no limit.

    Args:
        root: another root of the file system, for tests.
    """
    groups = _cgroups(root)
    second = _limits(root / "sys/fs/cgroup", groups.get("", ""), "memory.max")
    first = _limits(root / "sys/fs/cgroup/memory", groups.get("memory", ""), "memory.limit_in_bytes")
    return min([*second, *first], default=None)


def _limits(mount: Path, group: str, name: str) -> list[int]:
    """The limits of a cgroup and of those above it."""
    # Without a limit, version 2 says "max", and version 1 a number near 2**63.
    texts = [_text(folder / name).strip() for folder in _folders(mount, group)]
    return [int(text) for text in texts if text.isdecimal() and int(text) < 2**60]


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its CPU affinity, or fewer if its cgroups have a quota, which is rounded up.

    Args:
        root: as for `memory_limit`.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(n_cores, math.ceil(cpu_quota(root) or n_cores)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest quota, in cores, of the cgroups that this process is in (version 2 or 1); None: no quota.

    Args:
        root: as for `memory_limit`.
    """
    groups = _cgroups(root)
    second = [_text(folder / "cpu.max") for folder in _folders(root / "sys/fs/cgroup", groups.get("", ""))]
    folders = _folders(root / "sys/fs/cgroup/cpu", groups.get("cpu", ""))
    first = [f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}" for folder in folders]
    return min((quota for text in [*second, *first] for quota in _quota(text)), default=None)


def _quota(text: str) -> Iterator[float]:
    """The quota, in cores, of a text with the quota and its period; nothing if it is "max" or -1, for no limit."""
    with suppress(ValueError, ZeroDivisionError):
        quota, period = map(int, text.split())
        if quota > 0:
            yield quota / period


def _cgroups(root: Path) -> dict[str, str]:
    """The cgroup of this process for each controller of version 1, and for "" that of version 2."""
    found = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    return {kind: group.lstrip("/") for _, kinds, group in found for kind in kinds.split(",")}


def _folders(mount: Path, group: str) -> list[Path]:
    """The folders of a cgroup and of those above it."""
    return [mount / folder for folder in (Path(group), *Path(group).parents)]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
