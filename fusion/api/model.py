"""`Model`: a trained run, with its scores, and with prices for rows that are in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import pandas as pd
import torch

from fusion import log, storage
from fusion.api.frames import NAME, in_order_of, table_from
from fusion.api.pricers import Prepare, Pricer, RunPricer
from fusion.api.session import session
from fusion.compare.standard_errors import smape_interval
from fusion.config import EvaluateConfig, RunConfig
from fusion.data.arrays import Vectors, aligned, row_store
from fusion.data.embeddings import warn_of_equal_sources
from fusion.data.tables import Table
from fusion.distributed.world import World, alone, held
from fusion.errors import ConfigError, DataError, did_you_mean
from fusion.evaluation.evaluate import evaluation_of
from fusion.evaluation.rows import read_validation
from fusion.metrics import group_metrics, readable, row_smape
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import check_dims, named, predictions_parquet, pricing
from fusion.prediction.resumable import Arrays, compute_rows, concatenated
from fusion.records import find_run
from fusion.records.intervals import category_column
from fusion.records.manifests import EPOCHS, VALIDATION, Checkpoint
from fusion.records.run import RunFolder
from fusion.records.split import validation_groups
from fusion.records.validation import from_parquet, has_validation, validation_of
from fusion.submissions import predictions


@dataclass(frozen=True)
class Opened:
    """What `fusion.load` has read of a run or an ensemble.

    Attributes:
        smape: in percent, on the validation rows.
        config, checkpoint: of a run; an ensemble has none.
        members: id of each run that takes part, and its weight.
    """

    run: RunFolder
    variant: str
    smape: float
    pricer: Pricer
    device: torch.device
    config: RunConfig | None = None
    checkpoint: Checkpoint | None = None
    members: Mapping[str, float] = field(default_factory=dict)


class Model:
    """A trained run: its settings, its scores, and prices for new products.

    `fusion.load` and `fusion.train` make one. It holds the weights of the run's best checkpoint, on one device. It may
    also be an ensemble of several runs, which has no settings, history and evaluation of its own.

    Attributes:
        run_id: name of the run.
        variant: the kind of model: "all_embeddings", "qwen_clip", or "ensemble".
        url: folder of the run.
        device: where prices are computed.
    """

    def __init__(self, opened: Opened) -> None:
        """Use `fusion.load` instead, which reads what is needed."""
        self.run_id, self.variant, self.url = opened.run.run_id, opened.variant, opened.run.url
        self.device = opened.device
        self._opened, self._run, self._pricer = opened, opened.run, opened.pricer
        self._metrics: dict[str, float] | None = None

    @property
    def config(self) -> RunConfig:
        """The settings that the run was trained with. Raises a ConfigError for an ensemble, which has none."""
        if self._opened.config is None:
            raise self._of_members("settings")
        return self._opened.config

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint that the weights are from. Raises a ConfigError for an ensemble."""
        return self._chosen.name

    @property
    def members(self) -> dict[str, float]:
        """The runs of an ensemble, each with its weight; empty for a single run."""
        return dict(self._opened.members)

    @property
    def _chosen(self) -> Checkpoint:
        if self._opened.checkpoint is None:
            raise self._of_members("checkpoint")
        return self._opened.checkpoint

    def _of_members(self, noun: str) -> ConfigError:
        first = next(iter(self.members), "")
        where = f"fusion.load({self._run.output!r}, run={first!r})"
        return ConfigError(f"an ensemble has no {noun} of its own, only its members have", f"load one: {where}")

    @property
    def sources(self) -> dict[str, int]:
        """The embeddings that `predict` needs: role to dimension."""
        return self._pricer.sources

    @property
    def columns(self) -> list[str]:
        """The columns that the frame of `predict` must have beside sample_id; others are ignored."""
        return self._pricer.columns

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
            return self._validation()

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch of the training: its loss, SMAPE, learning rate and time.

        Raises:
            DataError: the run has no history, as of an earlier version.
        """
        if self._opened.checkpoint is None:
            raise self._of_members("history")
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
            prepare = self._pricer.prepare(table, world)
            vectors = {role: self._vectors(sources[role], role, table) for role in self.sources}
            computed = self._named(concatenated(list(self._computed(table, vectors, prepare, world))))
            content = predictions_parquet(table, computed, self._pricer.intervals)
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
        if not isinstance(self._pricer, RunPricer):
            raise self._of_members("evaluation")
        config, columns = self.config, (by,) if isinstance(by, str) else tuple(by)
        settings = EvaluateConfig(output=self._run.output or ".", run_dir=self.url, data=data, by=columns)
        with session(), alone(str(self.device)) as world, _memory_kept(self._pricer.network) as network:
            log.configure(self.run_id, world.rank, world.size)
            run, chosen = self._run, self._chosen
            where, others = find_run.data_of(settings, config.data), [category_column(config)]
            read = read_validation(settings, run, config, chosen, network, where, world, columns, others)
            table, store, as_trained = held(read[0]), *read[1:]
            rows = torch.arange(len(store))
            computed = self._named(compute_rows(pricing(network), store.resident_on(self.device), rows, self.device))
            evaluation, _ = evaluation_of(columns, run, chosen, table, store, computed, as_trained)
        return evaluation.groups

    def _named(self, computed: Arrays) -> Arrays:
        """Outputs in the order of the command, with the names of comparable products."""
        return named(dict(sorted(computed.items())), self._pricer.known)

    def _wanted(self) -> list[str]:
        limits = self._pricer.intervals
        return [*([limits.by] if limits else []), *self.columns]

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
        self, table: Table, vectors: Mapping[str, Vectors | None], prepare: Prepare, world: World
    ) -> Iterator[Arrays]:
        """The outputs for one block of rows after the other, with the same forward passes as the command."""
        compute, size = self._pricer.compute(world), self._pricer.block_rows(len(table), world)
        present = dict.fromkeys(self.sources, 0)
        for first in range(0, len(table), size):
            store = row_store(vectors, self.sources, first, min(first + size, len(table)))
            for role, flags in store.present.items():
                present[role] += int(flags.sum())
            if first == 0:
                warn_of_equal_sources(self._pricer.bindings, store)
            resident = prepare(store, first).resident_on(self.device)
            yield compute_rows(compute, resident, torch.arange(len(store)), self.device)
        self._warn_of_missing(present, len(table))

    def _warn_of_missing(self, present: Mapping[str, int], n_rows: int) -> None:
        """Warns of roles that more rows lack than a training would accept. Their prices are less exact."""
        for role, n_present in present.items():
            if n_rows - n_present > self._pricer.max_missing * n_rows:
                log.warning(event="missing_embeddings", role=role, rows=n_rows - n_present, of=n_rows)

    def _validation(self) -> pd.DataFrame:
        """The validation rows of the checkpoint, or those that the weights of an ensemble were fitted on."""
        if self._opened.checkpoint is not None:
            return validation_of(self._opened.checkpoint)
        return from_parquet(self._run.ensemble_file(VALIDATION) or b"")

    def _validated(self) -> dict[str, float]:
        if self._opened.checkpoint is not None and not has_validation(self._opened.checkpoint):
            return {"smape": self._opened.smape}
        rows = self._validation()
        checkpoint = self._opened.checkpoint  # an ensemble has none, and no split
        groups = None if checkpoint is None else validation_groups(self._run, checkpoint.manifest.split_sha256)
        low, high = smape_interval(row_smape(rows["price"], rows["predicted"]), groups) or (float("nan"), float("nan"))
        found = group_metrics(rows["price"], rows["predicted"])
        return {"smape": found.pop("smape"), "smape_low": low, "smape_high": high, **found, "count": len(rows)}

    def _facts(self) -> dict[str, str]:
        """What a reader of a notebook wants to know at first sight."""
        smape = f"{readable(self._opened.smape)}% on its validation rows"
        sources = ", ".join(f"{role} [{dim}]" for role, dim in self.sources.items())
        members = ", ".join(f"{run} {weight:.0%}" for run, weight in self.members.items())
        facts = {"run": self.run_id, "variant": self.variant, "members": members, "SMAPE": smape, "sources": sources}
        facts |= {"columns": ", ".join(self.columns), "device": str(self.device), "folder": self.url}
        return {name: value for name, value in facts.items() if value}

    def __repr__(self) -> str:
        smape = readable(self._opened.smape)
        return f"<fusion.Model {self.run_id}: SMAPE {smape}%, sources {', '.join(self.sources)}, on {self.device}>"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._facts().items())
        return f"<table><caption>fusion.Model</caption>{''.join(rows)}</table>"

    def settings(self) -> dict[str, Any]:
        """The settings of the training as a plain dict."""
        return asdict(self.config)


@contextmanager
def _memory_kept(network: PriceModel) -> Iterator[PriceModel]:
    """Restores the labelled rows of a network, of which an evaluation removes those that it was validated on."""
    before = network.memory
    try:
        yield network
    finally:
        network.memory = before
