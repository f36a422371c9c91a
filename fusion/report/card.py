"""`model_card.md`: what a reader needs before using a model, with the metadata that registries of models read.

The front matter follows the model cards of Hugging Face: a pipeline tag, and the results as `model-index`. The text has
the sentences and tables of the report, as Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from fusion.metrics import compute_metrics
from fusion.report.blocks import Section, Table
from fusion.report.gather import Gathered, Validated
from fusion.terminal.escapes import visible

MOST_ROWS: Final = 20  # of a table in a card; the report has all
# Sections of the report that are in the card too.
SECTIONS: Final = ("groups", "intervals", "data", "settings", "members", "lineage", "reproduce")
METRICS: Final = {"smape": "SMAPE, %", "mae": "mean absolute error, $", "rmse": "RMSE, $", "r2": "R²"}


def chosen(sections: Sequence[Section]) -> list[Section]:
    """The sections of a report that are in a card too, in their order."""
    return [section for section in sections if section.id in SECTIONS]


def model(found: Gathered) -> str:
    """What the model is, as a part of a sentence."""
    variant = f"a `{found.variant}`" if found.variant else "a model"
    return f"{variant} with {found.n_parameters:,} parameters" if found.n_parameters else variant


def results(found: Validated) -> list[tuple[str, str, float]]:
    """Type, name and value of the metrics in the front matter, rounded to 6 significant digits."""
    metrics = compute_metrics(found.rows["price"], found.rows["predicted"])
    return [(key, name, float(f"{metrics[key]:.6g}")) for key, name in METRICS.items() if np.isfinite(metrics[key])]


def loading(found: Validated) -> str:
    """The arguments of `fusion.load` that open the model."""
    if found.run.output and found.run.is_in_runs:
        return f"{json.dumps(found.run.output)}, run={json.dumps(found.run.run_id)}"
    return json.dumps(found.run.url)


def table(shown: Table) -> str:
    """A table as Markdown, with its first `MOST_ROWS` rows."""
    lines = [_row([_plain(heading) for heading in shown.headings])]
    lines.append(_row(["--:" if i in shown.numbers else "---" for i in range(len(shown.headings))]))
    for row in shown.rows[:MOST_ROWS]:
        lines.append(_row([_code(cell) if i in shown.code else _plain(cell) for i, cell in enumerate(row)]))
    if len(shown.rows) > MOST_ROWS:
        lines += ["", f"The first {MOST_ROWS} of {len(shown.rows)} rows; the report has all."]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sentence(text: str) -> str:
    """A sentence as Markdown: what is between backticks stays code, and all else means itself."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else _plain(part) for i, part in enumerate(parts))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is. Underscores within words need no escape."""
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]#|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", shown)


def _code(text: str) -> str:
    shown = visible(text)
    return _plain(text) if not shown or "`" in shown else f"`{shown.replace('|', chr(92) + '|')}`"


def _quoted(text: str) -> str:
    """Text as YAML, of which JSON is a part."""
    return json.dumps(text, ensure_ascii=False)


FILTERS: Final = {"table": table, "sentence": sentence, "code": _code, "yaml": _quoted}
