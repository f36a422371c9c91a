"""The sections of the page over all runs of an output: a leaderboard for each set of validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup, escape

from fusion import log, storage
from fusion.compare.out_of_fold import Scored, same_rows, scored
from fusion.compare.standard_errors import Estimate
from fusion.errors import CredentialsError, ExitCode, FusionError, UnreachableError
from fusion.records import schemas
from fusion.records.output import OutputFolder
from fusion.records.run import EXIT, REPORT, RunFolder
from fusion.records.schemas import AttemptEnd
from fusion.report import charts
from fusion.report.blocks import ABSENT, Chart, Section, Table, between, count, counted, number, percent, shortened
from fusion.report.charts import Dot
from fusion.report.gather import with_smape

MOST_DOTS = 20  # runs in the chart of a leaderboard; the table has all
FILES = ("checkpoints/*/validation.parquet", "split.parquet", "run.json", "attempts/*")


@dataclass(frozen=True)
class Listed:
    """A run or ensemble of the output.

    Attributes:
        scored: None if it has no score yet.
        smape: None likewise.
        link: path of its report from `reports/`; empty if it has none.
    """

    run: RunFolder
    variant: str
    state: str
    started: str
    data_sha256: str
    scored: Scored | None
    smape: Estimate | None
    parameters: int | None
    minutes: float | None
    link: str


def listed_runs(output: OutputFolder) -> list[Listed]:
    """All runs and ensembles of the output. A damaged run is listed without a score, with a warning in the log."""
    return [_listed(run) for run in output.runs() if run.exists()]


def _listed(run: RunFolder) -> Listed:
    facts = run.facts_if_whole()
    one = _scored(run)
    smape = None if one is None else with_smape(one)[1]
    variant = one.members[0].variant if one else facts.variant if facts else ABSENT
    has_report = storage.exists(run.at(REPORT))
    return Listed(
        run,
        variant,
        _state(run, one),
        facts.started if facts else "",
        facts.data_sha256 if facts else "",
        one,
        smape,
        run.n_parameters(),
        run.minutes(),
        f"../runs/{quote(run.run_id)}/{REPORT}" if has_report else "",
    )


def _scored(run: RunFolder) -> Scored | None:
    try:
        return scored(run)
    except (UnreachableError, CredentialsError):
        raise
    except FusionError as error:
        log.warning(event="not_scored", run=run, reason=error.message)
        return None


def _state(run: RunFolder, one: Scored | None) -> str:
    if one is not None and one.members[0].finished:
        return "finished"
    attempts = [folder for folder in run.ls("attempts") if folder.name.isdigit()]
    if not attempts:
        return "not begun"
    newest = max(attempts, key=lambda folder: int(folder.name))
    end = schemas.read_if_whole(AttemptEnd, newest.at(EXIT), "attempt_damaged")
    if end is None:
        return "training, or killed"
    if end.code == ExitCode.STOPPED:
        return f"stopped at step {end.step}"
    return f"failed with {end.code}" if end.code else "finished"


def sections(runs: Sequence[Listed]) -> list[Section]:
    """A leaderboard per set of validation rows, the largest first, and a list of the runs without a score."""
    boards = list[list[Listed]]()
    for one in runs:
        if one.scored is None:
            continue
        same = [board for board in boards if same_rows(board[0].scored or one.scored, one.scored)]
        if same:
            same[0].append(one)
        else:
            boards.append([one])
    boards.sort(key=lambda board: (-len(board), min(one.started or "~" for one in board)))
    found = [_board(number_, len(boards), board) for number_, board in enumerate(boards, 1)]
    others = [one for one in runs if one.scored is None]
    return [*found, *([_others(others)] if others else [])]


def _board(number_: int, n_boards: int, board: Sequence[Listed]) -> Section:
    ranked = sorted(board, key=lambda one: (_mean(one), one.run.run_id))
    scored_ = ranked[0].scored
    rows = scored_.rows if scored_ else None
    n_rows = 0 if rows is None else len(rows)
    lead = [
        f"{counted(len(ranked), 'run')} validated on these {counted(n_rows, 'row')}. "
        f"{shortened(ranked[0].run.run_id, 60)} has the lowest SMAPE, {percent(_mean(ranked[0]), 2)}.",
        "Overlapping intervals do not mean that two runs are equal: paired differences have smaller errors. "
        "`python -m fusion.report --compare RUN RUN` computes them.",
    ]
    lead = lead if len(ranked) > 1 else [f"One run validated on these {counted(n_rows, 'row')}."]
    dots = [Dot(one.run.run_id, one.smape.mean, one.smape.low, one.smape.high, percent(one.smape.mean, 2))
            for one in ranked[:MOST_DOTS] if one.smape]  # fmt: skip
    table = _table(f"Leaderboard {number_}" if n_boards > 1 else "Leaderboard", ranked)
    alt = "SMAPE: " + "; ".join(f"{dot.label} {dot.note}" for dot in dots)
    chart = Chart(
        "SMAPE", "%, with 95% intervals", charts.dots(f"board-{number_}", alt, dots, "SMAPE, %", from_zero=False), table
    )
    title = "Leaderboard" if n_boards == 1 else f"Validation rows {number_} of {n_boards}"
    return Section(f"board-{number_}", title, lead, FILES, [chart], [table])


def _mean(one: Listed) -> float:
    return one.smape.mean if one.smape else float("inf")


def _table(caption: str, ranked: Sequence[Listed]) -> Table:
    headings = ("run", "SMAPE, %", "95% interval", "variant", "state", "parameters", "minutes", "data", "started")
    rows = [
        (
            _name(one),
            number(_mean(one)),
            between(one.smape.low, one.smape.high) if one.smape else ABSENT,
            shortened(one.variant, 40),
            one.state,
            ABSENT if one.parameters is None else count(one.parameters),
            number(one.minutes, 1),
            one.data_sha256[:12] or ABSENT,
            _day(one.started),
        )
        for one in ranked
    ]
    return Table(caption, headings, rows, frozenset({1, 2, 5, 6}), frozenset({7}))


def _day(started: str) -> str:
    return started.replace("T", " ").removesuffix("Z")[:16] or ABSENT


def _name(one: Listed) -> str | Markup:
    name = shortened(one.run.run_id, 60)
    return Markup('<a href="{}">{}</a>').format(one.link, escape(name)) if one.link else name


def _others(others: Sequence[Listed]) -> Section:
    rows = [(_name(one), shortened(one.variant, 40), one.state, _day(one.started)) for one in others]
    table = Table("Runs without a score", ("run", "variant", "state", "started"), rows)
    lead = ["These runs have no validated checkpoint yet, or their files are damaged."]
    return Section("others", "Without a score", lead, FILES[2:], tables=[table])
