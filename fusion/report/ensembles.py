"""The report of an ensemble: its score beside those of its members, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.compare.out_of_fold import Scored, scored, stacked
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.errors import DataError
from fusion.metrics import row_smape
from fusion.records import schemas
from fusion.records.manifests import ENSEMBLE, INTERVALS, VALIDATION
from fusion.records.output import OutputFolder
from fusion.records.run import FACTS, RunFolder
from fusion.records.schemas import EnsembleMember, EnsembleRecord, Intervals
from fusion.report.blocks import (
    ABSENT,
    Command,
    Section,
    Table,
    between,
    count,
    counted,
    number,
    percent,
    shortened,
)
from fusion.report.gather import Validated, absolute, coverage, with_smape
from fusion.report.model_use import command, where_of
from fusion.report.origin import DIGESTS, again, check, report_again
from fusion.report.score import Headline, head

MEMBERS = "../*/checkpoints/*/validation.parquet"  # the predictions of the members


@dataclass(frozen=True)
class Recipe:
    """A member, or the fold runs of one recipe, which share its weight.

    Attributes:
        smape: of this recipe alone on the rows of the ensemble, in %.
        behind: SMAPE of the recipe minus that of the ensemble, paired by rows.
    """

    name: str
    n_runs: int
    variant: str
    weight: float
    smape: Estimate
    behind: Estimate


@dataclass(frozen=True, kw_only=True)
class GatheredEnsemble(Validated):
    """All that the report of an ensemble shows.

    Attributes:
        recipes: by falling weight; empty if a member is not there or has changed, of which there is a notice.
    """

    record: EnsembleRecord
    recipes: list[Recipe]


def gather_ensemble(run: RunFolder) -> GatheredEnsemble:
    """Reads an ensemble, and the predictions of its members.

    Raises:
        DataError: the ensemble is not complete, or a file of it is damaged.
    """
    run, notices = absolute(run), list[str]()
    one, record = scored(run), run.ensemble()
    rows, smape = with_smape(one)
    content = run.ensemble_file(INTERVALS)
    limits = None if content is None else schemas.parse(Intervals, content, run.at(INTERVALS))
    return GatheredEnsemble(
        run=run,
        facts=run.facts_if_whole(),
        rows=rows,
        rows_files=[VALIDATION],
        smape=smape,
        intervals=limits,
        intervals_file=INTERVALS,
        coverage=coverage(rows, limits),
        record=record,
        recipes=_recipes(run, record, Scored(one.members, rows), notices),
        notices=notices,
    )


def _recipes(run: RunFolder, record: EnsembleRecord, whole: Scored, notices: list[str]) -> list[Recipe]:
    try:
        found = stacked([_member(run, one) for one in record.members])
        return sorted((_recipe(one, record, whole) for one in found), key=lambda one: (-one.weight, one.name))
    except DataError as error:
        notices.append(f"The scores of the members are not shown: {error.message}.")
        return []


def _member(run: RunFolder, member: EnsembleMember) -> Scored:
    """Raises DataError if the member's run is not there, or has another model now."""
    folder = RunFolder(OutputFolder(run.output).at(member.run)) if run.output else None
    if folder is None or not folder.exists():
        raise DataError(f"{member.run} is not beside the ensemble", "pull it too")
    found = scored(folder)
    if found.members[0].model_sha256 != member.model_sha256:
        raise DataError(f"{member.run} now has another model", "restore that run")
    return found


def _recipe(one: Scored, record: EnsembleRecord, whole: Scored) -> Recipe:
    """Raises DataError if a row of the ensemble is not among those that the recipe validated on."""
    runs = {f"runs/{member.run_id}" for member in one.members}
    predicted = one.rows["predicted"].reindex(whole.rows.index)
    if predicted.isna().any():
        raise DataError(f"{one.name} did not validate on all rows of the ensemble", "restore that run")
    smape, groups = row_smape(whole.rows["price"], predicted), whole.rows["group"].to_numpy()
    return Recipe(
        one.name,
        len(one.members),
        one.members[0].variant,
        sum(member.weight for member in record.members if member.run in runs),
        clustered_mean(smape, groups),
        clustered_mean(smape - whole.rows["smape"].to_numpy(), groups),
    )


def headline(found: GatheredEnsemble) -> Headline:
    """The head of the report: the SMAPE beside those of the members alone."""
    ranked = sorted(found.recipes, key=lambda one: one.smape.mean)
    others = [(shortened(one.name, 60), one.smape, MEMBERS) for one in ranked]
    recipes = f"of {counted(len(ranked), 'recipe')}" if ranked else "that it averages"
    runs = ("runs", count(len(found.record.members)), recipes)
    return head(found, "this ensemble", "its members alone", others, _gains(found, ranked), [runs])


def _gains(found: GatheredEnsemble, ranked: Sequence[Recipe]) -> list[str]:
    """Whether the ensemble is better than its best member, and than equal weights."""
    record, gains = found.record, list[str]()
    if len(ranked) > 1:
        best = ranked[0]
        gains.append(f"{_compared(best.behind.mean)} that of its best member, {shortened(best.name, 60)} "
                     f"({percent(best.smape.mean)}){_surely(best.behind)}.")  # fmt: skip
    if record.fitted:
        gains.append(f"{_compared(record.equal_smape - record.smape)} that of equal weights "
                     f"({percent(record.equal_smape)}).")  # fmt: skip
    return gains


def _compared(gain: float) -> str:
    return f"The SMAPE is {number(abs(gain))} points {'lower' if gain >= 0 else 'higher'} than"


def _surely(gain: Estimate) -> str:
    return "" if gain.low is None else f"; the 95% interval of the difference is {between(gain.low, gain.high, 2)}"


def members(found: GatheredEnsemble) -> Section:
    """The runs of the ensemble, with their weights and scores."""
    record = found.record
    lead = ["The log of its price is the weighted mean of the log prices of these runs."]
    if record.fitted:
        lead.append(
            "The weights were fitted to the validation rows. Each of these rows is scored with weights that were "
            "fitted without it and its near-duplicates."
        )
    elif len(found.recipes) != 1:
        lead.append(
            "Weights that were fitted to the validation rows would not have been better by more than chance, so all "
            "recipes have the same weight."
        )
    tables = [_recipes_table(found.recipes), _runs_table(record)] if found.recipes else [_runs_table(record)]
    if any(one.n_runs > 1 for one in found.recipes):
        lead.append(
            "The fold runs of a recipe share its weight. A validation row is predicted by the one that held it out, "
            "and a new product by all of them. So the SMAPE of new products should be a little lower."
        )
    return Section("members", "Members", lead, [ENSEMBLE, MEMBERS], tables=tables)


def _recipes_table(recipes: Sequence[Recipe]) -> Table:
    rows = [
        (shortened(one.name, 80), one.variant, f"{one.weight:.4f}", number(one.smape.mean),
         between(one.smape.low, one.smape.high), number(one.behind.mean), between(one.behind.low, one.behind.high, 2))
        for one in recipes
    ]  # fmt: skip
    headings = ("run", "variant", "weight", "SMAPE, %", "95% interval", "ensemble is lower by", "95% interval")
    return Table("Recipes and their weights", headings, rows, frozenset(range(2, 7)))


def _runs_table(record: EnsembleRecord) -> Table:
    rows = [(one.run, one.checkpoint, one.variant, f"{one.weight:.4f}", one.model_sha256) for one in record.members]
    headings = ("run", "checkpoint", "variant", "weight", "sha256 of model.safetensors")
    return Table("Runs", headings, rows, frozenset({3}), frozenset({0, 1, 4}))


def lineage(found: GatheredEnsemble) -> Section:
    """What the ensemble is made of."""
    record, facts = found.record, found.facts
    rows = [
        ("ensemble", record.run_id, ENSEMBLE),
        ("members and weights", record.model_sha256(), "ensemble.json, sha256 of its members"),
        ("validation rows", record.rows_sha256, ENSEMBLE),
        ("data of the first member", shortened(record.data, 120), ENSEMBLE),
        ("git revision", facts.revision or ABSENT if facts else ABSENT, FACTS),
        ("made", facts.started or ABSENT if facts else ABSENT, FACTS),
    ]
    table = Table("What the ensemble is made of", ("what", "value", "from"), rows, code=frozenset({1, 2}))
    return Section("lineage", "Lineage", [DIGESTS], [ENSEMBLE, FACTS], tables=[table])


def reproduce(found: GatheredEnsemble) -> Section:
    """Commands to check, repeat and use the ensemble."""
    record = found.record
    runs = [one.run.removeprefix("runs/") for one in record.members]
    commands = [check(found)]
    if found.run.output and found.run.is_in_runs:
        where = ["--output", found.run.output, "--run-id", again(found)]
        make = command("python", "-m", "fusion.ensemble", *runs, *where)
        predict = command("python", "-m", "fusion.ensemble.predict_test", *where_of(found))
        commands += [Command("Make it again, under another name", make), Command("Predict test.csv", predict)]
    commands.append(report_again(found))
    lead = ["The same members and rows give the same weights. Runs of weight 0 were left out of it."]
    return Section("reproduce", "Reproduce", lead, [ENSEMBLE], commands=commands)
