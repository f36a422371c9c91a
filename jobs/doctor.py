"""Looks at everything a job needs before it runs: the store, credentials, data, machine, libraries and GPUs.

    python jobs/doctor.py --data s3://bucket/data --output s3://bucket/output --variant all_embeddings

One line for each check: ok, warn or fail, what was found, and what to do about it. Settings come from the environment,
as the job's own would. It writes one object below --output and removes it again, and loads no torch into this process.
The exit code is 0 when nothing fails, else that of the worst failure: 77 credentials, 78 settings or machine, 65 data,
70 a check that broke, 69 a store that does not answer.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

try:
    from fusion import storage
    from fusion.command import guarded
    from fusion.environment import variable
    from fusion.errors import ExitCode, FusionError, Parser, UsageError, seconds, visible
    from jobs.arguments import refuse_empty
    from jobs.checks import machine, store
    from jobs.checks.findings import Check, Finding, Job, fail, read_settings, warn
    from jobs.schedulers.description import config_class
except ImportError as wrong_python:
    if __name__ != "__main__":
        raise
    print(f"error: {wrong_python} for {sys.executable}", file=sys.stderr)
    print("hint: run `. .venv/bin/activate` first; `make demo` makes .venv", file=sys.stderr)
    sys.exit(78)  # ExitCode.CONFIG, which cannot be imported here

# What waiting may cure comes last: a scheduler may try 69 again, and must not where something else is wrong as well.
WORST_FIRST = (ExitCode.CREDENTIALS, ExitCode.CONFIG, ExitCode.DATA, ExitCode.BUG, ExitCode.UNREACHABLE)
SOURCES = "--sources."

CHECKS = (
    Check("settings", "FUSION_… variables hold what is allowed", store.settings),
    Check("credentials", "there are some, and how long they live", store.credentials),
    Check("store", "the store of --output answers", store.store),
    Check("clock", "this clock is the store's", store.clock),
    Check("data", "train.csv, test.csv and the sources are there", store.data, needs="settings"),
    Check("writable", "an object can be written, read and removed", store.writable, needs="store"),
    Check("conditions", "the store refuses what two writers must not do", store.conditions, needs="writable"),
    Check("libraries", "Python and libraries are new enough", machine.libraries),
    Check("gpus", "GPUs and driver, by nvidia-smi", machine.gpus, needs="settings"),
    Check("torch", "torch loads, and finds GPUs and NCCL", machine.torch, needs="settings"),
    Check("memory", "limits on memory and open files", machine.memory),
    Check("shm", "/dev/shm is large enough for NCCL, and fits the memory limit", machine.shared_memory),
    Check("folders", "temporary files and caches can be written", machine.folders),
    Check("names", "host names resolve", machine.names),
    Check("cluster", "what runs this, and how long it still may", machine.cluster),
    Check("grace", "training's grace period fits the launcher's", machine.grace, needs="settings"),
)


def examine(job: Job, checks: Sequence[Check], say: Callable[[str, Finding], None]) -> dict[str, Finding]:
    """What every check found, by its name; `say` gets each as it is found."""
    findings: dict[str, Finding] = {}
    missed: set[str] = set()  # failed or skipped
    for check in checks:
        if check.needs in missed:
            finding: Finding | None = warn(f"skipped: needs check {check.needs}", f"see check {check.needs}")
        else:
            finding = look(check, job)
        if finding is not None:
            missed |= {check.name} if check.needs in missed or finding.verdict == "fail" else set()
            findings[check.name] = finding
            say(check.name, finding)
    return findings


def look(check: Check, job: Job) -> Finding | None:
    """What the check found; its own failure to find anything is a finding too."""
    try:
        return check.look(job)
    except FusionError as error:
        return fail(error.message, error.remedy, ExitCode(error.code))
    except Exception as error:
        return fail(f"this check broke: {type(error).__name__}: {error}", "report it as a bug in Fusion", ExitCode.BUG)


def worst(findings: Sequence[Finding]) -> ExitCode:
    """The exit code of the worst failure; 0 when there is none."""
    codes = {finding.code for finding in findings if finding.verdict == "fail"}
    return next((code for code in WORST_FIRST if code in codes), ExitCode.BUG if codes else ExitCode.DONE)


def _print(name: str, finding: Finding) -> None:
    print(f"{finding.verdict:<5}{name:<12} {visible(finding.found)}", flush=True)
    if finding.remedy:
        print(f"{'':<17} hint: {visible(finding.remedy)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    width = max(len(check.name) for check in CHECKS)
    listed = "\n".join(f"  {check.name:<{width}}  {check.about}" for check in CHECKS)
    parser = Parser(
        "python jobs/doctor.py",
        description=__doc__,
        epilog=f"checks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", metavar="URL", help="bucket or folder of the input (default: FUSION_DATA, else data)")
    add("--output", metavar="URL", help="bucket or folder of the output (default: FUSION_OUTPUT, else output)")
    add("--variant", metavar="NAME", help="qwen_clip or all_embeddings: also look for its sources")
    add(f"{SOURCES}ROLE", metavar="NAME", action="append",
        help="source of a role of the --variant, as in training: --sources.clip-image cnn")  # fmt: skip
    add("--store-timeout", metavar="S", type=seconds, default=variable("FUSION_STORE_TIMEOUT") or "5",
        help="seconds to retry a store that does not answer (default: 5)")  # fmt: skip
    add(
        "--only",
        metavar="CHECK",
        nargs="+",
        choices=[check.name for check in CHECKS],
        help="not all of the checks below",
    )
    add("--json", action="store_true", help="JSON instead of lines")
    return parser


def _read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Job]:
    """The flags, and the job that they and the environment describe.

    Raises:
        UsageError: a flag, a variant or a role that does not exist.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    refuse_empty(given)
    storage.set_patience(given.store_timeout)
    if unknown and not unknown[0].startswith(SOURCES):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unknown and not given.variant:
        raise UsageError(f"{unknown[0]} is of a role, and roles are of a variant", "name it: --variant all_embeddings")
    if given.variant:
        config_class(given.variant, "train")  # is there one?
    typed = {"--output": given.output, "--data": given.data}
    flags = (*(word for name, value in typed.items() if value for word in (name, value)), *unknown)
    try:
        settings = read_settings(given.variant, flags)
        output, data = settings.output, settings.data
    except UsageError:
        raise
    except FusionError:  # the check of the settings says what is wrong with them
        output = given.output or variable("FUSION_OUTPUT") or "output"
        data = given.data or variable("FUSION_DATA") or "data"
    return given, Job(output, data, given.variant, flags)


def _job(argv: Sequence[str] | None) -> ExitCode:
    given, job = _read(argv)
    checks = [check for check in CHECKS if not given.only or check.name in given.only]
    findings = examine(job, checks, (lambda *_: None) if given.json else _print)
    if given.json:
        listed = [{"check": name, **asdict(finding)} for name, finding in findings.items()]
        sys.stdout.write(storage.as_json(listed).decode())
        return worst([*findings.values()])
    n_failed = sum(finding.verdict == "fail" for finding in findings.values())
    print(f"{n_failed} of {len(findings)} checks failed" if n_failed else "OK")
    return worst([*findings.values()])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    try:
        return guarded(lambda: _job(argv))
    except KeyboardInterrupt:
        print(FusionError("interrupted", "run the same command again").report(), file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
