"""What the environment tells a process: settings, where an empty variable is unset, and which of the ranks it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fusion.errors import ConfigError

# What libraries read when torch loads them. An OpenMP thread that waits for the others looks 300,000 times before it
# sleeps (GNU), or spins for 200 ms (Intel, LLVM): beside one busy process, even of the lowest priority, a step takes
# ten times longer, see benchmarks/busy_neighbour.py. On a machine of one's own, 1,000 looks cost up to a fifth of a
# step of 0.3 s, and mostly nothing that can be measured.
# Warnings of torch's C++ are about names and sockets, in a format of their own, and nothing a user could act on.
LIBRARIES = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


def variable(*names: str) -> str | None:
    """The first of these variables that is set and not empty."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def for_libraries() -> dict[str, str]:
    """`LIBRARIES`, without what the user has decided: who sets one way of waiting decides on all of them."""
    own = WAITING if variable(*WAITING) else ()
    return {name: value for name, value in LIBRARIES.items() if name not in own and not variable(name)}


def prepare_libraries() -> None:
    """Sets `for_libraries` for this process; to be called before torch loads."""
    os.environ.update(for_libraries())


@dataclass(frozen=True)
class Place:
    """Which of the ranks a process is, among all and among those of its node.

    Attributes:
        ignored: variables of ranks that are set although no group can be made of them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    ignored: tuple[str, ...] = ()


def place() -> Place:
    """This process's place as its launcher (`fusion.launch`, torchrun, srun) has set it, or alone.

    Clusters and notebooks leave some of these variables where nobody launches ranks: those of an incomplete set count
    for nothing.

    Raises:
        ConfigError: the variables contradict each other.
    """
    numbers = {name: _number(name) for name in RANKS if variable(name)}
    _expect_below(numbers, "RANK", "WORLD_SIZE")
    _expect_below(numbers, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in numbers or "WORLD_SIZE" not in numbers:
        return Place(ignored=tuple(numbers))
    if numbers["WORLD_SIZE"] == 1:
        return Place()
    _check_complete(numbers)
    local_rank, local_size = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", 1)
    return Place(numbers["RANK"], numbers["WORLD_SIZE"], local_rank, local_size)


def rank() -> int:
    """As in `place`; 0 where the variables contradict each other, so that one process at least says so."""
    try:
        return place().rank
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
    absent = [name for name in MEETING if not variable(name)]
    if ("LOCAL_RANK" in numbers) != ("LOCAL_WORLD_SIZE" in numbers):
        absent += [name for name in RANKS if name not in numbers]
    if absent:
        raise _wrong(f"{given}, but {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set")


def _wrong(message: str) -> ConfigError:
    return ConfigError(message, "start ranks with python -m fusion.launch, or unset RANK, WORLD_SIZE and LOCAL_RANK")
