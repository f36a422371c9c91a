"""Evaluation: metrics of a run on its validation rows, overall and by group."""

from fusion.evaluation.evaluate import evaluate_by_groups

__all__ = ["evaluate_by_groups"]
