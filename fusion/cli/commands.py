"""The table of all subcommands of `fusion`, and the overview that `fusion --help` prints."""

from __future__ import annotations

from dataclasses import dataclass

from fusion.terminal.spelling import program


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: the module whose `main` runs it; `{variant}` stands for the first argument.
        arguments: what follows its name, for the overview.
        about: what it does, in a few words.
        verbs: its own subcommands, if it has any.
    """

    name: str
    module: str
    arguments: str
    about: str
    verbs: tuple[str, ...] = ()

    @property
    def of_variant(self) -> bool:
        return "{variant}" in self.module


GROUPS: dict[str, tuple[Command, ...]] = {
    "train and evaluate": (
        Command("train", "fusion.{variant}.train", "VARIANT", "train a model, or continue a run that was stopped"),
        Command(
            "evaluate", "fusion.{variant}.evaluate_by_groups", "VARIANT", "metrics of a run, by price and by any column"
        ),
        Command("predict", "fusion.{variant}.predict_test", "VARIANT", "prices for test.csv, checked and published"),
        Command("ensemble", "fusion.ensemble.__main__", "RUN RUN ...", "combine runs: `predict ensemble` uses them"),
        Command("ablation", "fusion.ablation.__main__", "--run-id RUN", "measure what each source is worth"),
    ),
    "results": (
        Command("report", "fusion.report.__main__", "--run-id RUN", "write a page on a run, on several, or on all"),
        Command("compare", "fusion.compare.__main__", "RUN RUN ...", "is one run better by more than chance?"),
        Command(
            "pull",
            "fusion.jobs.pull",
            "runs|run|...",
            "list and download runs and submissions",
            ("runs", "submissions", "compare", "run", "submission"),
        ),
        Command("verify", "fusion.verify.__main__", "URL", "check that files still hold what was written"),
    ),
    "data": (
        Command("demo", "fusion.demo.__main__", "", "everything on a generated catalog, in about a minute"),
        Command("convert", "fusion.convert.__main__", "--to URL", "make a source of .npy files or a pickle"),
        Command("prepare", "fusion.prepare.__main__", "--source ...", "make sources of files of any size"),
    ),
    "cluster": (
        Command("doctor", "fusion.jobs.doctor", "", "check store, credentials, data and GPUs before a run"),
        Command("launch", "fusion.launch.__main__", "MODULE", "start one rank per GPU of this machine"),
        Command("submit", "fusion.jobs.submit", "--cluster ...", "send a job to Slurm or Kubernetes, or run it here"),
        Command(
            "jobs",
            "fusion.jobs.control",
            "list|logs|...",
            "list, follow, await and cancel jobs",
            ("list", "status", "logs", "wait", "cancel"),
        ),
    ),
    "this command": (
        Command("completion", "fusion.cli.completion", "SHELL", "print the completion of bash, zsh or fish"),
        Command("version", "fusion.cli.version", "", "versions of Fusion, its code, Python and torch"),
    ),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}

_HEAD = """\
Fusion predicts product prices from precomputed embeddings of several encoders.

usage: {prog} COMMAND [flags]       {prog} COMMAND --help shows what it needs
"""
_FOOT = """
examples:
  {prog} train all_embeddings --data s3://bucket/data --output s3://bucket/out
  {prog} predict --output s3://bucket/out --name my-prices
"""


def overview() -> str:
    """The commands by group, with two examples, on one screen of 80 columns."""
    lines = [_HEAD.format(prog=program())]
    for heading, commands in GROUPS.items():
        lines.append(f"{heading}:")
        lines += [f"  {f'{one.name} {one.arguments}':<22} {one.about}" for one in commands]
    return "\n".join([*lines, _FOOT.format(prog=program())])
