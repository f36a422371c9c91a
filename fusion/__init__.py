"""Fusion: price prediction from the embeddings of several encoders, trained as a batch job.

The names below are what users import. They load on first use, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
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
    "save_checkpoint": "records.portable",
    "load_checkpoint": "records.portable",
    "pointers": "records.pointers",
}
__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 (names, spread from the table above)


def _refuse_wrong_python() -> None:
    """Ends `python -m fusion.…` of a Python without Fusion's libraries in two lines, instead of a traceback.

    Python looks for the module with `-m` as the program's name, and imports this package for that.
    """
    is_ours = sys.argv[:1] == ["-m"] and any(word.startswith("fusion.") for word in getattr(sys, "orig_argv", ()))
    missing = [name for name in ("fsspec", "pydantic") if is_ours and find_spec(name) is None]
    if missing:
        print(f"error: No module named {missing[0]!r} for {sys.executable}", file=sys.stderr)
        print("hint: run `. .venv/bin/activate` first; `make demo` makes .venv", file=sys.stderr)
        sys.exit(78)  # ExitCode.CONFIG; a module imported here is imported by all


_refuse_wrong_python()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fusion' has no attribute {name!r}")
    module = import_module(f"fusion.{_EXPORTS[name]}")
    return module if name == "pointers" else getattr(module, name)
