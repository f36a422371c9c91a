"""What turns rows into prices: the weights of a run, or those of the members of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from fusion.api.frames import NAME
from fusion.data.row_store import RowStore
from fusion.data.tables import Table
from fusion.distributed.world import World
from fusion.ensemble.comparables import all_named, positions_among
from fusion.ensemble.prediction import (
    OpenedMember,
    columns_needed,
    sources_of,
    view_of,
    weighted_mean_of,
    with_computed,
)
from fusion.features.fitted import Features, columns_of
from fusion.features.rows import with_features
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import block_rows, check_dims, pricing
from fusion.prediction.resumable import Compute
from fusion.records.schemas import Intervals

Prepare = Callable[[RowStore, int], RowStore]  # from rows with embeddings, and the first of them, to rows for the model


class Pricer(Protocol):
    """Computes prices as the command does."""

    @property
    def intervals(self) -> Intervals | None:
        """The intervals of the prices; None if there are none."""

    @property
    def bindings(self) -> dict[str, str]:
        """Role to the name of its source."""

    @property
    def sources(self) -> dict[str, int]:
        """Role to its dimension, of the roles that embeddings are given for."""

    @property
    def columns(self) -> list[str]:
        """The columns that sources are computed from."""

    @property
    def known(self) -> pd.Series:
        """The price in dollars, by sample id, of the products that others are compared with."""

    @property
    def max_missing(self) -> float:
        """The largest share of rows that a source may lack without a warning."""

    def compute(self, world: World) -> Compute:
        """The function that computes the prices of a batch of rows."""

    def prepare(self, table: Table, world: World) -> Prepare:
        """The function that adds computed sources. Raises DataError if the table lacks a column."""

    def block_rows(self, n_rows: int, world: World) -> int:
        """Rows that are in memory at a time, of `n_rows`."""


@dataclass(frozen=True)
class RunPricer:
    """The weights of a run.

    Attributes:
        roles: role to the name of its source.
        features: what the run computes from the table; None if it computes nothing.
    """

    network: PriceModel
    roles: Mapping[str, str]
    features: Features | None
    intervals: Intervals | None
    max_missing: float

    @property
    def bindings(self) -> dict[str, str]:
        return dict(self.roles)

    @property
    def sources(self) -> dict[str, int]:
        return {role: self.network.dims[role] for role in self.roles}

    @property
    def columns(self) -> list[str]:
        return list(self.features.names) if self.features else []

    @property
    def known(self) -> pd.Series:
        return self.network.named_rows

    def compute(self, world: World) -> Compute:
        return pricing(self.network)

    def prepare(self, table: Table, world: World) -> Prepare:
        columns = columns_of(self.features, table)

        def prepared(store: RowStore, first: int) -> RowStore:
            cut = {name: one.slice(first, len(store)) for name, one in columns.items()}
            store = with_features(store, self.features, cut, NAME, world)
            check_dims(store.dims, self.network.dims, NAME)
            return store

        return prepared

    def block_rows(self, n_rows: int, world: World) -> int:
        return block_rows(world)


@dataclass(frozen=True)
class EnsemblePricer:
    """The weights of all members of an ensemble. Its roles are the names of sources, since members may differ."""

    members: Sequence[OpenedMember]
    models: Sequence[PriceModel]
    intervals: Intervals | None

    @property
    def bindings(self) -> dict[str, str]:
        return sources_of(self.members)

    @property
    def sources(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for opened, model in zip(self.members, self.models, strict=True):
            found |= {name: model.dims[role] for role, name in opened.bindings.items()}
        return found

    @property
    def columns(self) -> list[str]:
        return columns_needed(self.members)

    @property
    def known(self) -> pd.Series:
        return all_named(self.models)

    @property
    def max_missing(self) -> float:
        return min(opened.config.max_missing for opened in self.members)

    def compute(self, world: World) -> Compute:
        return weighted_mean_of(self.members, self.models, positions_among(self.known, self.models, world.device))

    def prepare(self, table: Table, world: World) -> Prepare:
        def prepared(store: RowStore, _: int) -> RowStore:
            store = with_computed(store, self.members, table, world, NAME)
            for opened, model in zip(self.members, self.models, strict=True):
                check_dims(view_of(store, opened).dims, model.dims, NAME)
            return store

        return prepared

    def block_rows(self, n_rows: int, world: World) -> int:
        return n_rows
