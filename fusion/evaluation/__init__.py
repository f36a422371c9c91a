"""Evaluation: how good a run is on its validation rows, group by group."""

from fusion.evaluation.evaluate import evaluate_by_groups

__all__ = ["evaluate_by_groups"]
