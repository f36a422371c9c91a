"""Checks everything that a job needs before it runs: the store, credentials, data, machine, libraries and GPUs.

    python jobs/doctor.py --data s3://bucket/data --output s3://bucket/output --variant all_embeddings

Prints one line per check: ok, warn or fail, what was found, and how to fix it. Settings come from the same environment
variables that the job would read. The command writes one object below --output and removes it again. The exit code is 0
when no check fails, else that of the worst failure: 77 credentials, 78 settings or machine, 65 data, 70 a bug in a
check, 69 a store that does not answer.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from fusion import storage
from fusion.command import guarded
from fusion.environment import variable
from fusion.errors import ExitCode, FusionError, Parser, UsageError, seconds
from fusion.jobs.arguments import refuse_empty
from fusion.jobs.checks import machine, store
from fusion.jobs.checks.check import Check, CheckResult, PlannedJob, fail, read_settings, warn
from fusion.jobs.schedulers.description import config_class
from fusion.terminal.error_display import print_report
from fusion.terminal.escapes import visible
from fusion.terminal.help_screen import Rare

# UNREACHABLE comes last: schedulers retry a job that ends with 69, and a retry cannot help where another check failed
# as well. The others are in the order in which a user should fix them.
WORST_FIRST = (ExitCode.CREDENTIALS, ExitCode.CONFIG, ExitCode.DATA, ExitCode.BUG, ExitCode.UNREACHABLE)
SOURCES = "--sources."

CHECKS = (
    Check("settings", "FUSION_… variables hold valid values", store.settings),
    Check("credentials", "there are credentials for S3, and when they expire", store.credentials),
    Check("store", "the store of --output answers", store.store),
    Check("clock", "this machine's clock agrees with the store's", store.clock),
    Check("data", "train.csv, test.csv and the sources exist", store.data, needs="settings"),
    Check("writable", "an object can be written, read and removed", store.writable, needs="store"),
    Check("conditions", "the store supports conditional writes", store.conditions, needs="writable"),
    Check("libraries", "Python and the libraries have supported versions", machine.libraries),
    Check("gpus", "GPUs and driver, from nvidia-smi", machine.gpus, needs="settings"),
    Check("torch", "torch loads, and finds GPUs and NCCL", machine.torch, needs="settings"),
    Check("memory", "limits on memory and open files", machine.memory),
    Check("shm", "/dev/shm is large enough for NCCL, and fits the memory limit", machine.shared_memory),
    Check("folders", "temporary files and caches can be written", machine.folders),
    Check("names", "host names resolve", machine.names),
    Check("cluster", "which scheduler runs this, and the time that is left", machine.cluster),
    Check("grace", "training's grace period fits the launcher's", machine.grace, needs="settings"),
)


def examine(
    job: PlannedJob, checks: Sequence[Check], say: Callable[[str, CheckResult], None]
) -> dict[str, CheckResult]:
    """Runs the checks in order; returns the results by the name of the check.

    Args:
        say: called with each result as soon as it is there.
    """
    results: dict[str, CheckResult] = {}
    unavailable: set[str] = set()  # names of checks that failed or were skipped
    for check in checks:
        is_skipped = check.needs in unavailable
        if is_skipped:
            result: CheckResult | None = warn(f"skipped: needs check {check.needs}", f"see check {check.needs}")
        else:
            result = run_check(check, job)
        if result is None:
            continue
        if is_skipped or result.verdict == "fail":
            unavailable.add(check.name)
        results[check.name] = result
        say(check.name, result)
    return results


def run_check(check: Check, job: PlannedJob) -> CheckResult | None:
    """What the check found. An exception in the check becomes a failure too, with exit code 70 if it is unexpected."""
    try:
        return check.run(job)
    except FusionError as error:
        return fail(error.message, error.remedy, ExitCode(error.code))
    except Exception as error:
        return fail(f"this check broke: {type(error).__name__}: {error}", "report it as a bug in Fusion", ExitCode.BUG)


def worst(results: Sequence[CheckResult]) -> ExitCode:
    """The exit code of the worst failure; 0 when no check failed, and 70 for a code that WORST_FIRST does not list."""
    codes = {result.code for result in results if result.verdict == "fail"}
    if not codes:
        return ExitCode.DONE
    return next((code for code in WORST_FIRST if code in codes), ExitCode.BUG)


def _print(name: str, result: CheckResult) -> None:
    print(f"{result.verdict:<5}{name:<12} {visible(result.found)}", flush=True)
    if result.remedy:
        print(f"{'':<17} hint: {visible(result.remedy)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    width = max(len(check.name) for check in CHECKS)
    listed = "\n".join(f"  {check.name:<{width}}  {check.about}" for check in CHECKS)
    parser = Parser(
        "python jobs/doctor.py",
        description=f"{__doc__}\nThe checks:\n{listed}",
    )
    add = parser.add_argument
    add("--data", metavar="URL", help="bucket or folder of the input (default: FUSION_DATA, else data)")
    add("--output", metavar="URL", help="bucket or folder of the output (default: FUSION_OUTPUT, else output)")
    add("--variant", metavar="NAME", help="qwen_clip or all_embeddings: also check that its sources exist")
    add(f"{SOURCES}ROLE", metavar="NAME", action="append",
        help="source for a role of the --variant, as in training: --sources.clip-image cnn")  # fmt: skip
    add("--store-timeout", metavar="S", type=seconds, default=variable("FUSION_STORE_TIMEOUT") or "5",
        help=Rare("seconds for which to retry a store that does not answer (default: 5)"))  # fmt: skip
    add(
        "--only",
        metavar="CHECK",
        nargs="+",
        choices=[check.name for check in CHECKS],
        help="run these checks alone; --help-all lists them",
    )
    add("--json", action="store_true", help="print JSON instead of lines")
    return parser


def _read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, PlannedJob]:
    """Parses the flags; returns them, and the job that they and the environment describe.

    Raises:
        UsageError: a flag, a variant or a role does not exist.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    refuse_empty(given)
    storage.set_patience(given.store_timeout)
    if unknown and not unknown[0].startswith(SOURCES):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unknown and not given.variant:
        raise UsageError(
            f"{unknown[0]} names the source of a role, and roles need a variant", "add --variant all_embeddings"
        )
    if given.variant:
        config_class(given.variant, "train")  # raises UsageError if there is no such variant
    typed = {"--output": given.output, "--data": given.data}
    flags = (*(word for name, value in typed.items() if value for word in (name, value)), *unknown)
    try:
        settings = read_settings(given.variant, flags)
        output, data = settings.output, settings.data
    except UsageError:
        raise
    except (
        FusionError
    ):  # The check `settings` reports it; the other checks go on with what can be read without parsing.
        output = given.output or variable("FUSION_OUTPUT") or "output"
        data = given.data or variable("FUSION_DATA") or "data"
    return given, PlannedJob(output, data, given.variant, flags)


def _job(argv: Sequence[str] | None) -> ExitCode:
    given, job = _read(argv)
    checks = [check for check in CHECKS if not given.only or check.name in given.only]
    results = examine(job, checks, (lambda *_: None) if given.json else _print)
    if given.json:
        listed = [{"check": name, **asdict(result)} for name, result in results.items()]
        sys.stdout.write(storage.as_json(listed).decode())
        return worst([*results.values()])
    n_failed = sum(result.verdict == "fail" for result in results.values())
    print(f"{n_failed} of {len(results)} checks failed" if n_failed else "OK")
    return worst([*results.values()])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; returns its exit code. `--help` raises SystemExit, as argparse does."""
    try:
        return guarded(lambda: _job(argv))
    except KeyboardInterrupt:
        print_report(FusionError("interrupted", "run the same command again").report())
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
