"""Evaluates a run on its own validation rows, which its training has not seen, and writes metrics by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from torch import Tensor

from fusion.config import EvaluateConfig, RunConfig
from fusion.data.row_store import RowStore
from fusion.data.tables import Table, positions_of, read_table
from fusion.distributed.world import held, join_world
from fusion.evaluation import tables
from fusion.evaluation.files import write
from fusion.evaluation.groups import Evaluation, evaluate
from fusion.evaluation.rows import COMPUTED, columns_of_report, read_validation
from fusion.prediction.predict import (
    BuildNetwork,
    C,
    load_model,
    named,
    open_run,
    parts_folder,
    pricing,
)
from fusion.prediction.resumable import Arrays, compute_parts, discard
from fusion.records import intervals, manifests
from fusion.records.run import RunFolder
from fusion.records.schemas import Intervals
from fusion.records.validation import computed_frame
from fusion.report.publish import try_report
from fusion.submissions import submission
from fusion.submissions.predictions import COMPARABLES

# Validation rows up to which the texts of comparable products are read: with five times as many rows in train.csv, that
# takes a few seconds.
MOST_VALIDATED = 200_000


def evaluate_by_groups(settings: EvaluateConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts a run's validation rows with its best checkpoint, writes metrics by group and prints them.

    Raises:
        DataError: there is no such run or no such --by column, validation rows are missing from the data, or their
            prices or embeddings differ from those of the training.
        StopRequested: a signal asked to stop; the parts that are done are saved.
    """
    with join_world(settings.device) as world:
        run, config, chosen, data = open_run(settings, config_class, world)
        model = load_model(chosen, config, build_network, world)
        origin = world.on_main(lambda: submission.origin_of(run, chosen, config, data, "train"))
        shown = [intervals.category_column(config)]
        table, store, as_trained = read_validation(
            settings, run, config, chosen, model, data, world, settings.by, shown
        )
        parts, store = parts_folder(run.parts, origin, world), store.resident_on(world.device, settings.residency)
        computed = named(compute_parts(pricing(model), store, world, parts), model.named_rows)

        def finish() -> None:
            evaluation, rows = evaluation_of(settings.by, run, chosen, held(table), store, computed, as_trained)
            shown = columns_of_report(settings.by, held(table).columns)
            columns = held(table).frame.filter(items=list(dict.fromkeys(shown)))
            others = _columns_of_comparables(evaluation, rows, config, data, list(dict.fromkeys(shown)))
            write(run, chosen, evaluation, rows, pd.concat([columns, others.drop(columns.index, errors="ignore")]))
            _show(evaluation, columns, run.metrics.url, settings.all)

        world.on_main(finish)
        world.on_main(lambda: discard(run.parts))  # including those of earlier evaluations that were never finished
        world.on_main(lambda: try_report(run))


def evaluation_of(
    by: Sequence[str],
    run: RunFolder,
    chosen: manifests.Checkpoint,
    table: Table,
    store: RowStore,
    computed: Arrays,
    as_trained: bool | None,
) -> tuple[Evaluation, pd.DataFrame]:
    """The evaluation of a run's validation rows, and what was predicted for each of them.

    Args:
        by: columns of the table to group by.
        table, store, as_trained: as `read_validation` returns them.
        computed: what the model computes for the rows, with the names of comparable products.
    """
    rows = _predictions(table, computed["price"], store.present)
    assert store.groups is not None, "read_validation sets them"
    groups = store.groups.cpu().numpy()
    rows, coverage = _with_bounds(rows, intervals.intervals_of(chosen), groups, table, computed, as_trained)
    rows = rows.assign(**{name: list(computed[name]) for name in COMPARABLES if name in computed})
    by_columns, gate = table.frame[list(by)], computed.get("gate")
    evaluation = evaluate(rows, by_columns, gate, as_trained=as_trained, coverage=coverage, duplicates=groups)
    known = None if as_trained is False else run.baselines()  # other prices have other baselines
    return replace(evaluation, baselines=known), rows


def _with_bounds(
    rows: pd.DataFrame,
    limits: Intervals | None,
    groups: np.ndarray,
    table: Table,
    computed: Arrays,
    as_trained: bool | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Adds interval bounds to the rows, and counts how many prices lie within them.

    The run's intervals were fitted on its validation rows, so they would cover these rows too well. Therefore they are
    fitted again by cross-fitting: the bounds of a row come from intervals that were fitted without its group. With
    `--other-data` (`as_trained` is False), the rows are new, and the run's own intervals apply.

    Returns:
        The rows with their bounds, and a table as of `intervals.coverage`, which is empty if there are no intervals.
    """
    if limits is None:
        return rows, pd.DataFrame()
    known = computed_frame(computed, intervals.category_of(table, limits.by)).assign(price=rows["price"])
    if as_trained is False:
        found: dict[str, np.ndarray] | None = intervals.bounds(limits, known)
    else:
        found = intervals.crossed(known, groups, limits.by)
    if found is None:
        return rows, pd.DataFrame()
    return rows.assign(**found), intervals.coverage(limits, known.assign(**found))


def _predictions(table: Table, prices: np.ndarray, present: Mapping[str, Tensor]) -> pd.DataFrame:
    """Returns a row per product: sample_id, price, predicted, and present, which says in words which roles it has."""
    # Bit i of a row's code says whether it has role i. There are few different codes, so each is put in words once.
    codes = sum(
        is_present.cpu().numpy().astype(np.int64) << number for number, is_present in enumerate(present.values())
    )
    found, positions = np.unique(np.asarray(codes), return_inverse=True)
    words = np.array([_in_words(int(code), list(present)) for code in found], dtype=object)
    columns = {"sample_id": table.ids, "price": table.prices, "predicted": prices, "present": words[positions]}
    return pd.DataFrame(columns)


def _in_words(code: int, roles: list[str]) -> str:
    """Returns "all", "none", or for example "without clip_image, qwen_text"."""
    missing = [role for number, role in enumerate(roles) if not code >> number & 1]
    if len(missing) == len(roles):
        return "none"
    return f"without {', '.join(missing)}" if missing else "all"


def _columns_of_comparables(
    evaluation: Evaluation, rows: pd.DataFrame, config: RunConfig, data: str, names: Sequence[str]
) -> pd.DataFrame:
    """Returns the user's columns of the products that weigh most in the worst rows, by sample_id.

    Without neighbours or with other data, the result is empty. It is also empty for a large table: reading the columns
    of all of its rows again would take too long.
    """
    none = pd.DataFrame(columns=list(names))
    if COMPARABLES[0] not in rows or evaluation.as_trained is False or not names:
        return none
    of_worst = rows.set_index("sample_id").loc[evaluation.worst["sample_id"], COMPARABLES[0]]
    if len(rows) > MOST_VALIDATED:
        return none
    drop = config.drop_bad_prices
    table = read_table(
        data,
        "train",
        priced=True,
        drop_bad_prices=drop,
        columns=lambda known: [name for name in names if name in known],
    )
    positions = positions_of(pd.Index(of_worst.explode().unique()), table.ids)
    return table.frame.iloc[positions[positions >= 0]].filter(items=list(names))


def _show(evaluation: Evaluation, columns: pd.DataFrame, written: str = "", everything: bool = True) -> None:
    """Prints the evaluation. Extreme rows get the user's columns, unless a computed column has the same name.

    Args:
        written: the folder with the metrics.
        everything: whether to print all tables.
    """
    shown = ["sample_id", *COMPUTED]
    others = columns.drop(columns=[name for name in columns if name in evaluation.worst])
    worst, best = (rows[shown].join(others, on="sample_id") for rows in (evaluation.worst, evaluation.best))
    note = ", with other prices or embeddings than in training" if evaluation.as_trained is False else ""
    tables.show(replace(evaluation, worst=worst, best=best), note, written, everything)
