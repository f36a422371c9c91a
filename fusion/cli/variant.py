"""Which variant a subcommand is for: its first argument, else the only one that has a run in the output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fusion.cli.commands import Command
from fusion.environment import variable
from fusion.errors import UsageError, did_you_mean
from fusion.records.output import OutputFolder
from fusion.records.run import RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT
from fusion.terminal.spelling import as_typed
from fusion.variants import variants

_EXAMPLES = {
    "train": "--data data --output output",
    "evaluate": "--output output --by category",
    "predict": "--output output --name my-prices",
}


def choose(command: Command, words: Sequence[str]) -> tuple[str, list[str]]:
    """The variant, and the words that follow it.

    Raises:
        UsageError: the variant does not exist, or is not given and cannot be found out.
    """
    known = known_to(command)
    first = next(iter(words), "")
    if first in known:
        return first, list(words[1:])
    if first and not first.startswith("-"):
        near = did_you_mean(first.replace("-", "_"), known)
        raise UsageError(f"there is no variant {first!r}", f"{near}the variants are {', '.join(known)}")
    found = [] if command.name == "train" else [one for one in _with_runs(words) if one in known]
    if len(found) == 1:
        return found[0], list(words)
    raise _no_variant(command, known, found, words)


def known_to(command: Command) -> list[str]:
    """The variants that a subcommand can be used for."""
    return [*variants(), *([ENSEMBLE_VARIANT] if command.name == "predict" else [])]


def _no_variant(command: Command, known: Sequence[str], found: Sequence[str], words: Sequence[str]) -> UsageError:
    typed = as_typed(f"python -m {command.module.format(variant=(found or known)[0])}")
    reason = ""
    if command.name != "train":
        reason = f"; there are runs of {' and '.join(found) or 'no variant'} under {_where(words).output}"
    return UsageError(
        f"{command.name} needs a variant: {', '.join(known)}{reason}",
        f"for example `{typed} {_EXAMPLES[command.name]}`",
    )


def _with_runs(words: Sequence[str]) -> list[str]:
    """The variant of the run that the flags name; else the variants with a served run in the output."""
    given = _where(words)
    if given.run_dir or given.run_id:
        run = RunFolder(given.run_dir) if given.run_dir else RunFolder.named(given.output, given.run_id)
        facts = run.facts_if_whole()
        return [facts.variant] if facts else []
    return [folder.name for folder in OutputFolder(given.output).ls("pointers", "runs")]


def _where(words: Sequence[str]) -> argparse.Namespace:
    """The flags that say where the run is. The command itself reads and checks them later."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output", nargs="?", default=variable("FUSION_OUTPUT"))
    parser.add_argument("--run-id", nargs="?", default=variable("FUSION_RUN_ID"))
    parser.add_argument("--run-dir", nargs="?", default=variable("FUSION_RUN_DIR"))
    given, _ = parser.parse_known_args(words)
    given.output = given.output or "output"
    return given
