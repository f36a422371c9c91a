"""Puts a score beside those of the baselines, in words."""

from __future__ import annotations

from fusion.metrics import readable
from fusion.records.schemas import Baselines


def in_words(smape: float, known: Baselines) -> list[str]:
    """The score of each baseline, and a remark if the model with this SMAPE is no better than one of them.

    >>> from fusion.records.schemas import BaselineScore
    >>> median = BaselineScore("median price", 59.5, 57.1, 61.9, 6400)
    >>> in_words(61.2, Baselines(2, 1600, (median,)))[0]
    'For comparison: median price 59.50%'
    """
    scores = ", ".join(f"{score.name} {readable(score.smape)}%" for score in known.scores)
    lines = [f"For comparison: {scores}"]
    beaten_by = [score.name for score in known.scores if score.smape <= smape]
    if beaten_by:
        lines.append(f"This model is not better than: {', '.join(beaten_by)}. More epochs or other sources may help.")
    return lines


def scores_of(known: Baselines | None) -> dict[str, float]:
    """The SMAPE of each baseline, as fields of a line in the log."""
    return {f"{score.name.replace(' ', '_')}_smape": score.smape for score in (known.scores if known else ())}
