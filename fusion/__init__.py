"""Fusion: price prediction from the embeddings of several encoders, trained as a batch job.

Users import the names in `_EXPORTS`. Each loads on first use, so that `--help` does not wait for torch. Editors and
type checkers read their types from `__init__.pyi`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

# Public name -> module below `fusion` that defines it.
_EXPORTS = {
    "load": "api.loading",
    "train": "api.training",
    "make_config": "api.settings",
    "Model": "api.model",
    "score": "api.scoring",
    "FusionError": "errors",
    "RunConfig": "config",
    "evaluate_by_groups": "evaluation",
    "predict_test": "prediction",
    "get_loss_function": "loss_functions",
    "compute_smape": "metrics",
    "compute_metrics": "metrics",
    "EarlyStopping": "training.early_stopping",
    "set_seed": "training.seeds",
    "save_checkpoint": "records.portable",
    "load_checkpoint": "records.portable",
    "pointers": "records.pointers",
}
__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 (names, spread from the table above)


def _refuse_wrong_python() -> None:
    """Exits with a two-line message if a command of Fusion runs in a Python that lacks Fusion's dependencies.

    Without this check, the user would see a traceback. Ordinary imports raise ImportError as usual.
    """
    # Two direct dependencies that every command imports first; if they are missing, so are the others.
    missing = [name for name in ("fsspec", "pydantic") if _is_command() and find_spec(name) is None]
    if missing:
        print(f"error: No module named {missing[0]!r} for {sys.executable}", file=sys.stderr)
        print("hint: run `. .venv/bin/activate` first; `make demo` makes .venv", file=sys.stderr)
        sys.exit(78)  # ExitCode.CONFIG, as a literal: this module imports nothing of Fusion, to stay fast to import


def _is_command() -> bool:
    """Whether this process runs `python -m fusion.…` or a script in `jobs/` of this checkout.

    While Python looks for the module to run, it imports this package, and `sys.argv[0]` is "-m".
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":
        return any(word.split(".")[0] == "fusion" for word in getattr(sys, "orig_argv", ()))
    return os.path.dirname(os.path.abspath(program)) == os.path.join(os.path.dirname(os.path.dirname(__file__)), "jobs")


_refuse_wrong_python()


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fusion' has no attribute {name!r}")
    module = import_module(f"fusion.{_EXPORTS[name]}")
    return module if name == "pointers" else getattr(module, name)
