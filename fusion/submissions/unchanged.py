"""Detects a night on which nothing has changed, and publishes the last submission again, in eleven requests.

The manifest of the last submission says which model, input files and code its prices were made with. If the served
run, the listings of the inputs and the code are still the same, the submission is copied to the new date without
reading the run or the table. Otherwise, or if the manifest is of an earlier version that did not record this,
`fusion.submissions.submission` compares digests of the inputs.
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
from fusion.records.manifests import SUBMISSION
from fusion.records.output import OutputFolder, key_of
from fusion.records.provenance import code_digest
from fusion.records.schemas import SubmissionManifest, SubmissionPointer, seal
from fusion.submissions import submission

C = TypeVar("C", bound=RunConfig)

Seen = tuple[bytes, str]  # a pointer's bytes and their version, as `storage.read_version` returns them


def published(settings: PredictConfig, config_class: type[C]) -> str | None:
    """Publishes the last submission for this date if model, data and code have not changed since, without predicting.

    Returns its URL; None if something has changed, so that prices have to be predicted.

    Raises:
        DataError: the run or the input does not exist.
    """
    settings = replace(settings, date=settings.day())  # fixes the date, which would change if midnight passed meanwhile
    known = republish(settings, config_class.variant)
    if known is not None:
        return known
    run, config, best = open_run(settings, config_class)
    origin = submission.origin_of(run, best, config, data_of(settings, config.data))
    return submission.reuse(settings, origin)


def republish(settings: PredictConfig, variant: str, code: str = "prediction") -> str | None:
    """Publishes the last submission for this date if its manifest shows that nothing has changed.

    Returns its URL; None if something has changed, or the manifest does not record enough to decide.

    Args:
        code: the module that predicts, as for `code_digest`.
    """
    if settings.run_id or settings.run_dir:  # the run may have a better checkpoint by now, which no pointer names
        return None
    output = OutputFolder(settings.output)
    pointer_url = output.current_url(settings.name)
    seen = storage.read_version(pointer_url)
    if seen is None:
        return None
    pointer = schemas.parse_if_whole(SubmissionPointer, seen[0], pointer_url, pointers.DAMAGED)
    if pointer is None or pointer.date > settings.day():
        return None
    found = submission.open_submission(output.submission(pointer.submission))
    if found is None or found.manifest.date != pointer.date:  # damaged, or copied here from the folder of another date
        return None
    if not _is_current(settings, variant, found.manifest, code):
        return None
    return _carry_over(settings, found, seen)


def _is_current(settings: PredictConfig, variant: str, manifest: SubmissionManifest, code: str) -> bool:
    """Whether the served model, the inputs and the code are still those that the submission was made with."""
    if not manifest.inputs_version or manifest.code_sha256 != code_digest(code):
        return False
    run = best_run.pointed_to(settings.output, variant)
    if run is None or run.model_sha256 != manifest.model_sha256 or not _is_of(settings, run.run_id, manifest):
        return False
    inputs = find_inputs(data_of(settings, manifest.run_data), "test", manifest.sources)
    return inputs.version() == manifest.inputs_version


def _is_of(settings: PredictConfig, run_id: str, manifest: SubmissionManifest) -> bool:
    """Whether the submission is of this run, and was published under this name."""
    return storage.base(manifest.run) == run_id and manifest.name == settings.name


def _carry_over(settings: PredictConfig, found: submission.CommittedSubmission, seen: Seen) -> str | None:
    """Copies the submission to this date and makes it current; its URL.

    Returns None if it is damaged, or if the folder that it would be copied to has a manifest already.
    """
    manifest, content = found.manifest, found.read_whole(SUBMISSION)
    if content is None:
        return None
    if manifest.date == settings.day():
        return submission.published_before(found)
    key = f"{settings.name}/{settings.day()}/{found.name}"
    target = OutputFolder(settings.output).submission(key)
    url = target.at(SUBMISSION)
    storage.write(url, content)
    try:
        for entry in manifest.files:
            if entry.key != SUBMISSION:
                storage.copy(found.at(entry.key), target.at(entry.key))
    except DataError as error:  # one of the files does not exist any longer
        log.warning(event="submission_damaged", submission=found, reason=error.message)
        return None
    data = settings.data or manifest.run_data
    again = replace(manifest, date=settings.day(), previous=key_of(found), data=data)
    if not storage.create(target.manifest_url, seal(asdict(again))):
        return None
    log.info(event="published", rows=manifest.rows, submission=url, unchanged=True)
    submission.point_to(settings, key, seen)
    return url
