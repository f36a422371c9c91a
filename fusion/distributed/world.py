"""The group of ranks this process belongs to: torchrun's, or a group of one.

Nothing else asks whether it is distributed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from fusion import environment, log
from fusion.distributed import transport
from fusion.distributed.heartbeats import ARRIVAL, FOR_EVER, Heartbeats
from fusion.environment import variable
from fusion.errors import ConfigError, FusionError, UnreachableError

T = TypeVar("T")

INTERFACE = "GLOO_SOCKET_IFNAME"
STALL_TIMEOUT = 600.0  # seconds, of commands that have no --stall-timeout


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks and among those of its node, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's contiguous part of `n` rows; the parts of all ranks are disjoint and cover every row once.

        >>> [World(rank, 3, rank, 3, torch.device("cpu")).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64: the same numbers on every rank."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=_control())
        return cast(list[float], total.tolist())

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 only; its result, or its error, on every rank.

        The result is broadcast once; the memory of its NumPy arrays is sent as it is (see
        `fusion.distributed.transport`).
        """
        result, failure = _tried(action) if self.is_main else (None, None)
        answer, failed = transport.broadcast((result, _portable(failure, self.rank)), _control())
        if failed is not None:
            raise failure or failed
        return cast(T, answer)

    def on_main_alone(self, action: Callable[[], T]) -> T | None:
        """Result of `action` on rank 0, None on the others, to which it is not sent (see `held`).

        An error is raised on every rank.
        """
        return self.together(lambda: action() if self.is_main else None)

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; when it fails on one, the same error is raised on all.

        Returns this rank's result.
        """
        result, failure = _tried(action)
        (n_failed,) = self.sum([float(failure is not None)])
        if n_failed:
            failures = self.exchange(_portable(failure, self.rank))
            raise failure or next(other for other in failures if other is not None)
        return cast(T, result)

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on every rank.

        For small control values only: each is pickled, padded to the largest, and sent to all.
        """
        answers: list[T | None] = [None] * self.size
        dist.all_gather_object(answers, value, group=_control())
        return cast(list[T], answers)

    def gather_on_main(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on rank 0; an empty list on the others.

        For results of any size: each rank's is sent once, at its own size, arrays without a copy.
        """
        if self.is_main:
            return [value, *(transport.receive(rank, _control()) for rank in range(1, self.size))]
        transport.send(value, 0, _control())
        return []


def held(result: T | None) -> T:
    """What `World.on_main_alone` gave, on rank 0."""
    assert result is not None, "only rank 0 has it"
    return result


def _control() -> dist.ProcessGroup | None:
    # Small control messages travel over gloo, also where gradients travel over nccl.
    return _groups.get("control")


_groups: dict[str, dist.ProcessGroup] = {}


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `action`, or its error."""
    try:
        return action(), None
    except Exception as error:  # raised on all ranks by the caller
        return None, error


def _portable(failure: Exception | None, rank: int) -> Exception | None:
    if failure is None or isinstance(failure, FusionError):
        return failure
    return RuntimeError(f"rank {rank} failed: {type(failure).__name__}: {failure}")


@contextmanager
def world(device: str = "auto", stall_timeout: float = STALL_TIMEOUT) -> Iterator[World]:
    """Joins torchrun's group, or makes a group of one; leaves it at the end.

    Ranks wait for one another for as long as all of them give signs of life (see `fusion.distributed.heartbeats`).

    Args:
        stall_timeout: seconds without a sign of life of a rank after which the others end with 124; 0: they never do.

    Raises:
        ConfigError: a cuda device is asked for and there is none.
        UnreachableError: not all ranks came.
    """
    place = _place(device)
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    store: Store = HashStore()
    heartbeats: Heartbeats | None = None
    if place.size > 1:
        _check_interface()
        store = _meeting_point(place)
        heartbeats = Heartbeats(store, place.rank, place.size, stall_timeout)
    try:
        with _group(backend, store, place):
            yield place
            _wait_for_all(place, heartbeats)
    finally:
        if heartbeats:
            heartbeats.stop()


def _meeting_point(place: World) -> Store:
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UnreachableError(
            f"rank {place.rank} did not meet all {place.size} ranks at {where} within {ARRIVAL:.0f} s: "
            f"{str(error).splitlines()[0]}",
            "see the logs of the other ranks; start all of them within that time",
        ) from error
    return cast(Store, store)


@contextmanager
def _group(backend: str, store: Store, place: World) -> Iterator[None]:
    with _without_interface() if place.size == 1 else nullcontext():
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=FOR_EVER)
    try:
        if backend == "nccl":
            torch.cuda.set_device(place.device)
            _groups["control"] = dist.new_group(backend="gloo", timeout=FOR_EVER)
        yield
    finally:
        _groups.clear()
        dist.destroy_process_group()


def _wait_for_all(place: World, heartbeats: Heartbeats | None) -> None:
    dist.barrier(group=_control())
    if heartbeats:
        heartbeats.stop()
        dist.barrier(group=_control())  # nobody asks the store of rank 0 any more
    # gloo can abort a rank whose peer has already torn its connections down.
    time.sleep(0.05 if place.size > 1 else 0)


@contextmanager
def _without_interface() -> Iterator[None]:
    """A group of one talks to nobody: which network interface others of this cluster use is nothing to it."""
    interface = os.environ.pop(INTERFACE, None)
    try:
        yield
    finally:
        if interface is not None:
            os.environ[INTERFACE] = interface


def _check_interface() -> None:
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, (variable(INTERFACE) or "").split(",")):
        if name not in there:
            raise ConfigError(
                f"{INTERFACE} is {name}, and the network interfaces of this machine are {', '.join(there)}",
                f"set {INTERFACE} to one of these, or unset it",
            )


def _place(device: str) -> World:
    found = environment.place()
    if found.ignored:
        log.warning(
            event="rank_variables_ignored",
            ignored=" ".join(found.ignored),
            hint="unset them; ranks are started with python -m fusion.launch",
        )
    if found.local_size > 1 and ":" in device:
        message = f"--device is {device}, and all {found.local_size} ranks of this machine would use it"
        raise ConfigError(message, "use --device cuda, which gives each rank a GPU of its own")
    return World(found.rank, found.size, found.local_rank, found.local_size, _device(device, found.local_rank))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name} but torch {torch.__version__} finds no GPU", "use --device cpu or auto")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
