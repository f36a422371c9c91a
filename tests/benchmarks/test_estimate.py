"""The estimate follows from its assumptions, and shows which of them were replaced."""

from __future__ import annotations

import pytest

from benchmarks.estimate import ASSUMED, assumptions, results, stages

GIVEN = {name: value for name, (value, _, _) in ASSUMED.items()}


def minutes(**replaced: float) -> dict[str, float]:
    return {stage.name: stage.seconds / 60 for stage in stages(GIVEN | replaced)}


def test_epochs_are_as_fast_as_the_slower_of_gpus_and_disks() -> None:
    slow, fast = minutes(epoch_rows_per_gpu=1000), minutes(epoch_rows_per_gpu=2000)
    assert slow["epochs"] == pytest.approx(1e9 * 0.8 * 20 / 64_000 / 60)
    assert fast["epochs"] == pytest.approx(slow["epochs"] / 2)
    assert minutes(epoch_rows_per_gpu=1e12) == minutes(epoch_rows_per_gpu=1e13), "then the disks are slower"


def test_more_nodes_do_not_shorten_what_one_process_does() -> None:
    some, more = minutes(), minutes(nodes=80)
    assert more["epochs"] < some["epochs"]
    assert {name for name in some if some[name] == more[name]} == set(some) - {"epochs"}


def test_a_replaced_assumption_is_shown_as_such() -> None:
    assert "| measured here, or given | gpu_hour 2 $ |" in list(assumptions(GIVEN | {"gpu_hour": 2.0}))


def test_dollars_are_those_of_gpus_and_of_requests() -> None:
    free_gpus, free_requests = ({"gpu_hour": 0.0}, {"gpu_hour": 1 / 64, "thousand_requests": 0.0})
    assert list(results(GIVEN | free_gpus))[-1].endswith("$6."), "8 nodes fetch 7.9 TB in requests of 4 MiB"
    hours = sum(minutes().values()) / 60
    assert list(results(GIVEN | free_requests))[-1].endswith(f"${hours:.0f}.")
