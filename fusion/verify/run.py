"""Checks of a run: what it was started with, its attempts, its checkpoints and the history of its training.

No kill, and no training that goes on meanwhile, leaves anything that is BAD here. The order in which a run is written
says what may be missing: config.json, lease.json, attempts/<n>/start.json, features.safetensors where sources are
computed, run.json, split.parquet, memory.safetensors where the model leans on neighbours, then for each checkpoint the
history, the files and the manifest, and at the end the pointers, log.txt and exit.json.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass

from fusion import storage
from fusion.errors import DataError, ExitCode
from fusion.records.manifests import FEATURES, LINES, MANIFEST, MEMORY, PULLED, SPLIT
from fusion.records.run import CONFIG, EXIT, FACTS, LEASE, START, RunFolder, config_digest
from fusion.records.schemas import (
    AttemptEnd,
    AttemptStart,
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


@dataclass(frozen=True)
class CheckedRun:
    """What of a run other documents can be compared with.

    Attributes:
        facts: None: there is no `run.json`, or it is damaged.
        run_sha256, split_sha256, features_sha256, memory_sha256: of the bytes of `run.json`, `split.parquet`,
            `features.safetensors` and `memory.safetensors`; empty: there is none.
        validating: ids of the rows that validate; None: unknown.
        left_out: paths below the folder that `jobs/pull.py` did not fetch; None: this is no pulled copy.
        committed: names of the checkpoints that have a manifest, oldest first.
        checkpoints: their manifests by name, but for damaged ones.
        ends: how its attempts ended, by number.
    """

    folder: RunFolder
    facts: RunFacts | None
    run_sha256: str
    split_sha256: str
    features_sha256: str
    memory_sha256: str
    validating: set[str] | None
    left_out: tuple[str, ...] | None
    committed: list[str]
    checkpoints: dict[str, CheckpointManifest]
    ends: dict[int, AttemptEnd]

    @property
    def newest(self) -> CheckpointManifest | None:
        return self.checkpoints.get(self.committed[-1]) if self.committed else None

    @property
    def last_end(self) -> AttemptEnd | None:
        return self.ends[max(self.ends)] if self.ends else None


def check_run(report: Report, run: RunFolder) -> CheckedRun:
    """Checks all of a run's folder."""
    pulled = _check_pulled(report, run)
    facts, run_sha256 = _check_settings(report, run)
    content = read(run.at(SPLIT))
    n_wrong = report.n_wrong
    validating = _check_split(report, content, expected=_is_trained(run))
    whole_split = content if report.n_wrong == n_wrong else None  # with a damaged one nothing else is compared
    split_sha256 = "" if content is None else storage.sha256(content)
    features_sha256 = _check_features(report, run, facts)
    memory_sha256 = _check_memory(report, run, whole_split, facts)
    digests = (run_sha256, split_sha256, features_sha256, memory_sha256)
    checked = CheckedRun(run, facts, *digests, validating, pulled, [], {}, {})
    checked.ends.update(_check_attempts(report, checked))  # before the checkpoints: an end names one that is committed
    _check_checkpoints(report, checked)
    _check_ends(report, checked)
    _check_history(report, checked)
    check_metrics(report, run, facts, checked.checkpoints, validating)
    check_ablation(report, run, facts, checked.checkpoints)
    return checked


def _check_pulled(report: Report, run: RunFolder) -> tuple[str, ...] | None:
    content = read(run.at(PULLED))
    marker = None if content is None else parsed(report, PULLED, content, Pulled)
    return marker.left_out if marker else None


def _is_trained(run: RunFolder) -> bool:
    """Whether a checkpoint was begun: all that a run is started with was written before."""
    return bool(storage.ls(run.at("checkpoints")))


def _check_settings(report: Report, run: RunFolder) -> tuple[RunFacts | None, str]:
    """`config.json` and `run.json`: the latter's facts and the sha256 of its bytes."""
    settings, content = read(run.at(CONFIG)), read(run.at(FACTS))
    config = parsed(report, CONFIG, settings, DataOfRun, sealed=False)
    if content is None and not _is_trained(run) and not storage.exists(run.at(SPLIT)):
        report.note("run.json: not written yet; no attempt has read its data")
        return None, ""
    facts = parsed(report, FACTS, content, RunFacts)
    if facts is None:
        return None, ""
    if storage.base(run.url.rpartition("/")[0]) == "runs":  # and not of a copy that lies elsewhere
        report.expect("run.json: run_id", run.run_id, facts.run_id)
    if settings and config:
        _compare_settings(report, settings, facts)
    return facts, storage.sha256(content or b"")


def _compare_settings(report: Report, settings: bytes, facts: RunFacts) -> None:
    digest, expected = config_digest(json.loads(settings)), facts.config_json_sha256
    if digest != facts.config_sha256 or expected in (
        None,
        storage.sha256(settings),
    ):  # earlier versions did not write it
        report.expect("config.json: config_sha256 of run.json", facts.config_sha256, digest)
    else:
        report.bad("config.json: config_json_sha256 of run.json", expected, storage.sha256(settings))


def _check_split(report: Report, data: bytes | None, *, expected: bool) -> set[str] | None:
    """Ids of the rows that validate; None: there is no whole split."""
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
    expected_sides = {"validation"} if "fold" in split else {"train", "validation"}  # of all folds, all rows validate
    if set(sides) - {"dropped"} != expected_sides:
        wanted = " and ".join(sorted(expected_sides))
        report.bad(f"{SPLIT}: sides", wanted, " and ".join(sorted(sides)) or "no rows")
        return None
    others = f", {sides['dropped']} are dropped" if sides["dropped"] else ""
    report.ok(f"{SPLIT}: {sides['train']} rows train, {sides['validation']} validate{others}")
    return {sample_id for sample_id, side in zip(ids, split["side"], strict=True) if side == "validation"}


def _check_features(report: Report, run: RunFolder, facts: RunFacts | None) -> str:
    """sha256 of `features.safetensors`; empty if there is none."""
    from fusion.features.fitted import from_bytes

    content = read(run.at(FEATURES))
    if content is None:
        return ""
    try:
        dims = from_bytes(content, FEATURES).dims
    except DataError as error:
        report.bad(FEATURES, "what sources are computed with", error.message)
        return storage.sha256(content)
    if facts is not None:
        report.expect(f"{FEATURES}: dims of run.json", {role: facts.dims.get(role) for role in dims}, dims)
    return storage.sha256(content)


def _check_memory(report: Report, run: RunFolder, split: bytes | None, facts: RunFacts | None) -> str:
    """sha256 of `memory.safetensors`; empty if there is none."""
    content = read(run.at(MEMORY))
    if content is None:
        return ""
    check_memory(report, content, split, facts)
    return storage.sha256(content)


def _check_attempts(report: Report, run: CheckedRun) -> dict[int, AttemptEnd]:
    """How the attempts ended, by number; one that was killed, or still runs, has no end."""
    folders = {storage.base(folder): folder for folder in storage.ls(run.folder.at("attempts"))}
    numbers = sorted(int(name) for name in folders if name.isdigit())
    _check_lease(report, run, numbers)
    ends = {number: _check_attempt(report, folders[str(number)], number) for number in numbers}
    return {number: end for number, end in ends.items() if end is not None}


def _check_lease(report: Report, run: CheckedRun, numbers: list[int]) -> None:
    content = read(run.folder.at(LEASE))  # after the list of attempts: each takes the lease first
    if content is None and LEASE in (run.left_out or ()):
        return
    if content is None and not numbers:
        report.note("no attempt has begun")
        return
    lease = parsed(report, LEASE, content, LeaseRecord)
    if lease is not None and numbers and lease.attempt < numbers[-1]:
        report.bad("lease.json: attempt", f"at least {numbers[-1]}, as in attempts/", lease.attempt)


def _check_attempt(report: Report, folder: str, number: int) -> AttemptEnd | None:
    if not storage.ls(folder):
        return None  # on a file system, of an attempt that was killed while it wrote its first file
    start = parsed(report, f"attempts/{number}/start.json", read(storage.join(folder, START)), AttemptStart)
    if start is not None:
        report.expect(f"attempts/{number}/start.json: attempt", number, start.attempt)
    content = read(storage.join(folder, EXIT))
    if content is None:
        report.note(f"attempts/{number}: has not ended, or was killed")
        return None
    end = parsed(report, f"attempts/{number}/exit.json", content, AttemptEnd)
    if end is not None and end.attempt is not None:
        report.expect(f"attempts/{number}/exit.json: attempt", number, end.attempt)
    if end is not None and end.log is not None:
        check_beginning(report, f"attempts/{number}/log.txt", end.log, read(storage.join(folder, end.log.key)))
    return end


def _check_checkpoints(report: Report, run: CheckedRun) -> None:
    """Adds to the run what is committed."""
    folders = storage.ls(run.folder.at("checkpoints"))
    for folder in folders:
        if storage.exists(storage.join(folder, MANIFEST)):
            _check_checkpoint_of_run(report, folder, run)
    for folder in folders:
        if storage.base(folder) not in run.committed:
            _check_uncommitted(report, folder, run)
    if not run.committed:
        report.note("no committed checkpoint")


def _check_uncommitted(report: Report, folder: str, run: CheckedRun) -> None:
    """A kill leaves such a folder, but not of a checkpoint that pruning has left beside the newest."""
    name = storage.base(folder)
    if run.newest and name in run.newest.earlier and storage.ls(folder) and _is_newest(run):
        report.bad(f"{name}/{MANIFEST}", f"one, as {run.newest.name} says", "no such file")
    else:
        report.note(f"{name}: not committed, so it does not count")


def _is_newest(run: CheckedRun) -> bool:
    """Whether what was the newest checkpoint still is: the next one prunes, and this looks later than that lists."""
    folders = storage.ls(run.folder.at("checkpoints"))
    later = [folder for folder in folders if storage.base(folder) > run.committed[-1]]
    return not any(storage.exists(storage.join(folder, MANIFEST)) for folder in later)


def _check_checkpoint_of_run(report: Report, folder: str, run: CheckedRun) -> None:
    part, name = Report(place=report.place), storage.base(folder)
    left_out = {storage.base(path) for path in run.left_out or ()}
    manifest = check_checkpoint(part, folder, left_out, run.facts, run.validating)
    if manifest is not None:
        _check_lineage(part, name, manifest, run)
    if part.n_wrong and not storage.exists(storage.join(folder, MANIFEST)):
        report.note(f"{name}: removed while it was read")
        return
    report.add(*part.findings)
    run.committed.append(name)
    run.checkpoints.update({name: manifest} if manifest else {})


def _check_lineage(report: Report, name: str, manifest: CheckpointManifest, run: CheckedRun) -> None:
    files = {"split_sha256": SPLIT, "run_sha256": FACTS, "features_sha256": FEATURES, "memory_sha256": MEMORY}
    for key, file in files.items():
        stated, found = getattr(manifest, key), getattr(run, key)
        if stated and found:
            report.expect(f"{name}: {key} of {file}", found, stated)
        elif stated and file in (FEATURES, MEMORY):
            report.bad(f"{name}: {key} of {file}", stated, "no such file")
    for key in ("config_sha256", "data_sha256"):
        if run.facts is not None:
            report.expect(f"{name}: {key} of run.json", getattr(run.facts, key), getattr(manifest, key))


def _check_ends(report: Report, run: CheckedRun) -> None:
    """Whether what the newest attempt that ended had committed is there; pulled copies have only the best."""
    end = run.last_end
    if end is None or run.left_out is not None:
        return
    # A kill comes before the end is recorded, and pruning never removes the newest.
    steps = {int(name.removeprefix("step-")) for name in run.committed if name.removeprefix("step-").isdigit()}
    if end.step > max(steps, default=-1):
        report.bad("checkpoints", f"step-{end.step:08d}, as the newest exit.json says", some(run.committed))
    elif end.code == ExitCode.DONE and run.newest and not run.newest.finished:
        report.bad("checkpoints: finished, as the newest exit.json says", True, run.newest.finished)


def _check_history(report: Report, run: CheckedRun) -> None:
    """Whether `metrics/` has the history that the newest checkpoint was made with: more only while it goes on."""
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
    """Which epoch's weights are kept, and its SMAPE; None: config.json is damaged, which has a check of its own."""
    try:
        settings = json.loads(read(run.at(CONFIG)) or b"")
    except ValueError:
        return None
    is_last = isinstance(settings, dict) and settings.get("schedule") == "cosine"
    return ("last", smapes[-1]) if is_last else ("lowest", min(smapes))
