"""Finds the run or submission that a user named, and plans which of its files to pull."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from fusion import storage
from fusion.errors import DataError, UsageError, did_you_mean
from fusion.jobs.results.bucket import Listing, best_checkpoint, current_of
from fusion.jobs.results.transfer import Item, Plan
from fusion.records.find_run import no_run
from fusion.records.manifests import (
    BASELINES,
    ENSEMBLE,
    FEATURES,
    MANIFEST,
    MEMORY,
    PULLED,
    SPLIT,
    STATE,
    Checkpoint,
    Folder,
)
from fusion.records.output import OutputFolder, key_of
from fusion.records.run import LEASE, RunFolder
from fusion.records.schemas import (
    CheckpointManifest,
    FileEntry,
    Manifest,
    Pulled,
    RunPointer,
    SubmissionManifest,
    SubmissionPointer,
    parse,
    seal,
)

POINTERS = ("latest", "best")
# Files of a run that no manifest names and that are pulled nevertheless: those at the top, in attempts/, metrics/ and
# tensorboard/.
# Other files, such as the resumable chunks of an evaluation under way, stay in the bucket. The pattern also excludes
# `..` and absolute paths, so that no object can be written outside the folder.
UNLISTED = re.compile(r"(attempts/\d+/|metrics/|tensorboard/)?[A-Za-z0-9][A-Za-z0-9._-]*")

# Files at the top of a run whose sha256 is in the manifest of its checkpoints.
DIGESTED = (SPLIT, FEATURES, MEMORY, BASELINES)


@dataclass(frozen=True)
class Choice:
    """What to pull.

    Attributes:
        path: the folder's path below the output.
        pointer: path and content of the pointer that named the folder; empty when the user gave an id.
    """

    output: OutputFolder
    path: str
    pointer: dict[str, bytes]

    @property
    def url(self) -> str:
        return self.output.at(self.path)


def choose_run(output: OutputFolder, which: str, variant: str | None) -> Choice:
    """The run with this id, or the one that the pointer `latest` or `best` of a variant names.

    Args:
        which: an id, `latest` or `best`.
        variant: whose pointer to read; None: the only variant that has runs.

    Raises:
        DataError: there is no such run.
        UsageError: several variants have runs, and `variant` is None.
    """
    if which not in POINTERS:
        if which not in [run.run_id for run in output.runs()]:
            raise no_run(output.url, which)
        return Choice(output, f"runs/{which}", {})
    variant = variant or _only_variant(output)
    path = f"pointers/runs/{variant}/{which}.json"
    content = storage.read_if_exists(output.at(path))
    if content is None:
        raise DataError(f"no finished run of {variant} under {output}", _listing_hint("runs", output))
    return Choice(output, f"runs/{parse(RunPointer, content, output.at(path)).run_id}", {path: content})


def _only_variant(output: OutputFolder) -> str:
    variants = [folder.name for folder in output.ls("pointers", "runs")]
    if len(variants) == 1:
        return variants[0]
    if not variants:
        raise DataError(
            f"no finished run under {output}", f"{_listing_hint('runs', output)}; --output names the bucket"
        )
    raise UsageError(f"there are runs of {' and '.join(variants)}", f"choose with --variant {variants[0]}")


def choose_submission(output: OutputFolder, which: str, name: str) -> Choice:
    """A submission by its date or DATE/DIGEST, or the one that is `current`.

    Raises:
        DataError: there is no such submission, or the date has several and none of them is current.
    """
    if which == "current":
        return _current_submission(output, name)
    date, _, digest = which.partition("/")
    found = [folder for folder in output.submissions(name, date) if folder.is_committed()]
    matching = [folder for folder in found if folder.name == digest or not digest]
    if len(matching) > 1:
        current = current_of(output, name)
        matching = [folder for folder in matching if key_of(folder) == current] or matching
    if len(matching) == 1:
        return Choice(output, f"submissions/{key_of(matching[0])}", {})
    there = ", ".join(f"{date}/{folder.name}" for folder in found)
    raise DataError(
        f"{len(matching) or 'no'} submissions {which} of {name!r} under {output}",
        f"name one of {there}" if there else _listing_hint("submissions", output),
    )


def _current_submission(output: OutputFolder, name: str) -> Choice:
    path = f"pointers/submissions/{name}/current.json"
    content = storage.read_if_exists(output.at(path))
    if content is None:
        near = did_you_mean(name, [folder.name for folder in output.ls("pointers", "submissions")])
        hint = near + _listing_hint("submissions", output)
        raise DataError(f"no submission named {name!r} under {output}", hint)
    pointer = parse(SubmissionPointer, content, output.at(path))
    return Choice(output, f"submissions/{pointer.submission}", {path: content})


def plan_run(choice: Choice, *, state: bool) -> Plan:
    """The files of a run to pull: all but its lease, the temporary ones and all checkpoints except the best.

    Args:
        state: whether to pull `state.pt` of the best checkpoint.
    """
    run = RunFolder(choice.url)
    listing = storage.find(run.url)
    if not listing:  # The pointer may name a run that was deleted.
        raise no_run(choice.output.url, run.run_id)
    if ENSEMBLE in listing:  # The folder has no weights: its members are other runs.
        files = _committed(choice.output, choice.path, Manifest)
        return _marked(choice, _merged(files, _unlisted(choice.path, listing, files, None)), [])
    best = best_checkpoint(run, listing)
    metrics = _committed(choice.output, f"{choice.path}/metrics", Manifest, required=False)
    plan = _merged(metrics, _unlisted(choice.path, listing, metrics, best))
    if best:
        weights = _committed(choice.output, f"{choice.path}/checkpoints/{best.name}", CheckpointManifest)
        kept = [item for item in weights.items if state or storage.base(item.path) != STATE]
        plan = _merged(plan, Plan(kept, weights.last))
    return _marked(choice, plan, [LEASE] if state or not best else [LEASE, f"checkpoints/{best.name}/{STATE}"])


def plan_submission(choice: Choice) -> Plan:
    """The files of a submission to pull: its manifest and all that the manifest names."""
    return _marked(choice, _committed(choice.output, choice.path, SubmissionManifest), [])


def _marked(choice: Choice, plan: Plan, left_out: list[str]) -> Plan:
    """The plan, with the pointer, and a document that tells `fusion.verify` which files the copy lacks on purpose."""
    marker = seal(asdict(Pulled(choice.url, tuple(left_out))))
    return _merged(plan, Plan([], {**choice.pointer, f"{choice.path}/{PULLED}": marker}))


def _committed(output: OutputFolder, path: str, kind: type[Manifest], *, required: bool = True) -> Plan:
    """The files that the manifest of a folder names, and the manifest.

    Args:
        required: False for metrics/, which has no manifest before the first evaluation and while one is rewriting it.
    """
    folder = Folder(output.at(path))
    url = folder.manifest_url
    content = storage.read(url) if required else storage.read_if_exists(url)
    if content is None:
        return Plan([], {})
    files = parse(kind, content, url).files
    items = [Item(folder.at(entry.key), f"{path}/{entry.key}", entry) for entry in files]
    return Plan(items, {f"{path}/{MANIFEST}": content})


def _unlisted(path: str, listing: Listing, listed: Plan, best: Checkpoint | None) -> Plan:
    """The files of a run that are in none of its manifests' lists of files.

    Those in `DIGESTED` are verified nevertheless: the manifest of a checkpoint has their digests.

    Args:
        path: the run's folder below the output.
        listed: the plan of the files that a manifest names: that of metrics/, or of an ensemble.
        best: its best checkpoint; None if it has none, or is an ensemble.
    """
    named = {item.path for item in listed.items} | set(listed.last)
    below = sorted(name for name in listing if UNLISTED.fullmatch(name) and f"{path}/{name}" not in named)
    digests = _unlisted_digests(best) if best else {}
    left_out = {LEASE, PULLED, *DIGESTED, f"metrics/{MANIFEST}"}
    items = [Item(listing[name].url, f"{path}/{name}") for name in below if name not in left_out]
    for name in DIGESTED:
        if name in listing:
            found, digest = listing[name], digests.get(name)  # empty for runs of earlier versions
            entry = FileEntry(name, found.size, digest) if digest else None
            items.append(Item(found.url, f"{path}/{name}", entry))
    return Plan(items, {})


def _unlisted_digests(best: Checkpoint) -> dict[str, str]:
    made = best.manifest
    digests = {SPLIT: made.split_sha256, FEATURES: made.features_sha256, MEMORY: made.memory_sha256}
    return digests | {BASELINES: made.baselines_sha256}


def _merged(first: Plan, second: Plan) -> Plan:
    return Plan([*first.items, *second.items], {**first.last, **second.last})


def _listing_hint(what: str, output: OutputFolder) -> str:
    return f"`python jobs/pull.py {what} --output {output}` lists what is there"
