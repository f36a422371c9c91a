"""Checks of the store: that it answers, that this job may read and write there and how long its credentials last.

Also checked are what lies there (the data) and what the store supports (conditional writes).
"""

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
from fusion.jobs.checks.check import CheckResult, PlannedJob, fail, ok, warn
from fusion.storage import backend

MAX_SKEW = timedelta(minutes=15)  # S3 refuses requests that were signed by a clock that is off by more than this
NOTABLE_SKEW = timedelta(seconds=30)  # a clock that is set by NTP is off by less than a second: this one is not
SOON = timedelta(minutes=15)  # credentials that expire earlier will expire in the middle of most jobs
SHOWN_ELSEWHERE = ("data", "output")  # settings that other checks print


def credentials(job: PlannedJob) -> CheckResult | None:
    """Checks that there are credentials for S3, and when they expire; does not apply without an S3 bucket."""
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
        token = found.get_frozen_credentials().token  # which refreshes them where botocore can
    except (BotoCoreError, RuntimeError, OSError, ValueError) as error:  # RuntimeError: expired even after a refresh
        return _no_credentials(f"{type(error).__name__}: {error}".splitlines()[0])
    return _describe_lifetime(found.method, getattr(found, "_expiry_time", None), bool(token))


def _no_credentials(cause: str) -> CheckResult:
    to_do = "sign in again, or give the job a role (IRSA, workload identity), a profile or AWS_ACCESS_KEY_ID"
    return fail(f"no usable credentials: {cause}", to_do, ExitCode.CREDENTIALS)


def _describe_lifetime(method: str, expiry: datetime | None, has_token: bool) -> CheckResult:
    """The result for credentials that exist.

    Args:
        method: where botocore found them, such as env, shared-credentials-file, assume-role.
        has_token: whether they are temporary, which a session token shows.
    """
    if expiry is None and has_token:
        to_do = "set AWS_CREDENTIAL_EXPIRATION beside AWS_SESSION_TOKEN, or give the job a role that renews itself"
        return warn(f"from {method}: a session token that does not say when it expires", to_do)
    if expiry is None:
        return ok(f"from {method}: they do not expire")
    left = expiry - datetime.now(UTC)
    renewed = method not in ("env", "explicit")  # botocore renews what it got from any other provider
    found = f"from {method}: valid for {_minutes(left)}"
    if left < SOON and not renewed:
        to_do = "sign in again before a long job: it ends with 77 when they expire, and continues when started again"
        return warn(found, to_do)
    return ok(f"{found}, then renewed" if renewed else found)


def _minutes(span: timedelta) -> str:
    minutes = int(span.total_seconds() // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def store(job: PlannedJob) -> CheckResult:
    """Checks that the store of the output answers, and lets this job list objects."""
    started = time.monotonic()
    storage.ls(job.output)
    return ok(f"{job.output} answers in {1000 * (time.monotonic() - started):.0f} ms")


def clock(job: PlannedJob) -> CheckResult | None:
    """Compares this machine's clock with the store's; does not apply without an S3 bucket."""
    buckets = _buckets(job)
    if not buckets:
        return None
    skew = storage.retrying(f"s3://{buckets[0]}", lambda: _skew(buckets[0]))
    if skew is None:
        return warn("the store sends no Date header", "check the clock of this machine yourself: `date -u`")
    ahead = f"{abs(skew).total_seconds():.0f} s {'ahead of' if skew > timedelta() else 'behind'} the store's"
    if abs(skew) > MAX_SKEW:
        return fail(
            f"this clock is {ahead}, and S3 refuses requests above 900 s", "set the clock (NTP)", ExitCode.CONFIG
        )
    if abs(skew) > NOTABLE_SKEW:
        return warn(f"this clock is {ahead}", "set the clock (NTP); S3 refuses requests above 900 s")
    return ok(f"this clock is {ahead}")


def _skew(bucket: str) -> timedelta | None:
    """This machine's clock minus the Date header of the store; None without that header.

    The request is unsigned, so that neither missing credentials nor a wrong clock matter: an error has a Date as well.
    """
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
    here = before + (datetime.now(UTC) - before) / 2  # the store wrote its Date about half-way through the request
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    return here - parsedate_to_datetime(headers["date"]) if "date" in headers else None


def _buckets(job: PlannedJob) -> list[str]:
    """Names of the S3 buckets of output and data."""
    urls = [re.fullmatch(r"s3a?://([^/]+).*", url) for url in (job.output, job.data)]
    return [found[1] for found in urls if found]


def data(job: PlannedJob) -> CheckResult:
    """Checks that the tables and the embeddings exist."""
    bindings = job.settings.bindings() if job.variant else {}
    find_table(job.data, "train")
    train, test = source_names(job.data, "train"), source_names(job.data, "test")
    missing = {role: name for role, name in bindings.items() if name not in train}
    if missing or not train:
        return _without_sources(job, missing, train)
    find_sources(job.data, "train", bindings)  # raises DataError where a source exists both as a file and as a folder
    needed = set(bindings.values()) or train
    lacking = ([] if _has_test(job) else ["test.csv"]) + sorted(needed - test)
    if lacking:
        return warn(f"train is there, test lacks {', '.join(lacking)}", "add what is missing before predict_test")
    return ok(f"{job.data} has train, test, and for both {', '.join(sorted(needed))}")


def _without_sources(job: PlannedJob, missing: dict[str, str], there: set[str]) -> CheckResult:
    """The failure for sources that do not exist.

    Args:
        missing: names of sources by role.
        there: names of the sources that exist.
    """
    lacks = " and no ".join(sorted(missing.values())) or "sources"
    flags = " ".join(f"--sources.{role.replace('_', '-')} NAME" for role in missing)
    remedy = f"add them, or name those that are there: {flags}" if there else "add them; see README.md"
    found = f"{job.data}/embeddings/train has no {lacks}; it has {', '.join(sorted(there)) or 'nothing'}"
    return fail(found, remedy, ExitCode.DATA)


def _has_test(job: PlannedJob) -> bool:
    try:
        find_table(job.data, "test")
    except DataError:
        return False
    return True


def writable(job: PlannedJob) -> CheckResult:
    """Checks that an object can be written below the output, read back, and removed."""
    url, content = storage.join(job.output, f".probe-{uuid.uuid4().hex}"), b"probe"
    try:
        storage.write(url, content)
        found = storage.read(url)
        storage.remove(url)
    except OSError as error:
        to_do = "free some space, or give another --output"
        return fail(f"{job.output} cannot be written ({error})", to_do, ExitCode.CONFIG)
    if found != content:
        return fail(f"{url} was written as {content!r} and read as {found!r}", "use another store", ExitCode.DATA)
    if storage.exists(url):
        return fail(f"{url} still exists after its removal", "allow this job to delete objects", ExitCode.CREDENTIALS)
    return ok(f"wrote, read and removed an object below {job.output}")


def conditions(job: PlannedJob) -> CheckResult:
    """Checks that the store supports conditional writes, which keep two jobs from writing to one run at a time."""
    if not storage.honours_conditions(job.output):
        missing = "conditional writes"
    elif backend.is_lacking(job.output, "locks"):  # file systems: conditional writes are made of file locks there
        missing = "locks"
    else:
        return ok("the store supports conditional writes")
    to_do = "never run two jobs with the same --run-id at the same time, or use a store that supports them"
    return warn(f"the store has no {missing}: two jobs could write to one run at the same time", to_do)


def settings(job: PlannedJob) -> CheckResult:
    """Checks that the settings are valid, and reports those that differ from the defaults."""
    found = job.settings
    defaults = asdict(type(found)())
    settings = {key: value for key, value in asdict(found).items() if key not in SHOWN_ELSEWHERE}
    changed = [text for key, value in settings.items() for text in _changed(key, defaults[key], value)]
    return ok(f"{job.variant or 'settings of all variants'}: {', '.join(changed) or 'nothing but defaults'}")


def _changed(key: str, default: Any, value: Any) -> list[str]:
    """`key value` for each value that differs from its default; keys of nested settings are joined by dots."""
    if isinstance(value, dict):
        return [text for name in value for text in _changed(f"{key}.{name}", default[name], value[name])]
    return [] if value == default else [f"{key} {value}"]
