"""Holds the embeddings of all rows of a split in memory, and gathers batches of rows from them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from fusion.config import Residency
from fusion.data.mapped_file import MappedFile
from fusion.data.node_rows import NodeRows
from fusion.distributed.world import World
from fusion.environment import usable_memory
from fusion.nn.batch import Batch
from fusion.nn.neighbours import CandidateTable

DIGEST_ROWS = 4096  # rows converted to float32 at a time, so that a digest needs little memory
COPIED_AHEAD = 2  # batches on their way to the GPU while it computes another one
AHEAD_BYTES = 1 << 26  # of rows that are being read from disk before they are used: a batch takes milliseconds


@dataclass(frozen=True)
class SourceArrays:
    """What is read of a source, for N rows.

    Attributes:
        values: [N, D] vectors, float16 or float32; zeros where there is no usable vector.
        present: [N] bool; the row has a usable vector.
        zeros: [N] bool; the row's vector is all zeros, which counts as missing.
        known: [N] bool; the source has the row's id.
        file: the file that `values` is mapped from; None if it is in memory.
    """

    values: Tensor
    present: Tensor
    zeros: Tensor
    known: Tensor
    file: MappedFile | None = None


@dataclass(frozen=True)
class RowStore:
    """Embeddings of N rows.

    Attributes:
        values: role to [N, D_role], float16 or float32; zeros where the role is missing.
        present: role to [N] bool; whether the row has this role.
        computed: roles that were computed from the table instead of read from a source.
        origins: [N] int64 hashes of the texts and columns from which these were computed; None without such roles.
        folds, groups: [N] int64, see `Batch`.
        candidates: candidate neighbours of all rows, if they were searched before.
        is_projected: see `Batch`.
        maps: role to the file that its values are mapped from.
        is_mapped: whether rows are read from these files when they are used, rather than kept in memory.
        nodes: which rows each node holds. Then `values` are only this node's; all else is of all N rows. None: every
            node holds all rows.
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor]
    computed: tuple[str, ...] = ()
    origins: Tensor | None = None
    folds: Tensor | None = None
    groups: Tensor | None = None
    candidates: CandidateTable | None = None
    is_projected: bool = False
    maps: Mapping[str, MappedFile] = field(default_factory=dict)
    is_mapped: bool = False
    nodes: NodeRows | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, SourceArrays], nodes: NodeRows | None = None) -> RowStore:
        """The rows of sources, by role."""
        values = {role: one.values for role, one in arrays.items()}
        present = {role: one.present for role, one in arrays.items()}
        return cls(values, present, maps={role: one.file for role, one in arrays.items() if one.file}, nodes=nodes)

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @property
    def dims(self) -> dict[str, int]:
        return {role: values.shape[1] for role, values in self.values.items()}

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """The rows with these positions [B], which this node must hold, on a device."""
        rows = rows.to(next(iter(self.present.values())).device)
        places = self._places(rows)
        inputs = {role: _selected(values, places, device).float() for role, values in self.values.items()}
        present = {role: _selected(values, rows, device) for role, values in self.present.items()}
        folds, groups = _gathered(self.folds, rows, device), _gathered(self.groups, rows, device)
        candidates = self.candidates.of(rows) if self.candidates else None
        return Batch(inputs, present, folds, groups, candidates, self.is_projected)

    def batches(self, parts: Iterable[Tensor], device: torch.device, together: int = 1) -> Iterator[Batch]:
        """The batch of each part, which are positions [B]. Rows are read and copied to a GPU some batches ahead.

        Args:
            together: number of parts whose mapped rows are read in one pass over the files.
        """
        parts = self._read_ahead(parts, together) if self.is_mapped else parts
        if device.type == "cpu" or self.is_on_gpu:
            yield from (self.batch(rows, device) for rows in parts)
        else:
            yield from self._copied_ahead(parts, device)

    def _read_ahead(self, parts: Iterable[Tensor], together: int) -> Iterator[Tensor]:
        """The same parts, whose mapped rows have been asked for from the disk."""
        with ExitStack() as stack:
            reader = stack.enter_context(ThreadPoolExecutor(1))
            for file in self.maps.values():
                stack.enter_context(file.used_at_random())
            for some in self._expected(parts, together, reader):
                yield from some

    def _copied_ahead(self, parts: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """The batch of each part. The next one is copied in a stream of its own while the GPU computes."""
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))  # it made the tables that batches are gathered from

        def copied(rows: Tensor) -> Batch:
            with torch.cuda.stream(stream):
                return self.batch(rows, device)

        with ThreadPoolExecutor(1) as copier:
            ahead = deque[Future[Batch]]()
            for rows in parts:
                ahead.append(copier.submit(copied, rows))
                if len(ahead) > COPIED_AHEAD:
                    yield _ready(ahead.popleft().result(), stream)
            while ahead:
                yield _ready(ahead.popleft().result(), stream)

    def _expected(self, parts: Iterable[Tensor], together: int, reader: Executor) -> Iterator[list[Tensor]]:
        """Yields the parts in groups of `together`, while the next group, and perhaps more, is being read."""
        rest, row_bytes = iter(parts), self.n_bytes // len(self)
        expected, n_rows = deque[list[Tensor]](), 0
        while some := list(islice(rest, together)):
            reader.submit(self._expect, torch.cat(some))
            expected.append(some)
            n_rows += sum(map(len, some))
            if len(expected) > 1 and n_rows * row_bytes > AHEAD_BYTES:
                n_rows -= sum(map(len, expected[0]))
                yield expected.popleft()
        yield from expected

    def _expect(self, rows: Tensor) -> None:
        ascending = rows.sort().values
        for file in self.maps.values():
            file.expect(ascending)

    def resident_on(self, device: torch.device, residency: Residency = "auto") -> RowStore:
        """The same rows where batches are gathered from.

        Args:
            residency: "device": the GPU's memory; "host": this node's memory, or its page cache; "mapped": the files of
                the cache, from which rows are read when they are needed. "auto": the GPU's memory, if half of what is
                free there suffices (the other half is for the model, its optimizer and activations); else the files,
                if there are any and the rows would fill more than half of the memory that this job may use.
        """
        on_gpu = device.type == "cuda"
        if on_gpu and (residency == "device" or (residency == "auto" and self.n_bytes <= _free_on(device) // 2)):
            values, present = _moved(self.values, device), _moved(self.present, device)
            folds, groups = (None if one is None else one.to(device) for one in (self.folds, self.groups))
            return replace(self, values=values, present=present, folds=folds, groups=groups, maps={})
        return replace(self, is_mapped=True) if self.exceeds_memory(residency) else self

    def exceeds_memory(self, residency: Residency) -> bool:
        """Whether rows are to be read from their files rather than kept in this node's memory."""
        is_large = bool(self.maps) and self.n_bytes > usable_memory() // 2
        return residency == "mapped" or (residency == "auto" and is_large)

    @property
    def first_held(self) -> int:
        """The first row whose vectors this node holds."""
        return 0 if self.nodes is None else self.nodes.first

    @property
    def n_held(self) -> int:
        """Number of rows whose vectors this node holds."""
        return len(self) if self.nodes is None else len(self.nodes)

    @property
    def is_on_gpu(self) -> bool:
        return all(values.device.type == "cuda" for values in self.values.values())

    @property
    def n_bytes(self) -> int:
        return sum(values.nbytes for values in self.values.values())

    def of_roles(self, roles: Iterable[str]) -> RowStore:
        """The same rows with only these roles, and without folds, groups and candidates."""
        values, present = ({role: part[role] for role in roles} for part in (self.values, self.present))
        return RowStore(values, present, nodes=self.nodes)

    def own(self, rows: Tensor) -> Tensor:
        """Those of ascending positions [n] that this node holds."""
        return rows if self.nodes is None else self.nodes.own(rows)

    def held(self, role: str, rows: Tensor) -> Tensor:
        """[n, D] the vectors of these rows [n], which this node must hold."""
        return self.values[role][self._places(rows)]

    def _places(self, rows: Tensor) -> Tensor:
        """Where in `values` the vectors of these rows [n] are."""
        return rows - self.first_held if self.first_held else rows

    def any_present(self) -> Tensor:
        """[N] bool: the row has at least one embedding."""
        return torch.stack(list(self.present.values())).any(0)

    @cached_property
    def digest(self) -> str:
        """sha256 of values and presence. It depends on the rows alone, not on how they are spread over files."""
        return self._digest(self.values, slice(None), lambda role: [self.values[role]])

    def digest_of(self, rows: Tensor) -> str:
        """sha256 of the values (as float32) and the presence of these rows, in their order.

        For computed roles, it covers what they were computed from instead of their values, which may be rounded
        differently on another machine.
        """
        roles = set(self.values).difference(self.computed)
        return self._digest(roles, rows, lambda role: self._float_chunks(role, rows), self.origins)

    def nodes_digest(self, world: World, rows: Tensor | None = None) -> str:
        """`digest`, or `digest_of` ascending rows, of a store that the nodes hold together; only on rank 0.

        All ranks call this. The vectors of all nodes are sent to rank 0 in turn, so that the digest is that of a store
        that holds all rows.
        """
        assert self.nodes is not None
        nodes, all_rows = self.nodes, torch.arange(len(self))

        def values(role: str) -> Iterator[Tensor]:
            for chunk in nodes.on_main(self.values[role], all_rows if rows is None else rows, world):
                yield chunk if rows is None else chunk.float()

        return self._digest(self.values, slice(None) if rows is None else rows, values)

    def _float_chunks(self, role: str, rows: Tensor) -> Iterator[Tensor]:
        yield from (self.values[role][chunk].float() for chunk in torch.split(rows, DIGEST_ROWS))

    def _digest(
        self,
        roles: Iterable[str],
        rows: Tensor | slice,
        values: Callable[[str], Iterable[Tensor]],
        origins: Tensor | None = None,
    ) -> str:
        """sha256 of the presence and of the values of these rows. `values` gives the values of a role in chunks."""
        total = hashlib.sha256()
        if origins is not None:
            total.update(origins[rows].numpy().tobytes())
        for role in sorted(roles):
            total.update(role.encode())
            total.update(self.present[role][rows].numpy().tobytes())
            for chunk in values(role):
                total.update(chunk.numpy().data.cast("B"))
        return total.hexdigest()


def _gathered(values: Tensor | None, rows: Tensor, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    return values[rows.to(values.device)].to(device)


def _selected(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """The rows at these positions, on a device. The CPU does not wait for their copy to a GPU."""
    found = values.index_select(0, rows)
    if found.device.type == "cpu" and device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


def _ready(batch: Batch, stream: torch.cuda.Stream) -> Batch:
    """A batch that was copied in another stream, for use in the current one."""
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    of_rows = [*batch.inputs.values(), *batch.present.values(), batch.folds, batch.groups]
    of_neighbours = vars(batch.candidates).values() if batch.candidates else []
    for tensor in (*of_rows, *of_neighbours):
        if tensor is not None:
            tensor.record_stream(current)
    return batch


def _free_on(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {role: tensor.to(device) for role, tensor in tensors.items()}
