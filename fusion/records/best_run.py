"""Decides which run of a variant the pointers name: the newest, the best of each kind, and the one that is served.

    pointers/runs/<variant>/latest.json          the run that started last among those that finished
    pointers/runs/<variant>/best-<digest>.json   the best run of one kind; the digest is that of its split
    pointers/runs/<variant>/best.json            the served run, which evaluations and predictions use by default

Two runs are of the same kind if their `split.parquet` is the same, so that they validate on the same rows with the same
prices. Only then can their SMAPEs be compared. A training on other data therefore has a best of its own. It does not
become the served run unless --promote is given; a better run of the same kind does.
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
    """Name of the pointer to the best run with this split, such as "best-1f2e3d4c"."""
    return f"{SERVED}-{split_sha256[:8]}"


def exists(output: str, pointer: RunPointer) -> bool:
    """Whether the run or ensemble that the pointer names still exists."""
    return RunFolder.named(output, pointer.run_id).exists()


def served(output: str, variant: str) -> RunPointer | None:
    """The run that evaluations and predictions of a variant use; None if no run is served, or it was deleted."""
    pointer = pointed_to(output, variant)
    return pointer if pointer is not None and exists(output, pointer) else None


def pointed_to(output: str, variant: str) -> RunPointer | None:
    """As `served`, but does not check whether the run still exists."""
    return pointers.read(RunPointer, output, "runs", variant, SERVED)


def point_to_run(config: RunConfig, chosen: manifests.Checkpoint) -> None:
    """Moves those pointers of a variant that should name a run that has just finished.

    `latest` moves unless it names a run that started later. The best of its kind moves unless it names a run with the
    same or a lower SMAPE. `best`, the served run, moves if --promote was given, if no existing run is served, or if the
    served run is of the same kind and has a higher SMAPE.
    """
    target = RunPointer(config.name(), chosen.name, chosen.smape, model_sha256=chosen.model_sha256)
    target = replace(target, split_sha256=RunFolder.of(config).split_digest())
    point_to(config.output, config.variant, target, promote=config.promote)


def point_to(output: str, variant: str, target: RunPointer, *, promote: bool) -> None:
    """As `point_to_run`, for a run or an ensemble whose id is `target.run_id`."""
    folder = (output, "runs", variant)

    def started_later(latest: RunPointer) -> bool:
        return _started(output, latest) > _started(output, target)

    def stays_best(other: RunPointer) -> bool:
        return other.smape <= target.smape and exists(output, other)

    pointers.move(*folder, "latest", target=target, unless=started_later)
    pointers.move(*folder, best_of_kind(target.split_sha256), target=target, unless=stays_best)
    before = served(output, variant)

    def stays_served(now: RunPointer) -> bool:
        if promote or not exists(output, now):
            return False
        return not _same_kind(output, now, target) or now.smape <= target.smape

    is_served = pointers.move(*folder, SERVED, target=target, unless=stays_served)
    if before is not None and before.run_id != target.run_id:
        _log_served(is_served, before, target, _same_kind(output, before, target))


def _same_kind(output: str, first: RunPointer, second: RunPointer) -> bool:
    digests = [_split_digest(output, pointer) for pointer in (first, second)]
    return digests[0] == digests[1] != ""  # empty: the split was deleted, so nothing can be compared


def _split_digest(output: str, pointer: RunPointer) -> str:
    # Pointers of earlier versions have no digest; then it is computed from the split in the run's folder.
    return pointer.split_sha256 or RunFolder.named(output, pointer.run_id).split_digest()


def _log_served(is_served: bool, before: RunPointer, target: RunPointer, same_kind: bool) -> None:
    facts = {"run_id": target.run_id, "smape": target.smape, "other": before.run_id, "other_smape": before.smape}
    if is_served:
        log.info(event="served", **facts)
    elif same_kind:
        log.info(event="not_better", **facts)
    else:
        log.warning(
            event="not_served",
            reason="its validation rows or prices differ from the served run's, so their SMAPEs cannot be compared",
            hint="to predict with this run from now on, run the same command again with --promote",
            **facts,
        )


def _started(output: str, pointer: RunPointer) -> str:
    """The run's start in UTC, as text that sorts by time; empty if `run.json` is missing or damaged."""
    facts = RunFolder.named(output, pointer.run_id).facts_if_whole()
    return facts.started if facts else ""
