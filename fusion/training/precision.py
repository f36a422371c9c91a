"""`--precision auto`: measures in which arithmetic a step is faster on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

from fusion import log

Precision = Literal["fp32", "bf16"]

REPEATS = 3  # per arithmetic; the fastest counts
# bfloat16 rounds more coarsely, so it has to save at least this share of the time.
WORTH = 0.1


def faster_precision(
    trial: Callable[[Precision], Callable[[], object]], warm_up: int, device: torch.device
) -> Precision:
    """Returns the arithmetic in which a step is faster, and logs both times.

    Args:
        trial: for an arithmetic, a function that computes the gradients of a batch in it.
        warm_up: calls of that function that are not counted.
    """
    milliseconds = {kind: 1000 * _seconds(trial(kind), warm_up, device) for kind in _KINDS}
    chosen: Precision = "bf16" if milliseconds["bf16"] < (1 - WORTH) * milliseconds["fp32"] else "fp32"
    log.info(event="precision", chosen=chosen, fp32_ms=milliseconds["fp32"], bf16_ms=milliseconds["bf16"])
    return chosen


_KINDS: tuple[Precision, ...] = ("fp32", "bf16")


def _seconds(compute: Callable[[], object], warm_up: int, device: torch.device) -> float:
    times = []
    for _ in range(warm_up + REPEATS):
        began = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[warm_up:])
