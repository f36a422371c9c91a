"""Which run of a variant is the newest, the best of its kind, and the one that is served.

Runs are of a kind when they validate on the same rows with the same prices: their `split.parquet` is the same. Only
then do their SMAPEs say which is better. Training on other data starts another best, `best-<digest>.json`; what is
served, `best.json`, changes by a better run of the same kind, or when a person says so with --promote.
"""

from __future__ import annotations

from dataclasses import replace

from fusion import log
from fusion.config import RunConfig
from fusion.records import manifests, pointers
from fusion.records.run import RunFolder
from fusion.records.schemas import RunPointer

SERVED = "best"


def best_of_kind(split_sha256: str) -> str:
    """Name of the pointer to the best of the runs with this split."""
    return f"{SERVED}-{split_sha256[:8]}"


def exists(output: str, pointer: RunPointer) -> bool:
    """Whether the run, or the ensemble, is still there."""
    return RunFolder.named(output, pointer.run_id).exists()


def served(output: str, variant: str) -> RunPointer | None:
    """The run that evaluations and predictions of a variant use; None if there is none, or it was deleted."""
    pointer = pointed_to(output, variant)
    return pointer if pointer is not None and exists(output, pointer) else None


def pointed_to(output: str, variant: str) -> RunPointer | None:
    """As `served`, also if the run was deleted."""
    return pointers.read(RunPointer, output, "runs", variant, SERVED)


def point_to_run(config: RunConfig, chosen: manifests.Checkpoint) -> None:
    """Makes a finished run its variant's newest unless that began later, the best of its kind if it is, and served.

    It is served if --promote was given, if no other is, or if it is better than the served one and of its kind.
    """
    target = RunPointer(config.name(), chosen.name, chosen.smape, model_sha256=chosen.model_sha256)
    target = replace(target, split_sha256=RunFolder.of(config).split_digest())
    point_to(config.output, config.variant, target, promote=config.promote)


def point_to(output: str, variant: str, target: RunPointer, *, promote: bool) -> None:
    """As `point_to_run`, for what is finished under `target.run_id`, be it a run or an ensemble."""
    where = (output, "runs", variant)
    kind = best_of_kind(target.split_sha256)

    def is_kept(other: RunPointer) -> bool:
        return other.smape <= target.smape and exists(output, other)

    pointers.move(
        *where, "latest", target=target, unless=lambda latest: _began(output, latest) > _began(output, target)
    )
    pointers.move(*where, kind, target=target, unless=is_kept)
    before = served(output, variant)

    def stays_served(now: RunPointer) -> bool:
        if promote or not exists(output, now):
            return False
        return not _same_kind(output, now, target) or now.smape <= target.smape

    is_now = pointers.move(*where, SERVED, target=target, unless=stays_served)
    if before is not None and before.run_id != target.run_id:
        _tell(is_now, before, target, _same_kind(output, before, target))


def _same_kind(output: str, first: RunPointer, second: RunPointer) -> bool:
    # A pointer of an earlier version does not say: its run does.
    known = [one.split_sha256 or RunFolder.named(output, one.run_id).split_digest() for one in (first, second)]
    return known[0] == known[1] != ""


def _tell(is_served: bool, before: RunPointer, target: RunPointer, same_kind: bool) -> None:
    facts = {"run_id": target.run_id, "smape": target.smape, "other": before.run_id, "other_smape": before.smape}
    if is_served:
        log.info(event="served", **facts)
    elif same_kind:
        log.info(event="not_better", **facts)
    else:
        log.warning(
            event="not_served",
            reason="it validated on other rows or prices than the run that is served, so their SMAPEs do not compare",
            hint="to predict with this run from now on, run the same command again with --promote",
            **facts,
        )


def _began(output: str, pointer: RunPointer) -> str:
    facts = RunFolder.named(output, pointer.run_id).facts_if_whole()
    return facts.started if facts else ""
