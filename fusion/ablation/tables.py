"""Prints an ablation on a terminal."""

from __future__ import annotations

from fusion.compare.tables import difference, interval
from fusion.records.schemas import AblationRecord
from fusion.terminal import tables


def show(record: AblationRecord) -> None:
    """Prints a table of the sources, the one with the largest Shapley value first."""
    console = tables.console()
    note = ", with other prices or embeddings than in training" if record.as_trained is False else ""
    title = f"SMAPE in %, on {record.rows} validation rows in {record.groups} groups of near-duplicates{note}"
    console.print(tables.text(title, "bold"))
    texts, numbers = ("role", "source"), ("alone", "without", "lost without", "Shapley value", "95% interval")
    table = tables.table("", *texts, *numbers, numbers=numbers, folded=texts)
    for one in sorted(record.sources, key=lambda one: -one.shapley.mean):
        figures = (f"{one.alone:.2f}", f"{one.without:.2f}", difference(one.lost), difference(one.shapley))
        tables.add(table, one.role, one.source, *figures, interval(one.shapley))
    console.print(table)
    gain = record.nothing - record.everything
    ends = f"SMAPE is {record.nothing:.2f} with no source and {record.everything:.2f} with all"
    console.print(f"{ends}: the Shapley values add up to {gain:.2f}")
