"""Lists, compares and pulls the runs and submissions of a bucket. Only reads there; needs neither torch nor a GPU.

    python jobs/pull.py runs --output s3://bucket/output
    python jobs/pull.py submissions --name prices
    python jobs/pull.py compare RUN RUN
    python jobs/pull.py run best --variant all_embeddings --to pulled
    python jobs/pull.py submission current --name prices --to pulled

The folder gets the bucket's layout: pulled/runs/<run id>/…, pulled/submissions/<name>/<date>/<digest>/submission.csv.
Its path is what is printed on standard output. Every sha256 of a manifest is verified: a file that is not as it was
written ends the pull with 65 and never gets its name. The same command goes on where a broken pull ended, fetches
nothing that is there already, and replaces what was damaged in the folder.
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

try:
    from fusion import storage
    from fusion.command import guarded
    from fusion.environment import variable
    from fusion.errors import ConfigError, DataError, ExitCode, Parser, UsageError, seconds, visible
    from fusion.records.manifests import ENSEMBLE, STATE, SUBMISSION
    from fusion.records.run import LEASE, RunFolder
    from fusion.streams import unfailing
    from jobs.arguments import refuse_empty
    from jobs.results import shown
    from jobs.results.bucket import list_runs, list_submissions
    from jobs.results.choice import Choice, choose_run, choose_submission, plan_run, plan_submission
    from jobs.results.compare import compare
    from jobs.results.transfer import Outcome, Plan, damaged, fetch
except ImportError as wrong_python:
    if __name__ != "__main__":
        raise
    print(f"error: {wrong_python} for {sys.executable}", file=sys.stderr)
    print("hint: run `. .venv/bin/activate` first; `make demo` makes .venv", file=sys.stderr)
    sys.exit(78)  # ExitCode.CONFIG, which cannot be imported here

EXAMPLE = "`python jobs/pull.py runs --output s3://my-bucket/output`"
STOPPED_BY_KEYBOARD = 130  # as shells have it
_LISTED = """`served` is what predict_test uses unless --run-id names another run. Runs of one split letter
validated on the same rows, so that their SMAPEs can be compared. A run that was killed outright could
not say so: it is `running`, and `silent` once nothing of it has been written for 15 minutes. --json
lists all runs, failed ones included."""
_PULLED = """Of a run comes everything but its lease and all but its best checkpoint: config.json, run.json,
split.parquet, features.safetensors, memory.safetensors, metrics/, attempts/ with the logs, and the
weights with their manifest. state.pt, from which training goes on, is about three times as large and
comes with --state."""


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
    chosen = [choose_run(given.output, which, given.variant) for which in given.runs]
    found = compare([RunFolder(storage.join(given.output, one.path)) for one in chosen], given.metric)
    if given.json:
        groups = [{"by": by, "group": group, given.metric: values} for (by, group), values in found.groups.items()]
        _print_json(asdict(found) | {"groups": groups})
    else:
        shown.comparison(found, given.output)


def _run(given: argparse.Namespace) -> None:
    choice = choose_run(given.output, given.which, given.variant)
    if given.dry_run:
        _print_commands(given, choice, _run_filters(given, choice))
        return
    paths = _pull(given, lambda: plan_run(given.output, choice, state=given.state))
    if any(storage.base(path) == ENSEMBLE for path in paths):
        _say("it is an ensemble: its members, which ensemble.json names, are runs to be pulled as well")
    elif not any("/checkpoints/" in path for path in paths):
        _say("it has no validated checkpoint yet, so no model was pulled")
    print(os.path.join(given.to, choice.path))


def _submission(given: argparse.Namespace) -> None:
    choice = choose_submission(given.output, given.which, given.name)
    if given.dry_run:
        _print_commands(given, choice, [])
        return
    _pull(given, lambda: plan_submission(given.output, choice))
    print(os.path.join(given.to, choice.path, SUBMISSION))


def _pull(given: argparse.Namespace, make_plan: Callable[[], Plan]) -> list[str]:
    """Pulls, or checks what was pulled; the paths of all files that belong to it."""
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
        outcomes, n_bytes = fetch(again, given.to)  # a running job has pruned what it had, for something better
    for path, outcome in outcomes.items():
        if outcome is Outcome.REPLACED:
            _say(f"{path} was damaged in {given.to}, and is replaced")
    n = Counter(outcomes.values())
    n_new = n[Outcome.FETCHED] + n[Outcome.REPLACED]
    files = "1 file" if n_new == 1 else f"{n_new} files"
    _say(f"{files} fetched, {n[Outcome.THERE]} there already; {n_bytes:,} bytes read")
    return list(outcomes)


def _check(plan: Plan, folder: str) -> None:
    wrong = damaged(plan, folder)
    if wrong:
        path, what = next(iter(wrong.items()))
        others = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
        raise DataError(f"{os.path.join(folder, path)} {what}{others}", "pull again without --check, which repairs it")
    _say(f"{sum(1 for item in plan.items if item.entry)} files are what their manifests say")


def _run_filters(given: argparse.Namespace, choice: Choice) -> list[str]:
    """What of a run's folder `plan_run` leaves out; a later filter counts more."""
    plan = plan_run(given.output, choice, state=given.state)
    steps = {item.path.split("/")[3] for item in plan.items if "/checkpoints/" in item.path}
    filters = ["--exclude", LEASE, "--exclude", "parts/*", "--exclude", "checkpoints/*"]
    for step in steps:
        filters += ["--include", f"checkpoints/{step}/*"]
    return filters if given.state else [*filters, "--exclude", f"*/{STATE}"]


def _print_commands(given: argparse.Namespace, choice: Choice, filters: Sequence[str]) -> None:
    endpoint = variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    where = ["--endpoint-url", endpoint] if endpoint else []
    source, target = storage.join(given.output, choice.path), os.path.join(given.to, choice.path)
    print(shlex.join(["aws", "s3", "sync", source, target, *filters, *where]))
    for path in choice.pointer:  # by cp: sync would leave one of the same size as it is
        print(shlex.join(["aws", "s3", "cp", storage.join(given.output, path), os.path.join(given.to, path), *where]))


def _print_json(value: Any) -> None:
    sys.stdout.write(storage.as_json(value).decode())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python jobs/pull.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(name: str, job: Callable[[argparse.Namespace], None], text: str, more: str = "") -> Parser:
        made: Parser = commands.add_parser(
            name, help=text, description=f"{text}.\n\n{more}".strip(), formatter_class=form, allow_abbrev=False
        )
        made.set_defaults(job=job, parser=made)
        made.add_argument("--output", metavar="URL", default=variable("FUSION_OUTPUT") or "output",
            help="bucket or folder with runs/ and submissions/ (default: FUSION_OUTPUT, else output)")  # fmt: skip
        patience = variable("FUSION_STORE_TIMEOUT") or "60"
        made.add_argument("--store-timeout", metavar="S", type=seconds, default=patience,
            help="seconds to retry a store that does not answer (default: 60)")  # fmt: skip
        return made

    _add_lists(command)
    _add_pulls(command)
    return parser


def _add_lists(command: Callable[..., Parser]) -> None:
    runs = command("runs", _runs, "lists the runs: finished ones first, then the others, each newest first", _LISTED)
    runs.add_argument("--failed", action="store_true", help="also those that failed before they had a model")
    submissions = command("submissions", _submissions, "lists the submissions, newest date first")
    comparison = command("compare", _compare, "shows what differs between runs: settings, SMAPE, metrics by group")
    submissions.add_argument("--name", help="only those published under this name")
    comparison.add_argument("runs", nargs="+", metavar="RUN",
        help="ids, or latest and best (which is served) of a --variant")  # fmt: skip
    comparison.add_argument("--metric", default="smape", help="column of metrics/groups.csv (default: smape)")
    for made in (runs, comparison):
        made.add_argument("--variant", help="qwen_clip or all_embeddings")
    for made in (runs, submissions, comparison):
        made.add_argument("--json", action="store_true", help="JSON instead of a table")


def _add_pulls(command: Callable[..., Parser]) -> None:
    run = command("run", _run, "pulls one run", _PULLED)
    run.add_argument("which", metavar="RUN", help="an id, or latest or best (which is served) of the --variant")
    run.add_argument("--variant", help="qwen_clip or all_embeddings; needed for latest and best if there are both")
    run.add_argument("--state", action="store_true", help="also state.pt, from which training goes on")
    submission = command("submission", _submission, "pulls one submission with its manifest")
    submission.add_argument("which", metavar="WHICH", help="current, a date YYYY-MM-DD, or DATE/DIGEST")
    submission.add_argument("--name", default="test", help="name it was published under (default: test)")
    for made in (run, submission):
        made.add_argument("--to", metavar="FOLDER", default="pulled", help="where it goes (default: pulled)")
        either = made.add_mutually_exclusive_group()
        either.add_argument(
            "--dry-run", action="store_true", help="print the aws commands that do the same, unverified"
        )
        either.add_argument(
            "--check", action="store_true", help="fetch nothing; end with 65 if FOLDER differs from the manifests"
        )


def _job(argv: Sequence[str] | None) -> ExitCode:
    if not (sys.argv[1:] if argv is None else argv):
        message = "pull.py expects a command: runs, submissions, compare, run or submission"
        raise UsageError(
            message, "for example `python jobs/pull.py runs --output s3://my-bucket/output`; --help says more"
        )
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # which knows the flags that are near
    refuse_empty(given)
    _refuse_url(given)
    _check_dry_run(given)
    storage.set_patience(given.store_timeout)
    given.job(given)
    return ExitCode.DONE


def _check_dry_run(given: argparse.Namespace) -> None:
    if getattr(given, "dry_run", False) and not given.output.startswith("s3://"):
        raise UsageError(f"--dry-run prints aws commands, and --output is {given.output}", "name a bucket as s3://…")


def _refuse_url(given: argparse.Namespace) -> None:
    to = getattr(given, "to", "")
    if re.match(r"[a-z0-9]+:/", to):
        raise ConfigError(f"--to is {to}, expected a folder of this machine", "give --to a folder, such as pulled")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    with unfailing():
        try:
            return guarded(lambda: _job(argv))
        except KeyboardInterrupt:
            _say("stopped; the same command goes on where this one ended")
            return STOPPED_BY_KEYBOARD


if __name__ == "__main__":
    code = main()
    if code == STOPPED_BY_KEYBOARD:
        os._exit(code)  # sys.exit would wait for threads, and they for a store that may not answer
    sys.exit(code)
