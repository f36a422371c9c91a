"""Checks of the pages and model cards that `fusion.report` writes: their last line has the sha256 of all above it."""

from __future__ import annotations

from fusion import storage
from fusion.records.output import OutputFolder
from fusion.records.run import CARD, REPORT, RunFolder
from fusion.report.seal import REPORTS, seal_of
from fusion.verify.findings import Report, read


def check_run_pages(report: Report, run: RunFolder, about: str | None, evaluation: bytes | None = None) -> None:
    """Checks the report and the model card of a run or an ensemble; the arguments are those of `check_page`."""
    for page in (CARD, REPORT):
        check_page(report, run.at(page), about, evaluation)


def check_page(report: Report, url: str, about: str | None, evaluation: bytes | None = None) -> None:
    """Checks a page, if it exists: earlier versions wrote none, and a job may have been killed before it.

    Args:
        about: what the page must be about: the id of its run, or the name of the page; None if unknown.
        evaluation: the manifest of the evaluation that the report of a run should show, if there is one.
    """
    content, name = read(url), storage.base(url)
    if content is None:
        return
    seal = seal_of(content)
    if seal is None:
        report.bad(name, "a last line with its sha256", f"{len(content)} bytes without it")
    elif not seal.is_whole:
        report.bad(name, "what was written", "a page that does not match its own sha256")
    elif about is not None and seal.about != about:
        report.bad(f"{name}: run", about, seal.about)
    elif evaluation is not None and storage.sha256(evaluation).encode() not in content:
        report.note(f"{name}: does not show the evaluation in metrics/; `python -m fusion.report` writes it again")
    else:
        report.ok(name)


def check_pages(report: Report, output: OutputFolder) -> None:
    """Checks the pages about several runs, in `reports/` of an output."""
    for page in output.ls(REPORTS):
        with report.within(REPORTS):
            check_page(report, page.url, page.name)
