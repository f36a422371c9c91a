"""Holds the embeddings of all rows of a split in memory, and gathers batches of rows from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusion.nn.batch import Batch
from fusion.nn.neighbours import CandidateTable

DIGEST_ROWS = 4096  # rows converted to float32 at a time, so that a digest needs little memory


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
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor]
    computed: tuple[str, ...] = ()
    origins: Tensor | None = None
    folds: Tensor | None = None
    groups: Tensor | None = None
    candidates: CandidateTable | None = None

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @property
    def dims(self) -> dict[str, int]:
        return {role: values.shape[1] for role, values in self.values.items()}

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """The rows with these positions [B], on a device."""
        rows = rows.to(next(iter(self.present.values())).device)
        inputs = {role: values.index_select(0, rows).to(device).float() for role, values in self.values.items()}
        present = {role: values.index_select(0, rows).to(device) for role, values in self.present.items()}
        folds, groups = _gathered(self.folds, rows, device), _gathered(self.groups, rows, device)
        return Batch(inputs, present, folds, groups, self.candidates.of(rows) if self.candidates else None)

    def resident_on(self, device: torch.device) -> RowStore:
        """The same rows in the GPU's memory, or unchanged if they would fill more than half of its free memory.

        The other half is for the model, its optimizer and activations.
        """
        n_bytes = sum(values.nbytes for values in self.values.values())
        if device.type != "cuda" or n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return replace(self, values=_moved(self.values, device), present=_moved(self.present, device))

    def of_roles(self, roles: Iterable[str]) -> RowStore:
        """The same rows with only these roles, and without folds, groups and candidates."""
        values, present = ({role: part[role] for role in roles} for part in (self.values, self.present))
        return RowStore(values, present)

    def any_present(self) -> Tensor:
        """[N] bool: the row has at least one embedding."""
        return torch.stack(list(self.present.values())).any(0)

    def digest(self) -> str:
        """sha256 of values and presence. It depends on the rows alone, not on how they are spread over files."""
        total = hashlib.sha256()
        for role in sorted(self.values):
            total.update(role.encode())
            total.update(self.present[role].numpy().tobytes())
            total.update(self.values[role].numpy().data.cast("B"))
        return total.hexdigest()

    def digest_of(self, rows: Tensor) -> str:
        """sha256 of the values (as float32) and the presence of these rows, in their order.

        For computed roles, it covers what they were computed from instead of their values, which may be rounded
        differently on another machine.
        """
        total = hashlib.sha256()
        if self.origins is not None:
            total.update(self.origins[rows].numpy().tobytes())
        for role in sorted(set(self.values).difference(self.computed)):
            total.update(role.encode())
            total.update(self.present[role][rows].numpy().tobytes())
            for chunk in torch.split(rows, DIGEST_ROWS):
                total.update(self.values[role][chunk].float().numpy().data.cast("B"))
        return total.hexdigest()


def _gathered(values: Tensor | None, rows: Tensor, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    return values[rows.to(values.device)].to(device)


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {role: tensor.to(device) for role, tensor in tensors.items()}
