"""Renders pages from the templates in `templates/`. All texts are escaped; only charts are embedded as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fusion import __version__
from fusion.compare.out_of_fold import Scored
from fusion.report import groups, leaderboard, model_use, origin, prices, score, several
from fusion.report.blocks import Section, counted, listed, prose, shortened
from fusion.report.gather import Gathered
from fusion.report.leaderboard import Listed
from fusion.report.seal import sealed

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_BYTES = 2_000_000  # of a page, so that it opens at once and fits in a mail


@dataclass(frozen=True)
class Link:
    """An entry of the table of contents."""

    id: str
    title: str


def run_page(found: Gathered) -> bytes:
    """The report of a run."""
    sections = [section for section in _sections(found) if section is not None]
    worst = model_use.worst(found)
    after_worst = [section.id for section in sections].index("data")
    links = [Link(section.id, section.title) for section in sections]
    links.insert(after_worst, Link("worst", "Worst rows"))
    values = {
        "title": f"Run {found.run.run_id}",
        "run": found,
        "headline": score.headline(found),
        "before": sections[:after_worst],
        "after": sections[after_worst:],
        "worst": worst,
        "links": links,
        "notices": _notices(found),
    }
    return _rendered("run.html", found.run.run_id, values)


def several_page(runs: Sequence[Scored], name: str) -> bytes:
    """A page that compares runs; `name` is that of its file."""
    one = several.several(runs)
    values = {
        "title": several.title(one),
        "kind": "Comparison of runs",
        "output": "",
        "sections": several.sections(one),
    }
    return _rendered("several.html", name, values)


def index_page(runs: Sequence[Listed], output: str, name: str) -> bytes:
    """A page over all runs of an output; `name` is that of its file."""
    title = f"{counted(len(runs), 'run')} in {shortened(output, 120)}"
    values = {"title": title, "kind": "All runs", "output": output, "sections": leaderboard.sections(runs)}
    return _rendered("several.html", name, values)


def _sections(found: Gathered) -> list[Section | None]:
    return [
        score.learning(found),
        prices.predictions(found),
        groups.by_group(found),
        prices.coverage(found),
        model_use.sources(found),
        model_use.use(found),
        origin.data(found),
        origin.settings(found),
        origin.lineage(found),
        origin.reproduce(found),
    ]


def _notices(found: Gathered) -> list[str]:
    notices = list(found.notices)
    better = [name for name, one, _ in score.references(found) if one.mean <= found.smape.mean]
    if better:
        notices.append(f"This model is not better than {listed(better)}. More epochs or other sources may help.")
    if found.evaluated is not None and found.evaluated.as_trained is False:
        smape = float(found.evaluated.summary["smape"])
        notices.append(
            f"The evaluation in metrics/ is of other prices or embeddings than in training: SMAPE {smape:.2f}%. "
            "The figures on this page are of the training's own validation rows, unless their source is in metrics/."
        )
    return notices


def _rendered(template: str, about: str, values: dict[str, Any]) -> bytes:
    page = _environment().get_template(template).render(version=__version__, **values)
    return sealed(page, about)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fusion.report", "templates")
    found = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    found.filters["prose"] = prose
    return found
