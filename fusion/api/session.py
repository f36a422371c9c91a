"""What each call from Python sets up and takes down, so that a notebook is afterwards as it was before."""

from __future__ import annotations

import builtins
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from fusion import log, signals, storage

_turn = threading.RLock()


@contextmanager
def session(store_timeout: float = 60.0, *, shown: log.Level = "warning") -> Iterator[None]:
    """Inside the block, the log is that of one call, and stores are retried for so many seconds.

    Calls of other threads wait, because the log and the process group belong to the process. Random generators are
    restored after the block: a training seeds them, and a model's first weights are drawn.

    Args:
        shown: the least important level of the log that is shown; in a notebook as short lines.
    """
    with _turn:
        before = storage.patience()
        storage.set_patience(store_timeout)
        try:
            with log.separate(shown, short=hasattr(builtins, "__IPYTHON__")), _random_state_kept():
                yield
        finally:
            storage.set_patience(before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block, the first Ctrl-C (or "interrupt the kernel") lets a training commit before it stops.

    Only the main thread may handle signals; elsewhere, KeyboardInterrupt cannot occur either.
    """
    in_main = threading.current_thread() is threading.main_thread()
    with signals.listening() if in_main else nullcontext():
        yield


@contextmanager
def _random_state_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    # Asking for the state of a GPU that nobody uses yet would allocate memory on it.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
