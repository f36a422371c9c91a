"""Prints an ensemble on a terminal: its members, their weights, and its SMAPE."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fusion import storage
from fusion.compare.out_of_fold import Scored
from fusion.compare.standard_errors import Estimate
from fusion.compare.tables import interval
from fusion.ensemble.weights import Blend
from fusion.records.run import RunFolder
from fusion.records.schemas import EnsembleRecord
from fusion.terminal import tables
from fusion.terminal.spelling import as_typed


def show(output: str, record: EnsembleRecord, found: Sequence[Scored], blend: Blend) -> None:
    """Prints the members with their weights and SMAPE, and the SMAPE of the ensemble."""
    console = tables.console()
    console.print(tables.text(f"{record.rows} rows in {record.groups} groups of near-duplicates", "bold"))
    texts, numbers = ("run", "variant"), ("weight", "SMAPE", "95% interval")
    table = tables.table("", *texts, *numbers, numbers=numbers, folded=texts)
    for one, weight, smape in zip(found, blend.weights, blend.members, strict=True):
        cells = (one.name, one.members[0].variant, f"{weight:.4f}", f"{smape.mean:.2f}", interval(smape))
        tables.add(table, *cells)
    table.add_section()
    figures = (f"{blend.smape.mean:.2f}", interval(blend.smape))
    tables.add(table, record.run_id, "ensemble", "", *figures, style="bold")
    console.print(table)
    for line in _sentences(output, record, blend):
        console.print(tables.text(as_typed(line)), soft_wrap=True)


def _sentences(output: str, record: EnsembleRecord, blend: Blend) -> list[str]:
    used = "fitted weights are used" if blend.fitted else "equal weights are used"
    where = shlex.join(["--output", output, "--run-id", record.run_id])
    report = RunFolder.named(output, record.run_id).report_url
    return [
        f"fitted weights, cross-validated, are {_better(blend.gain)} than equal ones by {_size(blend.gain)}: {used}",
        f"the ensemble is {_better(blend.over_best)} than its best member by {_size(blend.over_best)}",
        *([f"report: {report}"] if storage.exists(report) else []),
        f"`python -m fusion.ensemble.predict_test {where}` predicts with it",
    ]


def _better(gain: Estimate) -> str:
    return "better" if gain.mean > 0 else "worse"


def _size(gain: Estimate) -> str:
    return f"{abs(gain.mean):.2f}" if gain.error is None else f"{abs(gain.mean):.2f} +- {gain.error:.2f}"
