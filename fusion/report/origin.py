"""The sections about where a run comes from: its data, settings and lineage, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusion.command.flags import Setting, settings_of
from fusion.records.manifests import SPLIT
from fusion.records.run import CONFIG, FACTS
from fusion.report.blocks import ABSENT, Command, Section, Table, count, counted, dollars, percent, shortened
from fusion.report.gather import Attempt, Gathered, Validated
from fusion.report.model_use import command, where_of

# Settings that say where a run is, not what it computes.
WHERE = ("output", "run_id")
DIGESTS = "Digests are sha256. `python -m fusion.verify` recomputes them."
COMPUTED = "computed from train.csv"
# Events of the log that say something about the data which the other tables do not, and the words for them.
EVENTS = {
    "ids_not_in_table": "ids of a source that are in no row of train.csv, ignored",
    "vectors_of_zeros": "vectors of zeros, counted as missing",
    "not_finite": "vectors with NaN or infinity, counted as missing",
    "rows_without_any_embedding": "rows without any embedding",
    "dropped_bad_prices": "rows dropped because their price is missing or not positive",
    "placeholder": "rows with a text so frequent that it does not count as a near-duplicate",
    "few_rows": "few rows",
    "one_price": "every row has the same price",
    "uneven_split": "the split is uneven",
}


def data(found: Gathered) -> Section:
    """Rows, near-duplicates, the split, and what is missing of each source."""
    split = found.split
    sizes = np.bincount(split["group"].to_numpy(np.int64)) if len(split) else np.zeros(1, int)
    in_groups = int(sizes[sizes > 1].sum())
    lead = [
        f"{count(len(split))} rows with prices, from {shortened(str(found.settings.get('data', '')), 120)}. "
        f"{count(in_groups)} of them ({percent(100 * in_groups / max(len(split), 1))}) have near-duplicates, which are "
        "always on the same side of the split: "
        f"{counted(int((sizes > 0).sum()), 'group')}, the largest of {counted(int(sizes.max()), 'row')}.",
        _split_in_words(found),
    ]
    quartiles = found.facts.price_quartiles if found.facts else None
    if quartiles:
        low, median, high = map(dollars, quartiles)
        lead.append(f"The median price is {median}; half of the prices are from {low} to {high}.")
    loaded = [event for event in found.events if event["event"] == "loaded"]
    files = [SPLIT, FACTS, CONFIG, *dict.fromkeys(event["file"] for event in loaded)]
    tables = [_sides(found), _sources(loaded) if loaded else dimensions(found), *_remarks(found)]
    return Section("data", "Data", lead, files, tables=tables)


def _split_in_words(found: Gathered) -> str:
    settings = found.settings
    if "fold" in found.split:
        return f"All {found.split['fold'].nunique()} folds were trained, so that every row validates once."
    if settings.get("validate_after"):
        column, day = settings["validate_after"]
        return f"Rows whose {shortened(str(column), 40)} is {shortened(str(day), 40)} or later validate."
    if settings.get("folds"):
        return f"Fold {settings.get('fold')} of {settings['folds']} validates, the others train."
    return "The split is random by groups, stratified by price."


def _sides(found: Gathered) -> Table:
    split, total = found.split, max(len(found.split), 1)
    if "fold" in split:
        parts = [(f"fold {fold}", split["fold"] == fold) for fold in sorted(split["fold"].unique())]
    else:
        names = {"train": "training", "validation": "validation", "dropped": "dropped"}
        parts = [(name, split["side"] == side) for side, name in names.items() if (split["side"] == side).any()]
    rows = [
        (name, count(len(part)), percent(100 * len(part) / total), count(groups.nunique()))
        for name, part, groups in ((name, split["side"][chosen], split["group"][chosen]) for name, chosen in parts)
    ]
    return Table("The split", ("part", "rows", "share", "groups"), rows, frozenset({1, 2, 3}))


def dimensions(found: Gathered) -> Table:
    """The sources without the number of missing vectors, which a log lacks after a kill or with a --cache."""
    dims = found.facts.dims if found.facts else {}
    sources = found.config.bindings() if found.config else {}
    rows = [(role, shortened(sources.get(role, COMPUTED), 60), str(dim)) for role, dim in dims.items()]
    return Table("The sources", ("role", "source", "dimensions"), rows, frozenset({2}))


def _sources(loaded: list[dict[str, str]]) -> Table:
    rows = []
    for event in loaded:
        n_missing, n_rows = int(event.get("missing", 0)), int(event.get("rows", 0))
        share = 100 * n_missing / max(n_missing + n_rows, 1)
        numbers = (event.get("dim", ABSENT), count(n_rows), count(n_missing), percent(share))
        rows.append((event.get("role", ABSENT), shortened(event.get("source", ABSENT), 60), *numbers))
    headings = ("role", "source", "dimensions", "vectors", "missing", "share missing")
    return Table("The sources", headings, rows, frozenset({2, 3, 4, 5}))


def _remarks(found: Gathered) -> list[Table]:
    rows = [
        (EVENTS[event["event"]], event.get("role", ""), event.get("rows", ""))
        for event in found.events
        if event["event"] in EVENTS
    ]
    if not rows:
        return []
    return [Table("What the training noted about the data", ("what", "role", "rows"), rows, frozenset({2}))]


def settings(found: Gathered) -> Section:
    """The settings: first those that differ from their defaults, then the others."""
    if found.config is None:
        rows = [(key, _value(value)) for key, value in found.settings.items()]
        table = Table("All settings", ("setting", "value"), rows, code=frozenset({0, 1}))
        return Section("settings", "Settings", ["As written by the training."], [CONFIG], tables=[table])
    every = settings_of(found.config)
    differ = [one for one in every if not one.is_default and one.key not in (*WHERE, "data")]
    others = [one for one in every if one not in differ]
    recipe = f" of the recipe “{found.config.recipe}”" if found.config.recipe != "best" else ""
    lead = [
        f"{counted(len(differ), 'setting')} of {len(every)} {'differs' if len(differ) == 1 else 'differ'} from the "
        f"defaults{recipe}."
    ]
    tables = [_settings("Settings that differ from the defaults", differ)] if differ else []
    return Section("settings", "Settings", lead, [CONFIG], tables=tables,
                   hidden=[_settings("All other settings", others)])  # fmt: skip


def _settings(caption: str, shown: list[Setting]) -> Table:
    rows = [(one.flag, _value(one.value), _value(one.default), one.help) for one in shown]
    return Table(caption, ("flag", "value", "default", "meaning"), rows, code=frozenset({0, 1, 2}))


def _value(value: Any) -> str:
    if value is None or value in ((), []):
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shortened(" ".join(map(str, value)) if isinstance(value, tuple | list) else str(value), 120)


def lineage(found: Gathered) -> Section:
    """Checkpoint, digests, versions and attempts."""
    made, facts = found.checkpoint.manifest, found.facts
    rows = [
        ("run", found.run.run_id, CONFIG),
        ("variant", found.variant or ABSENT, FACTS),
        ("checkpoint", f"{found.checkpoint.name}, epoch {made.epoch}", "its MANIFEST.json"),
        ("model.safetensors", found.checkpoint.model_sha256, "its MANIFEST.json"),
        ("training data", made.data_sha256, "its MANIFEST.json"),
        ("validation rows", made.validation_sha256 or ABSENT, "its MANIFEST.json"),
        ("split.parquet", made.split_sha256 or ABSENT, "its MANIFEST.json"),
        ("settings", made.config_sha256, "its MANIFEST.json"),
        ("code of the training", made.code_sha256 or ABSENT, "its MANIFEST.json"),
        ("git revision", made.revision, "its MANIFEST.json"),
        ("versions", _versions(facts.versions if facts else None), FACTS),
        ("ranks at the start", ABSENT if facts is None or facts.world_size is None else str(facts.world_size), FACTS),
        ("started", facts.started if facts and facts.started else ABSENT, FACTS),
    ]
    if found.evaluated is not None:
        rows.append(("evaluation", found.evaluated.manifest_sha256, "sha256 of metrics/MANIFEST.json"))
    tables = [
        Table("What the run is made of", ("what", "value", "from"), rows, code=frozenset({1, 2})),
        _attempts(found),
    ]
    files = [
        FACTS,
        f"checkpoints/{found.checkpoint.name}/MANIFEST.json",
        "attempts/*/start.json",
        "attempts/*/exit.json",
    ]
    return Section("lineage", "Lineage", [DIGESTS], files, tables=tables)


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else ABSENT


def _attempts(found: Gathered) -> Table:
    headings = ("attempt", "started", "ended", "exit code", "step", "error")
    return Table("Attempts", headings, [_attempt(one) for one in found.attempts], frozenset({0, 3, 4}))


def _attempt(one: Attempt) -> tuple[str, ...]:
    start, end = one.start, one.end
    ended = (end.ended, str(end.code), str(end.step), shortened(end.error or "", 200)) if end else None
    return (str(one.number), start.started if start else ABSENT, *(ended or ("not recorded", ABSENT, ABSENT, "")))


def check(found: Validated) -> Command:
    return Command("Check that nothing has changed", command("python", "-m", "fusion.verify", found.run.url))


def report_again(found: Validated) -> Command:
    return Command("Write this page again", command("python", "-m", "fusion.report", *where_of(found)))


def again(found: Validated) -> str:
    """A name for another run like this one; a run id has at most 63 characters."""
    return f"{found.run.run_id[:57].rstrip('-')}-again"


def reproduce(found: Gathered) -> Section:
    """Commands to check, repeat and use the run."""
    where, made = where_of(found), found.checkpoint.manifest
    commands = [check(found)]
    if found.config is not None:
        revision = made.revision.removesuffix("-dirty")
        if revision != "unknown":
            commands.append(Command("Get the code", command("git", "checkout", revision)))
        commands.append(Command("Train it again, under another name", _training(found)))
        module = f"fusion.{found.variant}"
        commands += [
            Command("Evaluate it", command("python", "-m", f"{module}.evaluate_by_groups", *where)),
            Command("Measure its sources", command("python", "-m", "fusion.ablation", *where)),
            Command("Predict test.csv", command("python", "-m", f"{module}.predict_test", *where)),
        ]
    commands.append(report_again(found))
    lead = [
        "The same code, settings and data on the same kind of machine give the same weights, byte for byte; on another "
        "number of ranks they agree within rounding."
    ]
    if made.revision.endswith("-dirty"):
        lead.append("The code had changes that were not committed to git, so its revision alone does not identify it.")
    return Section("reproduce", "Reproduce", lead, [CONFIG, FACTS], commands=commands)


def _training(found: Gathered) -> str:
    assert found.config is not None, "checked by the caller"
    shown = [one for one in settings_of(found.config) if not one.is_default and one.key not in (*WHERE, "data")]
    words = [word for one in shown for word in one.words]
    where = ["--data", str(found.settings["data"]), "--output", found.run.output or "output", "--run-id", again(found)]
    return command("python", "-m", f"fusion.{found.variant}.train", *where, *words)
