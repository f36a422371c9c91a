"""Prints an ensemble on a terminal: its members, their weights, and its SMAPE."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.compare.out_of_fold import Scored
from fusion.compare.standard_errors import Estimate
from fusion.ensemble.weights import Blend
from fusion.errors import visible
from fusion.records.schemas import EnsembleRecord

PLAIN_WIDTH = 100  # characters per line if standard output is not a terminal


def show(output: str, record: EnsembleRecord, found: Sequence[Scored], blend: Blend) -> None:
    """Prints the members with their weights and SMAPE, and the SMAPE of the ensemble."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    console.print(Text(f"{record.rows} rows in {record.groups} groups of near-duplicates", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("variant")
    for heading in ("weight", "SMAPE", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one, weight, smape in zip(found, blend.weights, blend.members, strict=True):
        cells = (one.name, one.members[0].variant, f"{weight:.4f}", f"{smape.mean:.2f}", _interval(smape))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    table.add_section()
    table.add_row(record.run_id, "ensemble", "", f"{blend.smape.mean:.2f}", _interval(blend.smape), style="bold")
    console.print(table)
    for line in _sentences(output, record, blend):
        console.print(Text(visible(line)), soft_wrap=True)


def _sentences(output: str, record: EnsembleRecord, blend: Blend) -> list[str]:
    used = "fitted weights are used" if blend.fitted else "equal weights are used"
    where = shlex.join(["--output", output, "--run-id", record.run_id])
    return [
        f"fitted weights, cross-validated, are {_better(blend.gain)} than equal ones by {_size(blend.gain)}: {used}",
        f"the ensemble is {_better(blend.over_best)} than its best member by {_size(blend.over_best)}",
        f"`python -m fusion.ensemble.predict_test {where}` predicts with it",
    ]


def _interval(estimate: Estimate) -> str:
    return "-" if estimate.low is None else f"{estimate.low:.2f} - {estimate.high:.2f}"


def _better(gain: Estimate) -> str:
    return "better" if gain.mean > 0 else "worse"


def _size(gain: Estimate) -> str:
    return f"{abs(gain.mean):.2f}" if gain.error is None else f"{abs(gain.mean):.2f} +- {gain.error:.2f}"
