"""The batch script of a job, under bash and with stand-ins for Slurm: `pytest tests/jobs/test_slurm_script.py`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from jobs.schedulers import slurm
from jobs.schedulers.description import Job
from jobs.schedulers.slurm_settings import Cluster

# As Slurm's: a signal reaches all steps of a job, and ends a `sleep`; srun ends with 128 + the signal.
SRUN = """\
#!/bin/bash
case "$*" in *--overlap*) echo $$ > listener; {listener} ;; esac
echo "$*" >> tries
{launcher}
"""
SCONTROL = '#!/bin/bash\n{first}\necho "$*" >> requeued\n'
SLEEP = "#!/bin/bash\n[ -e at_pause ] && . ./at_pause\nexit 0\n"  # no test waits for a pause
# Returns once the shell of the job knows how the listener ended.
SIGNAL_STEPS = """\
until [ -s listener ]; do :; done
kill -USR2 $(cat listener) 2> /dev/null
while kill -0 $(cat listener) 2> /dev/null; do :; done
"""


# Writes down each command that bash is about to run, and gives the signal before the one of a number.
COUNT = "set -T; n=0; trap 'n=$((n + 1)); echo \"$BASH_COMMAND\" >> moments; [ $n -ne {moment} ] || . ./signal' DEBUG"


@dataclass(frozen=True)
class Ended:
    code: int
    log: str
    tries: int
    requeued: str


class Script:
    """A rendered script in a folder of its own, whose commands come from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = "exec /bin/sleep infinity"
        self.scontrol = ""
        self.cluster = Cluster(folder=str(folder), gpus_per_node=0)

    def run(self, launcher: str, at_pause: str = "", setup: tuple[str, ...] = (), jobs: int = 1) -> Ended:
        self._write("srun", SRUN.format(listener=self.listener, launcher=launcher))
        self._write("scontrol", SCONTROL.format(first=self.scontrol))
        self._write("sleep", SLEEP)
        if at_pause:
            (self.folder / "at_pause").write_text(at_pause)
        sent = [Job("all_embeddings", "train"), Job("qwen_clip", "train")][:jobs]
        (self.folder / "script").write_text(slurm.render(sent, replace(self.cluster, setup=setup), max_requeues=3))
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", "script"],
            check=False,
            cwd=self.folder,
            env=environment,
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
            timeout=10,
        )
        return Ended(done.returncode, done.stdout, self._lines("tries"), self._text("requeued"))

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def _lines(self, name: str) -> int:
        return len(self._text(name).splitlines())


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_a_failure_that_may_pass_is_tried_three_times(script: Script) -> None:
    ended = script.run("exit 69")
    assert (ended.code, ended.tries, ended.requeued) == (69, 3, "")


def test_a_failure_that_stays_is_tried_once(script: Script) -> None:
    ended = script.run("exit 65")
    assert (ended.code, ended.tries, ended.requeued) == (65, 1, "")


def test_a_stop_request_between_two_tries_requeues_the_job(script: Script) -> None:
    ended = script.run("exit 69", at_pause=SIGNAL_STEPS)
    assert (ended.code, ended.tries, ended.requeued) == (75, 1, "requeue 7\n"), ended.log


@pytest.mark.parametrize("signalled", ["kill -USR2 $$", SIGNAL_STEPS], ids=["shell", "steps"])
def test_a_stop_request_before_the_first_try_requeues_the_job(script: Script, signalled: str) -> None:
    ended = script.run("exit 0", setup=(signalled,))
    assert (ended.code, ended.tries, ended.requeued) == (75, 0, "requeue 7\n"), ended.log


def test_a_stop_request_while_the_launcher_starts_requeues_the_job(script: Script) -> None:
    """Also in the last try: the signal ends a Python that has no handler yet."""
    third = f"[ $(wc -l < tries) -lt 3 ] && exit 69; {SIGNAL_STEPS}kill -USR2 $$"
    ended = script.run(third)
    assert (ended.code, ended.tries, ended.requeued) == (75, 3, "requeue 7\n"), ended.log


def moments(folder: Path) -> list[int]:
    """When each command of the script is run for the first and the last time, where its launcher ends with 69."""
    Script(folder).run("exit 69", setup=(COUNT.format(moment=0),))
    commands = dict.fromkeys((folder / "moments").read_text().splitlines())
    lines = (folder / "moments").read_text().splitlines()
    last = {command: len(lines) - lines[::-1].index(command) for command in commands}
    return sorted({*last.values(), *(lines.index(command) + 1 for command in commands)})


def signalled(folder: Path, signal: str) -> dict[int, Ended]:
    """How the job ends by the moment in which it gets a signal, where its launcher ends with 69."""
    (folder / "all").mkdir()
    ended = {}
    for number in moments(folder / "all"):
        own = folder / str(number)
        own.mkdir()
        (own / "signal").write_text(signal)
        ended[number] = Script(own).run("exit 69", setup=(COUNT.format(moment=number),))
    return ended


def test_a_job_that_slurm_ends_is_never_requeued_by_itself(tmp_path: Path) -> None:
    """Its shell gets SIGTERM, whatever it does at that moment: Slurm decides what becomes of the job."""
    ended = signalled(tmp_path, f"kill -TERM $$\n{SIGNAL_STEPS}")
    assert {(one.code in (69, 75), one.requeued) for one in ended.values()} == {(True, "")}
    assert {one.tries for one in ended.values()} == {0, 1, 2, 3}


def test_a_stop_request_counts_in_every_moment(tmp_path: Path) -> None:
    """Until all tries are over, the job is requeued; from then on it ends as they did."""
    ended = signalled(tmp_path, SIGNAL_STEPS)
    for number, one in ended.items():
        expected = {(75, "requeue 7\n")} if one.tries < 3 else {(75, "requeue 7\n"), (69, "")}
        assert (one.code, one.requeued) in expected, (number, one)
    assert {one.tries for one in ended.values()} == {0, 1, 2, 3}
    codes = [one.code for one in ended.values()]
    assert len(codes) > 30 and codes == sorted(codes, reverse=True), codes


@pytest.mark.parametrize("code", [0, 65])
def test_a_stop_request_does_not_hide_how_the_work_ended(script: Script, code: int) -> None:
    ended = script.run(f"{SIGNAL_STEPS}exit {code}")
    assert (ended.code, ended.tries, ended.requeued) == (code, 1, "")


def test_a_requeue_outlasts_a_controller_that_restarts(script: Script) -> None:
    script.scontrol = "[ -e away ] || { touch away; exit 1; }"
    ended = script.run("exit 75")
    assert (ended.code, ended.requeued) == (75, "requeue 7\n"), ended.log
    assert "error:" not in ended.log


def test_a_requeue_that_is_refused_is_said(script: Script) -> None:
    script.scontrol = "exit 1"
    ended = script.run("exit 75")
    assert ended.code == 75
    assert "error: stopped on request, and not requeued after 0 requeues\nhint: submit it again" in ended.log


def test_a_job_that_is_cancelled_between_two_tries_is_not_requeued(script: Script) -> None:
    ended = script.run("exit 69", at_pause=f"kill -TERM $PPID; {SIGNAL_STEPS}")
    assert (ended.code, ended.tries, ended.requeued) == (69, 1, ""), ended.log


def test_where_no_step_can_listen_failures_are_tried_again_all_the_same(script: Script) -> None:
    script.listener = "exit 1"
    ended = script.run("exit 69")
    assert (ended.code, ended.tries, ended.requeued) == (69, 3, "")


@pytest.mark.parametrize(
    "line",
    ["false  # module load cuda", "false \\", "echo 'unbalanced", "true && false", "cd /nowhere 2> /dev/null; false"],
)
def test_a_line_of_setup_that_fails_ends_the_job(script: Script, line: str) -> None:
    ended = script.run("exit 0", setup=(line,))
    assert (ended.code, ended.tries) == (78, 0), ended.log
    assert f"error: the setup failed at: {line}\nhint: " in ended.log


def test_what_setup_exports_reaches_the_launcher(script: Script) -> None:
    ended = script.run('echo "$A $B" > seen', setup=("export A='a b'  # as in a module", "declare -x B=2"))
    assert (ended.code, (script.folder / "seen").read_text()) == (0, "a b 2\n")
