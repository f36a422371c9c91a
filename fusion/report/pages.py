"""Renders pages and model cards from `templates/`. All texts are escaped; only charts are embedded as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fusion import __version__
from fusion.compare.out_of_fold import Scored
from fusion.report import card, ensembles, groups, leaderboard, model_use, origin, prices, score, several
from fusion.report.blocks import Section, counted, listed, prose, shortened
from fusion.report.ensembles import GatheredEnsemble
from fusion.report.gather import Gathered, Validated
from fusion.report.leaderboard import Listed
from fusion.report.seal import sealed

if TYPE_CHECKING:
    from jinja2 import Environment

Values = dict[str, Any]  # names in a template to their values
MAX_BYTES = 2_000_000  # of a page, so that it opens at once and fits in a mail


@dataclass(frozen=True)
class Link:
    """An entry of the table of contents."""

    id: str
    title: str


@dataclass(frozen=True)
class Pages:
    """What is written about a run: its report, and its model card, which has a part of the same sections."""

    report: bytes
    card: bytes


def run_pages(found: Gathered) -> Pages:
    """The report and the model card of a run."""
    sections = [section for section in _sections(found) if section is not None]
    after_worst = [section.id for section in sections].index("data")
    links = [Link(section.id, section.title) for section in sections]
    links.insert(after_worst, Link("worst", "Worst rows"))
    values = {"run": found, "headline": score.headline(found), "notices": _notices(found)}
    of_report = {
        "title": f"Run {found.run.run_id}",
        "kind": f"Training run · {found.variant}" if found.variant else "Training run",
        "before": sections[:after_worst],
        "after": sections[after_worst:],
        "worst": model_use.worst(found),
        "links": links,
    }
    of_card = {
        "model": card.model(found),
        "dataset": shortened(str(found.settings.get("data", "")), 120),
        "inputs": origin.dimensions(found),
    }
    return _both(found, values | of_report, values | of_card, sections)


def ensemble_pages(found: GatheredEnsemble) -> Pages:
    """The report and the model card of an ensemble."""
    every = [
        ensembles.members(found),
        prices.predictions(found),
        groups.by_group(found),
        prices.coverage(found),
        ensembles.lineage(found),
        ensembles.reproduce(found),
    ]
    sections = [section for section in every if section is not None]
    values = {"run": found, "headline": ensembles.headline(found), "notices": found.notices}
    of_report = {
        "title": f"Ensemble {found.run.run_id}",
        "kind": "Ensemble",
        "before": sections,
        "after": [],
        "worst": None,
        "links": [Link(section.id, section.title) for section in sections],
    }
    of_card = {
        "model": f"an ensemble of {counted(len(found.record.members), 'run')}",
        "dataset": shortened(found.record.data, 120),
        "inputs": None,
    }
    return _both(found, values | of_report, values | of_card, sections)


def _both(found: Validated, of_report: Values, of_card: Values, sections: Sequence[Section]) -> Pages:
    run_id = found.run.run_id
    of_card = of_card | {
        "results": card.results(found),
        "load": card.loading(found),
        "sections": card.chosen(sections),
    }
    return Pages(_rendered("run.html", run_id, of_report), _rendered("model_card.md", run_id, of_card))


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


def _rendered(template: str, about: str, values: Values) -> bytes:
    page = _environment().get_template(template).render(version=__version__, **values)
    return sealed(page, about)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fusion.report", "templates")
    found = Environment(loader=loader, autoescape=_is_html, trim_blocks=True, lstrip_blocks=True,
                        undefined=StrictUndefined)  # fmt: skip
    found.filters |= {"prose": prose} | card.FILTERS
    return found


def _is_html(template: str | None) -> bool:
    return template is None or template.endswith(".html")
