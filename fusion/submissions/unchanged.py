"""A night on which nothing has changed: told from the last submission's manifest and two listings, in eleven requests.

The manifest says which model, inputs and code its prices were made with. Where the served run, the listings and the
code are still those, its rows are published again, and neither the run nor the table is read. Where they are not, or
the manifest is of an earlier version and does not say, `fusion.submissions.submission` looks closely.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TypeVar

from fusion import log, storage
from fusion.config import PredictConfig, RunConfig
from fusion.data.inputs import find_inputs
from fusion.errors import DataError
from fusion.records import best_run, pointers, schemas
from fusion.records.find_run import data_of, open_run
from fusion.records.manifests import MANIFEST, SUBMISSION
from fusion.records.provenance import code_digest
from fusion.records.schemas import SubmissionManifest, SubmissionPointer, seal
from fusion.submissions import submission

C = TypeVar("C", bound=RunConfig)

Seen = tuple[bytes, str]  # a pointer's bytes and their version


def published(settings: PredictConfig, config_class: type[C]) -> str | None:
    """URL of the submission of this date when model, data and code have not changed since the last; else None.

    The last one is published again under this date if it bears another.

    Raises:
        DataError: no such run, or no such input.
    """
    settings = replace(settings, date=settings.day())  # midnight may come in between
    known = republish(settings, config_class.variant)
    if known is not None:
        return known
    run, config, best = open_run(settings, config_class)
    origin = submission.origin_of(run, best, config, data_of(settings, config.data))
    return submission.reuse(settings, origin)


def republish(settings: PredictConfig, variant: str, code: str = "prediction") -> str | None:
    """URL of the submission of this date if the manifest of the last one shows that nothing has changed; else None.

    Args:
        code: the module that predicts, as of `code_digest`.
    """
    if settings.run_id or settings.run_dir:  # the best checkpoint of a run that is named may be another by now
        return None
    place = pointers.url(settings.output, "submissions", settings.name, "current")
    seen = storage.read_version(place)
    pointer = None if seen is None else schemas.parse_if_whole(SubmissionPointer, seen[0], place, pointers.DAMAGED)
    if seen is None or pointer is None or pointer.date > settings.day():
        return None
    folder = storage.join(settings.output, "submissions", pointer.submission)
    manifest = schemas.read_if_whole(SubmissionManifest, storage.join(folder, MANIFEST), "submission_damaged")
    if manifest is None or manifest.date != pointer.date:  # damaged, or of another night than where it lies
        return None
    if not _is_current(settings, variant, manifest, code):
        return None
    return _carry_over(settings, pointer, folder, manifest, seen)


def _is_current(settings: PredictConfig, variant: str, manifest: SubmissionManifest, code: str) -> bool:
    """Whether the served model, the inputs and the code are those that the submission was made with."""
    if not manifest.inputs_version or manifest.code_sha256 != code_digest(code):
        return False
    run = best_run.pointed_to(settings.output, variant)
    if run is None or run.model_sha256 != manifest.model_sha256 or not _is_of(settings, run.run_id, manifest):
        return False
    inputs = find_inputs(data_of(settings, manifest.run_data), "test", manifest.sources)
    return inputs.version() == manifest.inputs_version


def _is_of(settings: PredictConfig, run_id: str, manifest: SubmissionManifest) -> bool:
    return storage.base(manifest.run) == run_id and manifest.name == settings.name


def _carry_over(
    settings: PredictConfig, pointer: SubmissionPointer, folder: str, manifest: SubmissionManifest, seen: Seen
) -> str | None:
    """Publishes the submission under this date; None if another one is in the way, or it is damaged."""
    content = submission.read_verified(folder, manifest, SUBMISSION)
    if content is None:
        return None
    if pointer.date == settings.day():
        return submission.published_before(folder, manifest.rows)
    key = f"{settings.name}/{settings.day()}/{storage.base(folder)}"
    target = storage.join(settings.output, "submissions", key)
    storage.write(storage.join(target, SUBMISSION), content)
    try:
        for entry in manifest.files:
            if entry.key != SUBMISSION:
                storage.copy(storage.join(folder, entry.key), storage.join(target, entry.key))
    except DataError as error:  # one of them is gone
        log.warning(event="submission_damaged", submission=folder, reason=error.message)
        return None
    data = settings.data or manifest.run_data
    again = replace(manifest, date=settings.day(), previous=pointer.submission, data=data)
    if not storage.create(storage.join(target, MANIFEST), seal(asdict(again))):
        return None
    log.info(event="published", rows=manifest.rows, submission=storage.join(target, SUBMISSION), unchanged=True)
    submission.point_to(settings, key, seen)
    return storage.join(target, SUBMISSION)
