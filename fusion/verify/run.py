"""Checks of a run: its settings, its data split, its attempts, its checkpoints and the history of its training.

A run that is killed at any moment, or is still training during the check, must not be reported as BAD. What may be
missing follows from the order in which a run writes its files:

1. config.json, lease.json and attempts/<n>/start.json,
2. features.safetensors (if sources are computed), run.json, split.parquet, memory.safetensors (if the model uses
   neighbours) and baselines.json (unless it could not be computed),
3. for each checkpoint, the history in metrics/, the files of the checkpoint, and its manifest,
4. at the end, the pointers, log.txt and exit.json,
5. model_card.md and report.html, which evaluations and ablations write again.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass

from fusion import storage
from fusion.errors import DataError, ExitCode
from fusion.records.manifests import BASELINES, FEATURES, LINES, MANIFEST, MEMORY, PULLED, SPLIT, Folder
from fusion.records.run import CONFIG, EXIT, FACTS, LEASE, START, RunFolder, config_digest
from fusion.records.schemas import (
    AttemptEnd,
    AttemptStart,
    Baselines,
    CheckpointManifest,
    DataOfRun,
    LeaseRecord,
    Pulled,
    RunFacts,
)
from fusion.verify.checkpoint import check_checkpoint
from fusion.verify.findings import Report, check_beginning, check_content, check_once, first_line, parsed, read, some
from fusion.verify.memory import check_memory
from fusion.verify.metrics import check_ablation, check_metrics
from fusion.verify.page import check_run_pages
from fusion.verify.segments import check_segments


@dataclass(frozen=True)
class CheckedRun:
    """What the checks of a run have read so far, for comparisons with other documents.

    Attributes:
        facts: `run.json`; None if it is missing or damaged.
        run_sha256, split_sha256, features_sha256, memory_sha256, baselines_sha256: of the bytes of `run.json`,
            `split.parquet`, `features.safetensors`, `memory.safetensors` and `baselines.json`; empty if the file does
            not exist.
        validating: ids of the validation rows; None if the split is missing or damaged.
        left_out: paths below the folder that `jobs/pull.py` did not copy; None if the folder is not such a copy.
        committed: names of the checkpoints that have a manifest, oldest first.
        checkpoints: manifests of these by name, without damaged ones.
        ends: `exit.json` of the attempts that have ended, by number.
    """

    folder: RunFolder
    facts: RunFacts | None
    run_sha256: str
    split_sha256: str
    features_sha256: str
    memory_sha256: str
    baselines_sha256: str
    validating: set[str] | None
    left_out: tuple[str, ...] | None
    committed: list[str]
    checkpoints: dict[str, CheckpointManifest]
    ends: dict[int, AttemptEnd]

    @property
    def newest(self) -> CheckpointManifest | None:
        """Manifest of the newest checkpoint; None if there is no checkpoint, or this manifest is damaged."""
        return self.checkpoints.get(self.committed[-1]) if self.committed else None

    @property
    def last_end(self) -> AttemptEnd | None:
        """How the newest attempt that has ended did so; None if no attempt has ended."""
        return self.ends[max(self.ends)] if self.ends else None


def check_run(report: Report, run: RunFolder) -> CheckedRun:
    """Checks all files in the folder of a run; returns what other checks compare with."""
    pulled = _check_pulled(report, run)
    facts, run_sha256 = _check_settings(report, run)
    content = read(run.at(SPLIT))
    n_wrong = report.n_wrong
    validating = _check_split(report, content, expected=_is_trained(run))
    whole_split = content if report.n_wrong == n_wrong else None  # nothing else is compared with a damaged split
    split_sha256 = "" if content is None else storage.sha256(content)
    features_sha256 = _check_features(report, run, facts)
    memory_sha256 = _check_memory(report, run, whole_split, facts)
    baselines_sha256 = _check_baselines(report, run, validating)
    digests = (run_sha256, split_sha256, features_sha256, memory_sha256, baselines_sha256)
    checked = CheckedRun(run, facts, *digests, validating, pulled, [], {}, {})
    # Attempts are read before checkpoints: the checkpoint that an `exit.json` names is then committed already.
    checked.ends.update(_check_attempts(report, checked))
    _check_checkpoints(report, checked)
    _check_ends(report, checked)
    _check_history(report, checked)
    check_metrics(report, run, facts, checked.checkpoints, validating)
    check_ablation(report, run, facts, checked.checkpoints)
    check_run_pages(report, run, facts.run_id if facts else None, read(run.metrics.manifest_url))
    check_segments(report, run)
    return checked


def _check_pulled(report: Report, run: RunFolder) -> tuple[str, ...] | None:
    """Paths that `jobs/pull.py` did not copy; None if this is not a copy that it made."""
    content = read(run.at(PULLED))
    marker = None if content is None else parsed(report, PULLED, content, Pulled)
    return marker.left_out if marker else None


def _is_trained(run: RunFolder) -> bool:
    """Whether a checkpoint was begun. Then `run.json`, the split and the memory must exist."""
    return bool(run.ls("checkpoints"))


def _check_settings(report: Report, run: RunFolder) -> tuple[RunFacts | None, str]:
    """Checks `config.json` and `run.json`; returns the content of the latter, and the sha256 of its bytes."""
    settings, content = read(run.at(CONFIG)), read(run.at(FACTS))
    config = parsed(report, CONFIG, settings, DataOfRun, sealed=False)
    if content is None and not _is_trained(run) and not storage.exists(run.at(SPLIT)):
        report.note("run.json: not written yet; no attempt has read its data")
        return None, ""
    facts = parsed(report, FACTS, content, RunFacts)
    if facts is None:
        return None, ""
    if run.is_in_runs:
        report.expect("run.json: run_id", run.run_id, facts.run_id)
    if settings and config:
        _compare_settings(report, settings, facts)
    return facts, storage.sha256(content or b"")


def _compare_settings(report: Report, settings: bytes, facts: RunFacts) -> None:
    """Compares `config.json` with both digests in `run.json`: of the settings that matter, and of all its bytes."""
    digest, expected = config_digest(json.loads(settings)), facts.config_json_sha256
    is_same = expected in (None, storage.sha256(settings))  # None: an earlier version wrote `run.json`
    if digest != facts.config_sha256 or is_same:
        report.expect("config.json: config_sha256 of run.json", facts.config_sha256, digest)
    else:
        report.bad("config.json: config_json_sha256 of run.json", expected, storage.sha256(settings))


def _check_split(report: Report, data: bytes | None, *, expected: bool) -> set[str] | None:
    """Checks `split.parquet`; returns the ids of the validation rows, or None if it is missing or damaged.

    Args:
        data: its content; None if it does not exist.
        expected: whether it must exist.
    """
    import pandas as pd
    from pyarrow import ArrowException

    if data is None:
        if expected:
            report.bad(SPLIT, "sample_id and side", "no such file")
        return None
    try:
        split = pd.read_parquet(io.BytesIO(data))
        sides, ids = Counter(map(str, split["side"])), list(map(str, split["sample_id"]))
    except (ArrowException, ValueError, OSError, KeyError) as error:
        report.bad(SPLIT, "Parquet with sample_id and side", first_line(error))
        return None
    check_once(report, f"{SPLIT}: ids", ids)
    # If all folds are trained (the split has a column fold), every row validates in one of them.
    expected_sides = {"validation"} if "fold" in split else {"train", "validation"}
    if set(sides) - {"dropped"} != expected_sides:
        wanted = " and ".join(sorted(expected_sides))
        report.bad(f"{SPLIT}: sides", wanted, " and ".join(sorted(sides)) or "no rows")
        return None
    others = f", {sides['dropped']} are dropped" if sides["dropped"] else ""
    report.ok(f"{SPLIT}: {sides['train']} rows train, {sides['validation']} validate{others}")
    return {sample_id for sample_id, side in zip(ids, split["side"], strict=True) if side == "validation"}


def _check_features(report: Report, run: RunFolder, facts: RunFacts | None) -> str:
    """Checks `features.safetensors`; returns its sha256, or empty text if it does not exist."""
    from fusion.features.fitted import from_bytes

    content = read(run.at(FEATURES))
    if content is None:
        return ""
    try:
        dims = from_bytes(content, FEATURES).dims
    except DataError as error:
        report.bad(FEATURES, "a readable file", error.message)
        return storage.sha256(content)
    if facts is not None:
        report.expect(f"{FEATURES}: dims of run.json", {role: facts.dims.get(role) for role in dims}, dims)
    return storage.sha256(content)


def _check_memory(report: Report, run: RunFolder, split: bytes | None, facts: RunFacts | None) -> str:
    """Checks `memory.safetensors`; returns its sha256, or empty text if it does not exist."""
    content = read(run.at(MEMORY))
    if content is None:
        return ""
    check_memory(report, content, split, facts)
    return storage.sha256(content)


def _check_baselines(report: Report, run: RunFolder, validating: set[str] | None) -> str:
    """Checks `baselines.json`; returns its sha256, or empty text if it does not exist, as in earlier versions."""
    content = read(run.at(BASELINES))
    if content is None:
        return ""
    found = parsed(report, BASELINES, content, Baselines)
    if found is not None and validating is not None:
        report.expect(f"{BASELINES}: rows that validate", len(validating), found.rows)
    return storage.sha256(content)


def _check_attempts(report: Report, run: CheckedRun) -> dict[int, AttemptEnd]:
    """Checks all attempts; returns the ends by number. An attempt that was killed or still runs has no end."""
    numbers = sorted(int(attempt.name) for attempt in run.folder.ls("attempts") if attempt.name.isdigit())
    _check_lease(report, run, numbers)
    ends = {number: _check_attempt(report, run.folder.attempt(number), number) for number in numbers}
    return {number: end for number, end in ends.items() if end is not None}


def _check_lease(report: Report, run: CheckedRun, numbers: list[int]) -> None:
    """Checks that the lease is of the newest attempt, or a newer one.

    Each attempt takes the lease before it writes its folder, so the lease is read after the attempts were listed.

    Args:
        numbers: of the attempts that have a folder, ascending.
    """
    content = read(run.folder.at(LEASE))
    if content is None and LEASE in (run.left_out or ()):
        return
    if content is None and not numbers:
        report.note("no attempt has begun")
        return
    lease = parsed(report, LEASE, content, LeaseRecord)
    if lease is not None and numbers and lease.attempt < numbers[-1]:
        report.bad("lease.json: attempt", f"at least {numbers[-1]}, as in attempts/", lease.attempt)


def _check_attempt(report: Report, folder: Folder, number: int) -> AttemptEnd | None:
    """Checks start, end and log of an attempt; returns its end, or None if it has none."""
    if not folder.ls():
        return None  # an empty folder remains if an attempt on a file system was killed at its first write
    start = parsed(report, f"attempts/{number}/start.json", read(folder.at(START)), AttemptStart)
    if start is not None:
        report.expect(f"attempts/{number}/start.json: attempt", number, start.attempt)
    content = read(folder.at(EXIT))
    if content is None:
        report.note(f"attempts/{number}: has not ended, or was killed")
        return None
    end = parsed(report, f"attempts/{number}/exit.json", content, AttemptEnd)
    if end is not None and end.attempt is not None:
        report.expect(f"attempts/{number}/exit.json: attempt", number, end.attempt)
    if end is not None and end.log is not None:
        check_beginning(report, f"attempts/{number}/log.txt", end.log, read(folder.at(end.log.key)))
    return end


def _check_checkpoints(report: Report, run: CheckedRun) -> None:
    """Checks all checkpoints, and adds the committed ones to `run.committed` and `run.checkpoints`."""
    folders = run.folder.ls("checkpoints")
    for folder in folders:
        if folder.is_committed():
            _check_checkpoint_of_run(report, folder, run)
    for folder in folders:
        if folder.name not in run.committed:
            _check_uncommitted(report, folder, run)
    if not run.committed:
        report.note("no committed checkpoint")


def _check_uncommitted(report: Report, folder: Folder, run: CheckedRun) -> None:
    """Reports the folder of a checkpoint without a manifest.

    A job that is killed while it writes leaves one: only a note. But if the newest checkpoint names it among those that
    were kept, it had been committed, and its manifest was lost.
    """
    name = folder.name
    if run.newest and name in run.newest.earlier and folder.ls() and _is_newest(run):
        report.bad(f"{name}/{MANIFEST}", f"a file, as {run.newest.name} names this checkpoint", "no such file")
    else:
        report.note(f"{name}: not committed, so it does not count")


def _is_newest(run: CheckedRun) -> bool:
    """Whether no checkpoint was committed since the others were listed.

    A running training that commits one removes older ones afterwards, so that their absence is no error then.
    """
    later = [folder for folder in run.folder.ls("checkpoints") if folder.name > run.committed[-1]]
    return not any(folder.is_committed() for folder in later)


def _check_checkpoint_of_run(report: Report, folder: Folder, run: CheckedRun) -> None:
    """Checks a committed checkpoint; its findings are dropped if a running training removes it meanwhile."""
    part, name = Report(prefix=report.prefix), folder.name
    left_out = {storage.base(path) for path in run.left_out or ()}
    manifest = check_checkpoint(part, folder, left_out, run.facts, run.validating)
    if manifest is not None:
        _check_lineage(part, name, manifest, run)
    if part.n_wrong and not folder.is_committed():
        report.note(f"{name}: removed while it was read")
        return
    report.add(*part.findings)
    run.committed.append(name)
    run.checkpoints.update({name: manifest} if manifest else {})


def _check_lineage(report: Report, name: str, manifest: CheckpointManifest, run: CheckedRun) -> None:
    """Compares the digests in a checkpoint's manifest with the files of its run."""
    files = {"split_sha256": SPLIT, "run_sha256": FACTS, "features_sha256": FEATURES, "memory_sha256": MEMORY}
    files |= {"baselines_sha256": BASELINES}
    for key, file in files.items():
        stated, found = getattr(manifest, key), getattr(run, key)
        if stated and found:
            report.expect(f"{name}: {key} of {file}", found, stated)
        elif stated and file in (FEATURES, MEMORY, BASELINES):
            report.bad(f"{name}: {key} of {file}", stated, "no such file")
    for key in ("config_sha256", "data_sha256"):
        if run.facts is not None:
            report.expect(f"{name}: {key} of run.json", getattr(run.facts, key), getattr(manifest, key))


def _check_ends(report: Report, run: CheckedRun) -> None:
    """Checks that the newest checkpoint is at least as new as the newest `exit.json` says.

    A copy made by `jobs/pull.py` is not checked, since it has only the best checkpoint.
    """
    end = run.last_end
    if end is None or run.left_out is not None:
        return
    # An end is recorded after the last commit, and pruning never removes the newest checkpoint.
    steps = {int(name.removeprefix("step-")) for name in run.committed if name.removeprefix("step-").isdigit()}
    if end.step > max(steps, default=-1):
        report.bad("checkpoints", f"step-{end.step:08d}, as the newest exit.json says", some(run.committed))
    elif end.code == ExitCode.DONE and run.newest and not run.newest.finished:
        report.bad("checkpoints: finished, as the newest exit.json says", True, run.newest.finished)


def _check_history(report: Report, run: CheckedRun) -> None:
    """Checks that `metrics/` has the history that the newest checkpoint states.

    The history may be longer only if the training has not finished: it is written before the next manifest.
    """
    newest = run.newest
    if newest is None:
        return
    check = check_content if newest.finished else check_beginning
    for entry in newest.history:
        content = read(run.folder.at("metrics", entry.key))
        check(report, f"metrics/{entry.key}", entry, content)
        if entry.key == LINES and content is not None and storage.sha256(content[: entry.bytes]) == entry.sha256:
            rows = [json.loads(line) for line in content[: entry.bytes].splitlines()]
            report.expect(f"{newest.name}: epochs of {LINES}", len(rows), newest.epoch)
            smapes = [row["smape"] for row in rows]
            kept = _kept_smape(run.folder, smapes)
            if kept is not None:
                report.expect(f"{newest.name}: {kept[0]} smape of {LINES}", kept[1], newest.smape)


def _kept_smape(run: RunFolder, smapes: list[float]) -> tuple[str, float] | None:
    """Which epoch's weights the newest checkpoint must have, and their SMAPE.

    With the cosine schedule these are the last weights, otherwise those with the lowest validation SMAPE. Returns None
    if `config.json` is damaged, which is reported by its own check.

    Args:
        smapes: validation SMAPE after each epoch.
    """
    try:
        settings = json.loads(read(run.at(CONFIG)) or b"")
    except ValueError:
        return None
    is_last = isinstance(settings, dict) and settings.get("schedule") == "cosine"
    return ("last", smapes[-1]) if is_last else ("lowest", min(smapes))
