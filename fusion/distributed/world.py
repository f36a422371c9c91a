"""`World`: the process group that this process belongs to, and the operations that its ranks do together.

Without a launcher it is a group of one rank, so that no other code has to distinguish the two cases.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from fusion import environment, log
from fusion.distributed import transport
from fusion.distributed.heartbeats import ARRIVAL_TIMEOUT, NO_TIMEOUT, Heartbeats
from fusion.environment import variable
from fusion.errors import ConfigError, FusionError, UnreachableError

T = TypeVar("T")

INTERFACE = "GLOO_SOCKET_IFNAME"  # environment variable: the network interfaces that gloo uses
STALL_TIMEOUT = 600.0  # seconds; for commands without --stall-timeout, the same as that flag's default


@dataclass(frozen=True)
class World:
    """This process's rank among all ranks and among those of its node, and the device that it computes on.

    Attributes:
        rank, size: the rank, and the number of ranks, of all nodes.
        local_rank, local_size: the same on this node.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's contiguous share of `n` rows. The shares of all ranks are disjoint and cover all rows.

        >>> [World(rank, 3, rank, 3, torch.device("cpu")).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64; all ranks get the same sums."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=_control())
        return cast(list[float], total.tolist())

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 only, and returns its result, or raises its error, on every rank.

        The result is broadcast by `fusion.distributed.transport`, which sends NumPy arrays without pickling them.
        """
        result, failure = _tried(action) if self.is_main else (None, None)
        received, error = transport.broadcast((result, _portable(failure, self.rank)), _control())
        if error is not None:
            raise failure or error  # rank 0 raises the original error, with its traceback
        return cast(T, received)

    def on_main_alone(self, action: Callable[[], T]) -> T | None:
        """Runs `action` on rank 0 only, and returns its result there. Other ranks return None; nothing is sent to them.

        An error is raised on every rank. Use `held` to tell the type checker that this is rank 0.
        """
        return self.together(lambda: action() if self.is_main else None)

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank, and returns this rank's result. If it fails on one rank, all ranks raise."""
        result, failure = _tried(action)
        (n_failed,) = self.sum([float(failure is not None)])
        if n_failed:
            failures = self.exchange(_portable(failure, self.rank))
            raise failure or next(other for other in failures if other is not None)
        return cast(T, result)

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on every rank.

        Only for small values: each is pickled, padded to the size of the largest, and sent to all ranks.
        """
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=_control())
        return cast(list[T], values)

    def of_node(self, value: T) -> T:
        """The value of the first rank of this node, on all of its ranks. Only for small values, see `exchange`."""
        return self.exchange(value)[self.rank - self.local_rank]

    def gather_on_main(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on rank 0; an empty list on other ranks.

        For values of any size: each is sent once, without padding, and its arrays are not pickled.
        """
        if self.is_main:
            return [value, *(transport.receive(rank, _control()) for rank in range(1, self.size))]
        self.send_to_main(value)
        return []

    def send_to_main(self, value: object) -> None:
        """Sends a value to rank 0, which must call `receive`."""
        transport.send(value, 0, _control())

    def receive(self, rank: int) -> Any:
        """The value that another rank sends with `send_to_main`. Only rank 0 calls this."""
        return transport.receive(rank, _control())

    def broadcast_from(self, rank: int, values: Tensor) -> Tensor:
        """The tensor of one rank, on every rank. The others pass one of the same shape and type."""
        sent = values.contiguous().view(torch.uint8).clone()
        dist.broadcast(sent, src=rank, group=_control())
        return sent.view(values.dtype)

    def united(self, flags: Tensor) -> Tensor:
        """[N] bool: the flag is set on any rank."""
        found = flags.to(torch.uint8, copy=True)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_control())
        return found.bool()


def held(result: T | None) -> T:
    """The result of `World.on_main_alone`, in code that only runs on rank 0."""
    assert result is not None, "only rank 0 has the result"
    return result


def _control() -> dist.ProcessGroup | None:
    """The group for values in CPU memory: gloo, even if gradients are exchanged over nccl. None: the default group."""
    return _groups.get("control")


_groups: dict[str, dist.ProcessGroup] = {}


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `action`, or its error."""
    try:
        return action(), None
    except Exception as error:  # the caller raises it on all ranks
        return None, error


def _portable(failure: Exception | None, rank: int) -> Exception | None:
    """The error in a form that can be pickled, for other ranks."""
    if failure is None or isinstance(failure, FusionError):
        return failure
    return RuntimeError(f"rank {rank} failed: {type(failure).__name__}: {failure}")


@contextmanager
def join_world(device: str = "auto", stall_timeout: float = STALL_TIMEOUT) -> Iterator[World]:
    """Joins the group of a launcher such as `fusion.launch` or torchrun, or creates a group of one rank.

    Leaves the group at the end of the block. Ranks wait for each other for as long as all of them send heartbeats (see
    `fusion.distributed.heartbeats`).

    Args:
        stall_timeout: seconds without a heartbeat of a rank after which the others exit with 124; 0: they never do.

    Raises:
        ConfigError: `device` is cuda, but torch finds no GPU.
        UnreachableError: not all ranks have joined in time.
    """
    world = _read_world(device)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    store: Store = HashStore()
    heartbeats: Heartbeats | None = None
    if world.size > 1:
        _check_interface()
        store = _rendezvous(world)
        heartbeats = Heartbeats(store, world.rank, world.size, stall_timeout)
    try:
        with _group(backend, store, world):
            yield world
            _wait_for_all(world, heartbeats)
    finally:
        if heartbeats:
            heartbeats.stop()


@contextmanager
def alone(device: str = "auto") -> Iterator[World]:
    """A group of this process alone, whatever the variables of a launcher say; it ends with the block.

    Raises:
        ConfigError: `device` is cuda, but torch finds no GPU, or the process is in another group.
    """
    world = World(0, 1, 0, 1, _device(device, 0))
    on_device = torch.cuda.device(world.device) if world.device.type == "cuda" else nullcontext()
    with _group("gloo", HashStore(), world), on_device:  # nothing is exchanged between GPUs
        yield world


def _rendezvous(world: World) -> Store:
    """The store through which the ranks find each other, once all have joined it."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=ARRIVAL_TIMEOUT)))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UnreachableError(
            f"rank {world.rank} did not reach all {world.size} ranks at {where} within {ARRIVAL_TIMEOUT:.0f} s: "
            f"{str(error).splitlines()[0]}",
            "see the logs of the other ranks; start all of them within that time",
        ) from error
    return cast(Store, store)


@contextmanager
def _group(backend: str, store: Store, world: World) -> Iterator[None]:
    if dist.is_initialized():
        raise ConfigError(
            "this process is in a process group of torch.distributed already",
            "leave it first: torch.distributed.destroy_process_group()",
        )
    with _without_interface() if world.size == 1 else nullcontext():
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=NO_TIMEOUT)
    try:
        if backend == "nccl":
            torch.cuda.set_device(world.device)
            _groups["control"] = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
        yield
    finally:
        _groups.clear()
        dist.destroy_process_group()


def _wait_for_all(world: World, heartbeats: Heartbeats | None) -> None:
    dist.barrier(group=_control())
    if heartbeats:
        heartbeats.stop()
        dist.barrier(group=_control())  # after it, no rank uses the store of rank 0 any more, so that rank 0 may exit
    # gloo can abort a rank whose peer has already closed its connections. 50 ms let all ranks leave the barrier first.
    time.sleep(0.05 if world.size > 1 else 0)


@contextmanager
def _without_interface() -> Iterator[None]:
    """Unsets `INTERFACE` inside the block: a single rank needs no network, and the interface may not exist here."""
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
                f"{INTERFACE} is {name}, but the network interfaces of this machine are {', '.join(there)}",
                f"set {INTERFACE} to one of these, or unset it",
            )


def _read_world(device: str) -> World:
    found = environment.rank_variables()
    if found.ignored:
        log.warning(
            event="rank_variables_ignored",
            ignored=" ".join(found.ignored),
            hint="unset them, or start ranks with python -m fusion.launch",
        )
    if found.local_size > 1 and ":" in device:
        message = f"--device is {device}, but then all {found.local_size} ranks of this machine would share it"
        raise ConfigError(message, "use --device cuda, which gives each rank a GPU of its own")
    return World(found.rank, found.size, found.local_rank, found.local_size, _device(device, found.local_rank))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name} but torch {torch.__version__} finds no GPU", "use --device cpu or auto")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
