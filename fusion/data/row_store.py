"""Embeddings of all rows of a split, held in memory; batches are gathered from them by row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusion.nn.batch import Batch
from fusion.nn.neighbours import CandidateTable

DIGEST_ROWS = 4096  # rows brought to float32 at a time


@dataclass(frozen=True)
class RowStore:
    """Embeddings of N rows, resident; batches are gathered by row.

    Attributes:
        values: role to [N, D_role], float16 or float32; zeros where the role is missing.
        present: role to [N] bool.
        computed: roles that were computed from the table and not read.
        origins: [N] int64, hashes of what these were computed from; None: there are none.
        folds, groups: [N] int64, as of `Batch`.
        candidates: of all rows, as far as they were found before.
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
        folds, groups = (
            None if one is None else one[rows.to(one.device)].to(device) for one in (self.folds, self.groups)
        )
        return Batch(inputs, present, folds, groups, self.candidates.of(rows) if self.candidates else None)

    def resident_on(self, device: torch.device) -> RowStore:
        """The same rows in the device's memory, or as they are where they would fill more than half of what is free."""
        n_bytes = sum(values.nbytes for values in self.values.values())
        if device.type != "cuda" or n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return replace(self, values=_moved(self.values, device), present=_moved(self.present, device))

    def of_roles(self, roles: Iterable[str]) -> RowStore:
        """The same rows with some of the roles, to be looked at."""
        values, present = ({role: part[role] for role in roles} for part in (self.values, self.present))
        return RowStore(values, present)

    def any_present(self) -> Tensor:
        """[N] bool: the row has at least one embedding."""
        return torch.stack(list(self.present.values())).any(0)

    def digest(self) -> str:
        """sha256 of all values and of what is present: the same for the same rows, whatever files they came from."""
        total = hashlib.sha256()
        for role in sorted(self.values):
            total.update(role.encode())
            total.update(self.present[role].numpy().tobytes())
            total.update(self.values[role].numpy().data.cast("B"))
        return total.hexdigest()

    def digest_of(self, rows: Tensor) -> str:
        """sha256 of these rows, in their order: values as float32, whatever the files had, and what is present.

        Of what is computed, what it is computed from: another machine may round otherwise.
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


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {role: tensor.to(device) for role, tensor in tensors.items()}
