"""Writes the report and model card of a run into its folder, and pages about several runs into `reports/`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from fusion import log, storage
from fusion.config import digest
from fusion.records.manifests import ENSEMBLE
from fusion.records.output import OutputFolder
from fusion.records.run import CARD, RunFolder
from fusion.report.seal import REPORTS

INDEX: Final = "index.html"


def write_report(run: RunFolder, to: str | None = None) -> str:
    """Writes the model card and the report of a run or an ensemble into its folder, and returns the URL of the report.

    The same run gives the same bytes. The report comes last, so that a run that has one also has the card.

    Args:
        to: where to write the report instead; then no card is written.

    Raises:
        DataError: as for `gather` and `gather_ensemble`.
    """
    from fusion.report.ensembles import gather_ensemble
    from fusion.report.gather import gather
    from fusion.report.pages import ensemble_pages, run_pages

    started, url = time.monotonic(), to or run.report_url
    is_ensemble = storage.exists(run.at(ENSEMBLE))
    pages = ensemble_pages(gather_ensemble(run)) if is_ensemble else run_pages(gather(run))
    if to is None:
        storage.write(run.at(CARD), pages.card)
    storage.write(url, pages.report)
    log.info(event="reported", report=url, seconds=time.monotonic() - started)
    return url


def write_comparison(runs: Sequence[str], output: str, to: str | None) -> str:
    """Writes a page that compares runs, and returns its URL.

    Args:
        runs: ids of runs under `output`, or URLs of their folders.
        to: where to write it; None for `reports/` of the output, under a name made of the runs.

    Raises:
        UsageError, DataError: as for `scored_runs`.
    """
    from fusion.compare.out_of_fold import scored_runs
    from fusion.report.pages import several_page

    name = f"compare-{digest(sorted(runs))[:8]}.html"
    return _written(several_page(scored_runs(runs, output), name), to or storage.join(output, REPORTS, name))


def write_index(output: str, to: str | None) -> str:
    """Writes a page over all runs of an output, by default `reports/index.html`, and returns its URL.

    A page elsewhere has no links to the reports of the runs.
    """
    from fusion.report.leaderboard import listed_runs
    from fusion.report.pages import index_page

    found = listed_runs(OutputFolder(output))
    if to is not None:
        found = [replace(one, link="") for one in found]
    return _written(index_page(found, output, INDEX), to or storage.join(output, REPORTS, INDEX))


def _written(page: bytes, url: str) -> str:
    storage.write(url, page)
    log.info(event="reported", report=url)
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
        is_there = storage.exists(run.report_url)
    except Exception as error:
        log.warning(event="report_not_written", reason=" ".join(str(error).split()))
        return
    if not is_there:
        try_report(run)
