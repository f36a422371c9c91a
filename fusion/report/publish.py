"""Writes the report of a run into its folder."""

from __future__ import annotations

import time

from fusion import log, storage
from fusion.records.run import RunFolder
from fusion.report.seal import REPORT


def write_report(run: RunFolder) -> str:
    """Writes `report.html` of a run, and returns its URL. The same run gives the same bytes.

    Raises:
        DataError: as for `gather`.
    """
    from fusion.report.gather import gather
    from fusion.report.pages import run_page

    started, url = time.monotonic(), run.at(REPORT)
    storage.write(url, run_page(gather(run)))
    log.info(event="reported", report=url, seconds=time.monotonic() - started)
    return url


def try_report(run: RunFolder) -> None:
    """As `write_report`, at the end of a job that is done: a failure is a warning, and the job's outcome stands."""
    try:
        write_report(run)
    except Exception as error:  # also a bug in a chart, or a library that is missing, must not fail the job
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        hint = f"`python -m fusion.report --run-dir {run}` writes it"
        log.warning(event="report_not_written", reason=reason, hint=hint)


def report_if_missing(run: RunFolder) -> None:
    """Writes the report of a finished run whose training was killed before it."""
    try:
        is_there = storage.exists(run.at(REPORT))
    except Exception as error:
        log.warning(event="report_not_written", reason=str(error))
        return
    if not is_there:
        try_report(run)
