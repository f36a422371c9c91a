"""A batch of rows, as a model takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.nn.neighbours import Candidates


@dataclass(frozen=True)
class Batch:
    """B rows as a model takes them.

    Attributes:
        inputs: role to [B, D_role] float32; zeros where the role is missing.
        present: role to [B] bool; whether the row has this role.
        folds: [B] part of the split that each row is in; None for rows outside a split, such as those of test.csv.
        groups: [B] group of near-duplicates of each row; None if they are not known.
        candidates: rows of the memory that may be neighbours of each row; None if they were not searched yet.
        is_projected: whether the inputs are already what `PriceModel.inputs` makes of them.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    folds: Tensor | None = None
    groups: Tensor | None = None
    candidates: Candidates | None = None
    is_projected: bool = False
