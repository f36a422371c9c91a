"""Keeps torch from loading its compiler in processes that compile nothing.

The first optimizer or `DistributedDataParallel` of a process makes torch import `torch._dynamo`, and with it sympy,
inductor and 700 more modules: 1.5 s of processor time and 70 MB per rank, a quarter of a small training, for functions
that do nothing outside of `torch.compile`. A stand-in answers these calls; anything else loads the real module.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

COMPILER = "torch._dynamo"


class _Part(SimpleNamespace):
    """What torch reads of one submodule of the compiler."""

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_load(), self.part), name)


class _StandIn(ModuleType):
    """The compiler as torch's optimizers and process groups call it where nothing is compiled."""

    utils = _Part(part="utils", get_optimize_ddp_mode=lambda: "no_optimization")
    trace_rules = _Part(part="trace_rules", clear_lru_cache=lambda: None)

    @staticmethod
    def disable(function: Any = None, *arguments: Any, **options: Any) -> Any:
        return function if callable(function) else _load().disable(function, *arguments, **options)

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Only a graph that is being compiled can break."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_load(), name)


def defer_compiler() -> None:
    """Puts the stand-in where torch looks for its compiler, unless that is loaded already."""
    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = torch._dynamo = _StandIn(COMPILER)


def _load() -> Any:
    if isinstance(sys.modules.get(COMPILER), _StandIn):
        del sys.modules[COMPILER], torch._dynamo
    return import_module(COMPILER)
