"""Lists, compares and downloads ("pulls") the runs and submissions of a bucket.

    python jobs/pull.py runs --output s3://bucket/output
    python jobs/pull.py submissions --name prices
    python jobs/pull.py compare RUN RUN
    python jobs/pull.py run best --variant all_embeddings --to pulled
    python jobs/pull.py submission current --name prices --to pulled

The commands only read from the bucket, and need neither torch nor a GPU. The folder gets the bucket's layout:
pulled/runs/<run id>/…, pulled/submissions/<name>/<date>/<digest>/submission.csv. `run` and `submission` print the path
of what was pulled on standard output. Every sha256 in a manifest is verified: when a file differs from its manifest,
the pull ends with 65 and does not keep the file. To continue an interrupted pull, run the same command again: it skips
files that are complete, and replaces those that are damaged in the folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from shutil import get_terminal_size
from typing import Any

from fusion import storage
from fusion.command import guarded
from fusion.environment import variable
from fusion.errors import ConfigError, DataError, ExitCode, Parser, UsageError, seconds
from fusion.jobs.arguments import refuse_empty
from fusion.jobs.results import shown
from fusion.jobs.results.bucket import list_runs, list_submissions
from fusion.jobs.results.choice import Choice, choose_run, choose_submission, plan_run, plan_submission
from fusion.jobs.results.compare import compare
from fusion.jobs.results.transfer import Outcome, Plan, fetch, find_damaged
from fusion.records.manifests import ENSEMBLE, STATE, SUBMISSION
from fusion.records.output import OutputFolder
from fusion.records.run import LEASE, RunFolder
from fusion.terminal.escapes import visible
from fusion.terminal.help_screen import Rare
from fusion.terminal.streams import unfailing

EXAMPLE = "`python jobs/pull.py runs --output s3://my-bucket/output`"
STOPPED_BY_KEYBOARD = 130  # 128 + SIGINT, the exit code of a shell after Ctrl-C
_RUNS_HELP = """The state is `served` for the run that predict_test uses unless --run-id names another one.
Runs with the same split letter validated on the same rows, so that their SMAPEs can be compared. A run
that was killed with SIGKILL has no record of its end: it stays `running`, and becomes `silent` when none
of its files has been written for 15 minutes. --json lists all runs, including failed ones."""
_PULL_HELP = """Pulls all files of a run except its lease and its other checkpoints: config.json, run.json,
split.parquet, features.safetensors, memory.safetensors, report.html, model_card.md, metrics/, attempts/ with
the logs, and the weights of the best checkpoint with their manifest. --state adds state.pt, which training
resumes from; it is about three times as large as the weights."""


def _runs(given: argparse.Namespace) -> None:
    found = list_runs(given.output)
    wanted = [run for run in found if given.variant in (None, run.variant)]
    if given.json:
        _print_json([asdict(run) for run in wanted])
    elif found and not wanted:
        there = ", ".join(sorted({run.variant for run in found if run.variant})) or "unknown variants"
        print(visible(f"no runs of {given.variant} in {given.output}; there are runs of {there}"))
    else:
        width = get_terminal_size().columns if sys.stdout.isatty() else None
        shown.runs(wanted, given.output, failed=given.failed, width=width)


def _submissions(given: argparse.Namespace) -> None:
    found = list_submissions(given.output, given.name)
    if given.json:
        _print_json([asdict(one) for one in found])
    else:
        shown.submissions(found, given.output)


def _compare(given: argparse.Namespace) -> None:
    if len(given.runs) < 2:
        lists = f"`python jobs/pull.py runs --output {given.output}` lists them"
        raise UsageError(f"compare got {' '.join(given.runs)}, expected at least two runs", lists)
    chosen = [choose_run(OutputFolder(given.output), which, given.variant) for which in given.runs]
    found = compare([RunFolder(one.url) for one in chosen], given.metric)
    if given.json:
        groups = [{"by": by, "group": group, given.metric: values} for (by, group), values in found.groups.items()]
        _print_json(asdict(found) | {"groups": groups})
    else:
        shown.comparison(found, given.output)


def _run(given: argparse.Namespace) -> None:
    choice = choose_run(OutputFolder(given.output), given.which, given.variant)
    if given.dry_run:
        _print_commands(given, choice, _run_filters(given, choice))
        return
    paths = _pull(given, lambda: plan_run(choice, state=given.state))
    if any(storage.base(path) == ENSEMBLE for path in paths):
        _say("this run is an ensemble: pull its members too, the runs that ensemble.json names")
    elif not any("/checkpoints/" in path for path in paths):
        _say("this run has no validated checkpoint yet, so no model was pulled")
    print(os.path.join(given.to, choice.path))


def _submission(given: argparse.Namespace) -> None:
    choice = choose_submission(OutputFolder(given.output), given.which, given.name)
    if given.dry_run:
        _print_commands(given, choice, [])
        return
    _pull(given, lambda: plan_submission(choice))
    print(os.path.join(given.to, choice.path, SUBMISSION))


def _pull(given: argparse.Namespace, make_plan: Callable[[], Plan]) -> list[str]:
    """Pulls what the plan lists, or with --check compares it with the folder; returns the paths of all its files.

    When an object is missing or damaged, and the plan made again differs, the new plan is pulled: a training that is
    under way has deleted the checkpoint of the first plan in favour of a better one.
    """
    plan = make_plan()
    if given.check:
        _check(plan, given.to)
        return [item.path for item in plan.items]
    try:
        outcomes, n_bytes = fetch(plan, given.to)
    except DataError:
        again = make_plan()
        if again.last == plan.last:
            raise
        outcomes, n_bytes = fetch(again, given.to)
    for path, outcome in outcomes.items():
        if outcome is Outcome.REPLACED:
            _say(f"{path} was damaged in {given.to}, and has been replaced")
    n = Counter(outcomes.values())
    n_new = n[Outcome.FETCHED] + n[Outcome.REPLACED]
    files = "1 file" if n_new == 1 else f"{n_new} files"
    _say(f"{files} fetched, {n[Outcome.THERE]} there already; {n_bytes:,} bytes read")
    return list(outcomes)


def _check(plan: Plan, folder: str) -> None:
    """Raises DataError when a file in the folder is missing or differs from its manifest; fetches nothing."""
    wrong = find_damaged(plan, folder)
    if wrong:
        path, what = next(iter(wrong.items()))
        others = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
        raise DataError(f"{os.path.join(folder, path)} {what}{others}", "pull again without --check, which repairs it")
    _say(f"{sum(1 for item in plan.items if item.entry)} files match their manifests")


def _run_filters(given: argparse.Namespace, choice: Choice) -> list[str]:
    """Filters of `aws s3 sync` that leave out what `plan_run` leaves out. Of two that match, the later one counts."""
    plan = plan_run(choice, state=given.state)
    steps = {item.path.split("/")[3] for item in plan.items if "/checkpoints/" in item.path}
    filters = ["--exclude", LEASE, "--exclude", "parts/*", "--exclude", "checkpoints/*"]
    for step in steps:
        filters += ["--include", f"checkpoints/{step}/*"]
    return filters if given.state else [*filters, "--exclude", f"*/{STATE}"]


def _print_commands(given: argparse.Namespace, choice: Choice, filters: Sequence[str]) -> None:
    """Prints the aws commands that pull the same files, for --dry-run."""
    endpoint = variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    where = ["--endpoint-url", endpoint] if endpoint else []
    print(shlex.join(["aws", "s3", "sync", choice.url, os.path.join(given.to, choice.path), *filters, *where]))
    for path in choice.pointer:  # With cp, because sync skips a file that differs but has the same size.
        print(shlex.join(["aws", "s3", "cp", choice.output.at(path), os.path.join(given.to, path), *where]))


def _print_json(value: Any) -> None:
    sys.stdout.write(storage.as_json(value).decode())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python jobs/pull.py", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(name: str, job: Callable[[argparse.Namespace], None], text: str, more: str = "") -> Parser:
        made: Parser = commands.add_parser(name, help=text, description=f"{text}.\n\n{more}".strip())
        made.set_defaults(job=job, parser=made)
        made.add_argument("--output", metavar="URL", default=variable("FUSION_OUTPUT") or "output",
            help="bucket or folder with runs/ and submissions/ (default: FUSION_OUTPUT, else output)")  # fmt: skip
        patience = variable("FUSION_STORE_TIMEOUT") or "60"
        made.add_argument("--store-timeout", metavar="S", type=seconds, default=patience,
            help=Rare("seconds for which to retry a store that does not answer (default: 60)"))  # fmt: skip
        return made

    _add_lists(command)
    _add_pulls(command)
    return parser


def _add_lists(command: Callable[..., Parser]) -> None:
    runs = command("runs", _runs, "lists the runs: finished ones first, then the others, each newest first", _RUNS_HELP)
    runs.add_argument("--failed", action="store_true", help="also list runs that failed before they had a model")
    submissions = command("submissions", _submissions, "lists the submissions, newest date first")
    comparison = command("compare", _compare, "shows what differs between runs: settings, SMAPE, metrics by group")
    submissions.add_argument("--name", help="list only those published under this name")
    comparison.add_argument("runs", nargs="+", metavar="RUN",
        help="an id, or latest or best (the served run) of the --variant")  # fmt: skip
    comparison.add_argument("--metric", default="smape", help="column of metrics/groups.csv (default: smape)")
    for made in (runs, comparison):
        made.add_argument("--variant", help="qwen_clip or all_embeddings")
    for made in (runs, submissions, comparison):
        made.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_pulls(command: Callable[..., Parser]) -> None:
    run = command("run", _run, "pulls one run", _PULL_HELP)
    run.add_argument("which", metavar="RUN", help="an id, or latest or best (the served run) of the --variant")
    run.add_argument("--variant", help="qwen_clip or all_embeddings; latest and best need it if there are runs of both")
    run.add_argument("--state", action="store_true", help="also pull state.pt, which training resumes from")
    submission = command("submission", _submission, "pulls one submission with its manifest")
    submission.add_argument("which", metavar="WHICH", help="current, a date YYYY-MM-DD, or DATE/DIGEST")
    submission.add_argument("--name", default="test", help="name it was published under (default: test)")
    for made in (run, submission):
        made.add_argument("--to", metavar="FOLDER", default="pulled", help="folder to pull into (default: pulled)")
        either = made.add_mutually_exclusive_group()
        either.add_argument(
            "--dry-run", action="store_true", help="print aws commands that pull the same files without verifying them"
        )
        either.add_argument(
            "--check", action="store_true", help="fetch nothing; end with 65 if FOLDER differs from the manifests"
        )


def _job(argv: Sequence[str] | None) -> ExitCode:
    if not (sys.argv[1:] if argv is None else argv):
        message = "pull expects a command: runs, submissions, compare, run or submission"
        raise UsageError(message, f"for example {EXAMPLE}; `{_parser().prog} --help` says more")
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # the subcommand's parser suggests its flags
    refuse_empty(given)
    _refuse_url(given)
    _check_dry_run(given)
    storage.set_patience(given.store_timeout)
    given.job(given)
    return ExitCode.DONE


def _check_dry_run(given: argparse.Namespace) -> None:
    if getattr(given, "dry_run", False) and not given.output.startswith("s3://"):
        message = f"--dry-run prints aws commands for s3:// URLs, and --output is {given.output}"
        raise UsageError(message, "leave out --dry-run, or give --output s3://BUCKET/…")


def _refuse_url(given: argparse.Namespace) -> None:
    to = getattr(given, "to", "")
    # Also with a single slash, which is what shells and pathlib make of a mistyped or joined URL.
    if re.match(r"[a-z0-9]+:/", to):
        raise ConfigError(f"--to is {to}, expected a folder of this machine", "give --to a folder, such as pulled")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; returns its exit code. `--help` raises SystemExit, as argparse does."""
    with unfailing():
        try:
            return guarded(lambda: _job(argv))
        except KeyboardInterrupt:
            _say("stopped; run the same command again to continue")
            return STOPPED_BY_KEYBOARD


if __name__ == "__main__":
    code = main()
    if code == STOPPED_BY_KEYBOARD:
        os._exit(code)  # sys.exit would wait for threads that may be waiting for a store that does not answer
    sys.exit(code)
