"""`Model`: a trained run, with its scores, and with prices for rows that are in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch

from fusion import log, storage
from fusion.api.frames import NAME, in_order_of, table_from
from fusion.api.session import session
from fusion.compare.standard_errors import smape_interval
from fusion.config import EvaluateConfig, RunConfig
from fusion.data.arrays import Vectors, aligned, row_store
from fusion.data.embeddings import warn_of_equal_sources
from fusion.data.row_store import RowStore
from fusion.data.tables import Table
from fusion.distributed.world import World, alone, held
from fusion.errors import DataError, did_you_mean
from fusion.evaluation.evaluate import evaluation_of, read_validation
from fusion.features.fitted import Columns, Features, columns_of
from fusion.features.rows import with_features
from fusion.metrics import group_metrics, readable, row_smape
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import block_rows, check_dims, named, predictions_parquet, pricing
from fusion.prediction.resumable import Arrays, compute_rows, concatenated
from fusion.records import find_run
from fusion.records.intervals import category_column
from fusion.records.manifests import EPOCHS, SPLIT, Checkpoint
from fusion.records.run import RunFolder
from fusion.records.schemas import Intervals
from fusion.records.split import read_split
from fusion.records.validation import has_validation, validation_of
from fusion.submissions import predictions


class Model:
    """A trained run: its settings, its scores, and prices for new products.

    `fusion.load` and `fusion.train` make one. It holds the weights of the run's best checkpoint, on one device.

    Attributes:
        run_id: name of the run.
        variant: the kind of model, such as "all_embeddings".
        config: the settings that the run was trained with.
        url: folder of the run.
        checkpoint: name of the checkpoint that the weights are from.
        device: where prices are computed.
    """

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        checkpoint: Checkpoint,
        network: PriceModel,
        features: Features | None,
        intervals: Intervals | None,
        device: torch.device,
    ) -> None:
        """Use `fusion.load` instead, which reads all of these."""
        self.run_id, self.variant, self.config, self.url = run.run_id, config.variant, config, run.url
        self.checkpoint, self.device = checkpoint.name, device
        self._run, self._chosen, self._network = run, checkpoint, network
        self._features, self._intervals = features, intervals
        self._metrics: dict[str, float] | None = None

    @property
    def sources(self) -> dict[str, int]:
        """The embeddings that `predict` needs: role to dimension."""
        return {role: self._network.dims[role] for role in self.config.bindings()}

    @property
    def columns(self) -> list[str]:
        """The columns that the frame of `predict` must have beside sample_id; others are ignored."""
        return list(self._features.names) if self._features else []

    @property
    def metrics(self) -> dict[str, float]:
        """Scores on the validation rows, which the weights never saw.

        "smape" with its 95% interval "smape_low" and "smape_high", and "mape", in percent; "mae", "rmse",
        "median_error", "bias", "mean_true" and "mean_pred" in dollars; "r2"; and "count", the number of rows. A run of
        an earlier version, which did not keep its validation predictions, has only "smape".
        """
        if self._metrics is None:
            with session():
                self._metrics = self._validated()
        return dict(self._metrics)

    @property
    def validation(self) -> pd.DataFrame:
        """The validation rows: sample_id, price and predicted (dollars), and what intervals were fitted on.

        Raises:
            DataError: the run is of an earlier version, which did not keep them.
        """
        with session():
            return validation_of(self._chosen)

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch of the training: its loss, SMAPE, learning rate and time.

        Raises:
            DataError: the run has no history, as of an earlier version.
        """
        with session():
            return pd.read_csv(io.BytesIO(storage.read(self._run.metrics.at(EPOCHS))))

    def predict(self, frame: Any, sources: Mapping[str, Any]) -> pd.DataFrame:
        """Prices of products, exactly those that the command `predict_test` computes for the same rows.

        >>> prices = model.predict(frame, {"clip_image": images, "qwen_text": texts})  # doctest: +SKIP
        >>> frame["price"] = prices.price  # doctest: +SKIP

        Args:
            frame: N products, as a frame of pandas, polars or pyarrow, with the column sample_id (or an index of that
                name) and those of `columns`. A column that intervals depend on, such as category, is used if it is
                there.
            sources: the embeddings of each role of `sources`: an array [N, D] of NumPy, torch or pyarrow, or a list,
                in the order of the frame; or in any order, a pair (ids, array), a mapping from id to vector, or a frame
                with the columns sample_id and embedding. A vector of NaN or of zeros, and None in a list, count as
                missing. None in place of an array: no row has that role.

        Returns:
            N rows in the order and with the index of the frame: sample_id, price (dollars), bounds low_80, high_80,
            low_90, … that hold the true price in 80, 90 and 95% of the cases, spread, and comparable_ids,
            comparable_prices and comparable_weights: the training products that weigh most in the price. Columns that
            the model does not compute are left out.

        Raises:
            DataError: the frame lacks a column, an id occurs twice, or a role is missing, unknown, or has vectors of
                another number or dimension.
        """
        self._check_roles(sources)
        with session(), alone(str(self.device)) as world:
            log.configure(self.run_id, world.rank, world.size)
            table = table_from(frame, columns=self._wanted())
            vectors = {role: self._vectors(sources[role], role, table) for role in self.sources}
            columns = columns_of(self._features, table)
            computed = self._named(concatenated(list(self._computed(table, vectors, columns, world))))
            content = predictions_parquet(table, computed, self._intervals)
        return in_order_of(frame, predictions.from_parquet(content))

    def evaluate(self, by: str | Sequence[str] = (), *, data: str | None = None) -> pd.DataFrame:
        """Predicts the validation rows again, from the files of the data, and scores them by group.

        The rows are those of `evaluate_by_groups`, and so are the figures. Nothing is written.

        Args:
            by: columns of `train.csv` to group by, besides ranges of the price and which embeddings are present.
            data: bucket or folder of the data; by default that of the training.

        Returns:
            One row per group, the first of all rows: by, group, count, share, smape in percent with its 95% interval
            smape_low to smape_high, the other metrics of `metrics`, and covered_80, covered_90 and covered_95: the
            share of true prices within the bounds.

        Raises:
            DataError: the data are not there, lack a column, or differ from those of the training.
        """
        columns = (by,) if isinstance(by, str) else tuple(by)
        settings = EvaluateConfig(output=self._run.output or ".", run_dir=self.url, data=data, by=columns)
        with session(), alone(str(self.device)) as world, self._memory_kept():
            log.configure(self.run_id, world.rank, world.size)
            run, chosen, network = self._run, self._chosen, self._network
            where, others = find_run.data_of(settings, self.config.data), [category_column(self.config)]
            read = read_validation(settings, run, self.config, chosen, network, where, world, columns, others)
            table, store, as_trained = held(read[0]), *read[1:]
            rows = torch.arange(len(store))
            computed = self._named(compute_rows(pricing(network), store.resident_on(self.device), rows, self.device))
            evaluation, _ = evaluation_of(columns, run, chosen, table, store, computed, as_trained)
        return evaluation.groups

    @contextmanager
    def _memory_kept(self) -> Iterator[None]:
        """Restores the labelled rows of the model, from which an evaluation removes those that it was validated on."""
        before = self._network.memory
        try:
            yield
        finally:
            self._network.memory = before

    def _named(self, computed: Arrays) -> Arrays:
        """Outputs in the order of the command, with the names of comparable products."""
        return named(dict(sorted(computed.items())), self._network.named_rows)

    def _wanted(self) -> list[str]:
        return [*([self._intervals.by] if self._intervals else []), *self.columns]

    def _check_roles(self, sources: Mapping[str, Any]) -> None:
        """Raises a DataError unless there is an entry for each role, and no other."""
        if not isinstance(sources, Mapping):
            raise DataError(f"sources is a {type(sources).__name__}, expected {{role: array}}", self._roles_hint())
        for role in sources:
            if role not in self.sources:
                near = did_you_mean(str(role), self.sources)
                raise DataError(f"{role!r} is not a role of this model", f"{near}{self._roles_hint()}")
        for role in self.sources:
            if role not in sources:
                hint = f"{self._roles_hint()}; {{{role!r}: None}} if no product has it"
                raise DataError(f"sources lacks {role!r}, which the model was trained with", hint)

    def _roles_hint(self) -> str:
        roles = ", ".join(f"{role} [rows, {dim}]" for role, dim in self.sources.items())
        return f"give the embeddings of {roles}"

    def _vectors(self, given: Any, role: str, table: Table) -> Vectors | None:
        if given is None:
            return None
        found = aligned(given, role, table, NAME)
        check_dims({role: found.dim}, {role: self.sources[role]}, "sources")
        return found

    def _computed(
        self, table: Table, vectors: Mapping[str, Vectors | None], columns: Columns, world: World
    ) -> Iterator[Arrays]:
        """The outputs for one block of rows after the other, with the same forward passes as the command."""
        compute, size = pricing(self._network), block_rows(world)
        present = dict.fromkeys(self.sources, 0)
        for first in range(0, len(table), size):
            store = row_store(vectors, self.sources, first, min(first + size, len(table)))
            for role, flags in store.present.items():
                present[role] += int(flags.sum())
            if first == 0:
                warn_of_equal_sources(self.config.bindings(), store)
            yield compute_rows(
                compute, self._prepared(store, columns, first, world), torch.arange(len(store)), self.device
            )
        self._warn_of_missing(present, len(table))

    def _prepared(self, store: RowStore, columns: Columns, first: int, world: World) -> RowStore:
        cut = {name: one.slice(first, len(store)) for name, one in columns.items()}
        store = with_features(store, self._features, cut, NAME, world)
        check_dims(store.dims, self._network.dims, NAME)
        return store.resident_on(self.device)

    def _warn_of_missing(self, present: Mapping[str, int], n_rows: int) -> None:
        """Warns of roles that more rows lack than a training would accept. Their prices are less exact."""
        for role, n_present in present.items():
            if n_rows - n_present > self.config.max_missing * n_rows:
                log.warning(event="missing_embeddings", role=role, rows=n_rows - n_present, of=n_rows)

    def _validated(self) -> dict[str, float]:
        if not has_validation(self._chosen):
            return {"smape": self._chosen.smape}
        rows = validation_of(self._chosen)
        low, high = smape_interval(row_smape(rows["price"], rows["predicted"]), self._duplicates())
        found = group_metrics(rows["price"], rows["predicted"])
        return {"smape": found.pop("smape"), "smape_low": low, "smape_high": high, **found, "count": len(rows)}

    def _duplicates(self) -> np.ndarray | None:
        """[n] the group of near-duplicates of each validation row; None for a copy of the run without its split."""
        if not storage.exists(self._run.at(SPLIT)):
            return None
        split = read_split(self._run, self._chosen.manifest.split_sha256)
        return split.loc[split["side"] == "validation", "group"].to_numpy()

    def _facts(self) -> dict[str, str]:
        """What a reader of a notebook wants to know at first sight."""
        smape = f"{readable(self._chosen.smape)}% on its validation rows"
        sources = ", ".join(f"{role} [{dim}]" for role, dim in self.sources.items())
        facts = {"run": self.run_id, "variant": self.variant, "SMAPE": smape, "sources": sources}
        if self.columns:
            facts["columns"] = ", ".join(self.columns)
        return facts | {"checkpoint": self.checkpoint, "device": str(self.device), "folder": self.url}

    def __repr__(self) -> str:
        smape = readable(self._chosen.smape)
        return f"<fusion.Model {self.run_id}: SMAPE {smape}%, sources {', '.join(self.sources)}, on {self.device}>"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._facts().items())
        return f"<table><caption>fusion.Model</caption>{''.join(rows)}</table>"

    def settings(self) -> dict[str, Any]:
        """The settings of the training as a plain dict."""
        return asdict(self.config)
