"""Checks of the store: does it answer, may this job read and write there, for how long, and do its rules hold."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec

from fusion import storage
from fusion.data.inputs import find_sources, find_table, source_names
from fusion.errors import DataError, ExitCode
from fusion.storage import backend
from jobs.checks.findings import Finding, Job, fail, ok, warn

REFUSED_AFTER = timedelta(minutes=15)  # S3 refuses signatures of a clock that is further off
NOTABLE = timedelta(seconds=30)
SOON = timedelta(minutes=15)
WHERE = ("data", "output")  # settings that other checks name


def credentials(job: Job) -> Finding | None:
    """Who this job is to S3, and for how long."""
    if not _buckets(job):
        return None
    if fsspec.config.conf.get("s3", {}).get("key"):
        return ok("keys from FSSPEC_S3_KEY or fsspec's configuration, which do not expire")
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        found = get_session().get_credentials()
        if found is None:
            return _no_credentials("the AWS provider chain finds none")
        token = found.get_frozen_credentials().token  # refreshes those that can be
    except (BotoCoreError, RuntimeError, OSError, ValueError) as error:  # RuntimeError: refreshed, and still expired
        return _no_credentials(f"{type(error).__name__}: {error}".splitlines()[0])
    return _life(found.method, getattr(found, "_expiry_time", None), bool(token))


def _no_credentials(cause: str) -> Finding:
    to_do = "sign in again, or give the job a role (IRSA, workload identity), a profile or AWS_ACCESS_KEY_ID"
    return fail(f"no usable credentials: {cause}", to_do, ExitCode.CREDENTIALS)


def _life(method: str, expiry: datetime | None, has_token: bool) -> Finding:
    if expiry is None and has_token:
        to_do = "set AWS_CREDENTIAL_EXPIRATION beside AWS_SESSION_TOKEN, or give the job a role that renews itself"
        return warn(f"from {method}: a session token that does not say when it expires", to_do)
    if expiry is None:
        return ok(f"from {method}: they do not expire")
    left = expiry - datetime.now(UTC)
    renewed = method not in ("env", "explicit")
    found = f"from {method}: valid for {_minutes(left)}"
    if left < SOON and not renewed:
        return warn(found, "sign in again before a long job; it ends with 77 when they expire, and goes on afterwards")
    return ok(f"{found}, then renewed" if renewed else found)


def _minutes(span: timedelta) -> str:
    minutes = int(span.total_seconds() // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def store(job: Job) -> Finding:
    """Whether the store of the output answers, and lets this job look."""
    started = time.monotonic()
    storage.ls(job.output)
    return ok(f"{job.output} answers in {1000 * (time.monotonic() - started):.0f} ms")


def clock(job: Job) -> Finding | None:
    """Whether this machine's clock is that of the store."""
    buckets = _buckets(job)
    if not buckets:
        return None
    skew = storage.retrying(f"s3://{buckets[0]}", lambda: _skew(buckets[0]))
    if skew is None:
        return warn("the store does not say what time it is", "compare the clock of this machine yourself: `date -u`")
    ahead = f"{abs(skew).total_seconds():.0f} s {'ahead of' if skew > timedelta() else 'behind'} the store's"
    if abs(skew) > REFUSED_AFTER:
        return fail(
            f"this clock is {ahead}, and S3 refuses requests from 900 s on", "set the clock (NTP)", ExitCode.CONFIG
        )
    if abs(skew) > NOTABLE:
        return warn(f"this clock is {ahead}", "set the clock (NTP); S3 refuses requests from 900 s on")
    return ok(f"this clock is {ahead}")


def _skew(bucket: str) -> timedelta | None:
    """This clock less the Date of an answer to an unsigned request: whatever else it says, it comes from the store."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import ClientError
    from botocore.session import get_session

    asked = Config(signature_version=UNSIGNED, connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 1})
    settings = fsspec.config.conf.get("s3", {})
    endpoint = settings.get("endpoint_url") or settings.get("client_kwargs", {}).get("endpoint_url")
    client: Any = get_session().create_client("s3", endpoint_url=endpoint, config=asked)
    before = datetime.now(UTC)
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    here = before + (datetime.now(UTC) - before) / 2
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    return here - parsedate_to_datetime(headers["date"]) if "date" in headers else None


def _buckets(job: Job) -> list[str]:
    urls = [re.fullmatch(r"s3a?://([^/]+).*", url) for url in (job.output, job.data)]
    return [found[1] for found in urls if found]


def data(job: Job) -> Finding:
    """Whether the tables and the embeddings are there."""
    bindings = job.settings.bindings() if job.variant else {}
    find_table(job.data, "train")
    train, test = source_names(job.data, "train"), source_names(job.data, "test")
    missing = {role: name for role, name in bindings.items() if name not in train}
    if missing or not train:
        return _without_sources(job, missing, train)
    find_sources(job.data, "train", bindings)  # each once
    needed = set(bindings.values()) or train
    lacking = ([] if _has_test(job) else ["test.csv"]) + sorted(needed - test)
    if lacking:
        return warn(f"train is there, test lacks {', '.join(lacking)}", "add what is missing before predict_test")
    return ok(f"{job.data} has train, test, and for both {', '.join(sorted(needed))}")


def _without_sources(job: Job, missing: dict[str, str], there: set[str]) -> Finding:
    lacks = " and no ".join(sorted(missing.values())) or "sources"
    flags = " ".join(f"--sources.{role.replace('_', '-')} NAME" for role in missing)
    remedy = f"add them, or name those that are there: {flags}" if there else "add them: README.md says how"
    found = f"{job.data}/embeddings/train has no {lacks}; it has {', '.join(sorted(there)) or 'nothing'}"
    return fail(found, remedy, ExitCode.DATA)


def _has_test(job: Job) -> bool:
    try:
        find_table(job.data, "test")
    except DataError:
        return False
    return True


def writable(job: Job) -> Finding:
    """Whether an object can be written below the output, read back, and removed."""
    url, content = storage.join(job.output, f".probe-{uuid.uuid4().hex}"), b"probe"
    try:
        storage.write(url, content)
        found = storage.read(url)
        storage.remove(url)
    except OSError as error:
        return fail(f"{job.output} cannot be written ({error})", "make room, or name another --output", ExitCode.CONFIG)
    if found != content:
        return fail(f"{url} was written as {content!r} and is read as {found!r}", "use another store", ExitCode.DATA)
    if storage.exists(url):
        return fail(f"{url} was removed and is still there", "allow this job to delete objects", ExitCode.CREDENTIALS)
    return ok(f"wrote, read and removed an object below {job.output}")


def conditions(job: Job) -> Finding:
    """Whether two attempts at one run are kept apart: the store refuses writes whose condition does not hold."""
    if not storage.honours_conditions(job.output):
        missing = "conditional writes"
    elif backend.is_lacking(job.output, "locks"):  # of a file system, whose conditions they are
        missing = "locks"
    else:
        return ok("the store refuses writes whose condition does not hold")
    to_do = "never run two jobs with one --run-id at a time, or use a store that has them"
    return warn(f"the store has no {missing}: nothing keeps two attempts at a run apart", to_do)


def settings(job: Job) -> Finding:
    """Whether what is set is allowed."""
    found = job.settings
    usual = asdict(type(found)())
    settings = {key: value for key, value in asdict(found).items() if key not in WHERE}
    changed = [text for key, value in settings.items() for text in _changed(key, usual[key], value)]
    return ok(f"{job.variant or 'settings of all variants'}: {', '.join(changed) or 'nothing but defaults'}")


def _changed(key: str, usual: Any, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for name in value for text in _changed(f"{key}.{name}", usual[name], value[name])]
    return [] if value == usual else [f"{key} {value}"]
