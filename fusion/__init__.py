"""Fusion: price prediction from the embeddings of several encoders, trained as a batch job.

The names below are what users import. They load on first use, so that `--help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "RunConfig": "config",
    "train": "training",
    "evaluate_by_groups": "evaluation",
    "predict_test": "prediction",
    "get_loss_function": "loss_functions",
    "compute_smape": "metrics",
    "compute_metrics": "metrics",
    "EarlyStopping": "fitting",
    "set_seed": "fitting",
    "save_checkpoint": "portable",
    "load_checkpoint": "portable",
}
__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 (names, spread from the table above)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fusion' has no attribute {name!r}")
    return getattr(import_module(f"fusion.{_EXPORTS[name]}"), name)
