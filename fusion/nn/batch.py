"""Rows as a model gets them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.nn.neighbours import Candidates


@dataclass(frozen=True)
class Batch:
    """B rows as a model gets them.

    Attributes:
        inputs: role to [B, D_role] float32; zeros where the role is missing.
        present: role to [B] bool.
        folds: [B] part of the split that each row is in; None: they are not of a split.
        groups: [B] group of near-duplicates of each row; None: they have none.
        candidates: the rows of the memory that may be neighbours; None: they are still to be found.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    folds: Tensor | None = None
    groups: Tensor | None = None
    candidates: Candidates | None = None
