"""The batch script of a job, run by bash with fake commands of Slurm: `pytest tests/jobs/test_slurm_script.py`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from fusion.jobs.schedulers import slurm
from fusion.jobs.schedulers.description import Job
from fusion.jobs.schedulers.slurm_settings import Cluster

# A fake srun. As with Slurm's, a signal to the steps of a job ends the listener's `sleep`, and srun with 128 + signal.
SRUN = """\
#!/bin/bash
case "$*" in *--overlap*) echo $$ > listener; {listener} ;; esac
echo "$*" >> tries
{launcher}
"""
SCONTROL = '#!/bin/bash\n{first}\necho "$*" >> requeued\n'
SQUEUE = "#!/bin/bash\necho {state}\n"
SLEEP = "#!/bin/bash\n[ -e at_pause ] && . ./at_pause\nexit 0\n"  # ends at once, so that tests are quick
# Sends a stop signal to the listener, and returns when that has ended.
SIGNAL_STEPS = """\
until [ -s listener ]; do :; done
kill -USR2 $(cat listener) 2> /dev/null
while kill -0 $(cat listener) 2> /dev/null; do :; done
"""


# Appends each command that bash is about to run to `moments`, and runs `signal` before the command with this number.
COUNT = "set -T; n=0; trap 'n=$((n + 1)); echo \"$BASH_COMMAND\" >> moments; [ $n -ne {moment} ] || . ./signal' DEBUG"


@dataclass(frozen=True)
class Ended:
    code: int
    log: str
    tries: int
    requeued: str


class Script:
    """A rendered batch script in a folder of its own, which also has the fake commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = "exec /bin/sleep infinity"
        self.scontrol, self.state = "", "RUNNING"
        self.cluster = Cluster(folder=str(folder), gpus_per_node=0)

    def run(self, launcher: str, at_pause: str = "", setup: tuple[str, ...] = (), jobs: int = 1) -> Ended:
        self._write("srun", SRUN.format(listener=self.listener, launcher=launcher))
        self._write("scontrol", SCONTROL.format(first=self.scontrol))
        self._write("squeue", SQUEUE.format(state=self.state))
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


def test_an_unreachable_store_is_tried_three_times(script: Script) -> None:
    ended = script.run("exit 69")
    assert (ended.code, ended.tries, ended.requeued) == (69, 3, "")


def test_bad_data_is_not_tried_again(script: Script) -> None:
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
    """Also in the last try. The signal ends Python before it has a handler."""
    third = f"[ $(wc -l < tries) -lt 3 ] && exit 69; {SIGNAL_STEPS}kill -USR2 $$"
    ended = script.run(third)
    assert (ended.code, ended.tries, ended.requeued) == (75, 3, "requeue 7\n"), ended.log


def moments(folder: Path) -> list[int]:
    """Numbers of the first and the last execution of each command of a script whose launcher ends with 69."""
    Script(folder).run("exit 69", setup=(COUNT.format(moment=0),))
    commands = dict.fromkeys((folder / "moments").read_text().splitlines())
    lines = (folder / "moments").read_text().splitlines()
    last = {command: len(lines) - lines[::-1].index(command) for command in commands}
    return sorted({*last.values(), *(lines.index(command) + 1 for command in commands)})


def signalled(folder: Path, signal: str) -> dict[int, Ended]:
    """How a job whose launcher ends with 69 ends, by the number of the command before which it gets a signal."""
    (folder / "all").mkdir()
    ended = {}
    for number in moments(folder / "all"):
        own = folder / str(number)
        own.mkdir()
        (own / "signal").write_text(signal)
        ended[number] = Script(own).run("exit 69", setup=(COUNT.format(moment=number),))
    return ended


def test_a_job_that_slurm_ends_does_not_requeue_itself(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to the shell at any moment, and decides itself whether to requeue the job."""
    ended = signalled(tmp_path, f"kill -TERM $$\n{SIGNAL_STEPS}")
    assert {(one.code in (69, 75), one.requeued) for one in ended.values()} == {(True, "")}
    assert {one.tries for one in ended.values()} == {0, 1, 2, 3}


def test_a_stop_request_is_noticed_at_every_moment(tmp_path: Path) -> None:
    """The job is requeued if tries are left. After the last try it may also end with that try's code."""
    ended = signalled(tmp_path, SIGNAL_STEPS)
    for number, one in ended.items():
        expected = {(75, "requeue 7\n")} if one.tries < 3 else {(75, "requeue 7\n"), (69, "")}
        assert (one.code, one.requeued) in expected, (number, one)
    assert {one.tries for one in ended.values()} == {0, 1, 2, 3}
    codes = [one.code for one in ended.values()]
    assert len(codes) > 30 and codes == sorted(codes, reverse=True), codes


@pytest.mark.parametrize("code", [0, 65])
def test_a_stop_request_does_not_replace_a_final_exit_code(script: Script, code: int) -> None:
    ended = script.run(f"{SIGNAL_STEPS}exit {code}")
    assert (ended.code, ended.tries, ended.requeued) == (code, 1, "")


def test_a_requeue_is_repeated_while_the_controller_restarts(script: Script) -> None:
    script.scontrol = "[ -e away ] || { touch away; exit 1; }"
    ended = script.run("exit 75")
    assert (ended.code, ended.requeued) == (75, "requeue 7\n"), ended.log
    assert "error:" not in ended.log


def test_a_refused_requeue_is_an_error(script: Script) -> None:
    script.scontrol = "exit 1"
    ended = script.run("exit 75")
    assert ended.code == 75
    assert "error: stopped on request, and not requeued after 0 requeues\nhint: submit the job again" in ended.log


def test_a_job_that_is_cancelled_between_two_tries_is_not_requeued(script: Script) -> None:
    ended = script.run("exit 69", at_pause=f"kill -TERM $PPID; {SIGNAL_STEPS}")
    assert (ended.code, ended.tries, ended.requeued) == (69, 1, ""), ended.log


def test_a_job_that_is_cancelled_is_not_requeued_before_the_shell_hears_of_it(script: Script) -> None:
    script.state = "COMPLETING"
    ended = script.run("exit 75")
    assert (ended.code, ended.tries, ended.requeued) == (75, 1, ""), ended.log
    assert "error:" not in ended.log


def test_a_job_is_not_requeued_if_the_signal_of_its_end_also_ends_squeue(script: Script) -> None:
    script.state = "$(kill -TERM $(ps -o ppid= $PPID))"
    ended = script.run("exit 75")
    assert (ended.code, ended.tries, ended.requeued) == (75, 1, ""), ended.log


def test_failures_are_tried_again_without_a_listener(script: Script) -> None:
    script.listener = "exit 1"
    ended = script.run("exit 69")
    assert (ended.code, ended.tries, ended.requeued) == (69, 3, "")


@pytest.mark.parametrize(
    "line",
    ["false  # module load cuda", "false \\", "echo 'unbalanced", "true && false", "cd /nowhere 2> /dev/null; false"],
)
def test_a_failing_line_of_setup_ends_the_job(script: Script, line: str) -> None:
    ended = script.run("exit 0", setup=(line,))
    assert (ended.code, ended.tries) == (78, 0), ended.log
    assert f"error: the setup failed at: {line}\nhint: " in ended.log


def test_variables_exported_in_setup_reach_the_launcher(script: Script) -> None:
    ended = script.run('echo "$A $B" > seen', setup=("export A='a b'  # as in a module", "declare -x B=2"))
    assert (ended.code, (script.folder / "seen").read_text()) == (0, "a b 2\n")
