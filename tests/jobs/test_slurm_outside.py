"""Jobs on a real Slurm that are preempted or cancelled, lose their node or exceed their time, and jobs/control.py.

`pytest tests/jobs/test_slurm_outside.py`. The jobs run at the same time, with a script in place of the training;
test_slurm.py sends stop signals to a real training.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Done
from tests.jobs.test_slurm import ROOT, Submit, ended, wait_for
from tests.services import require
from tests.slurm_cluster import NODES, SlurmCluster, install

# Runs until it is asked to stop, or ends with 0 when the job has been restarted `restarts` times.
LAUNCHER = """\
#!/bin/bash
trap 'echo asked to stop; exit 75' USR2 TERM
{first}
echo "start ${{SLURM_RESTART_COUNT:-0}} on $SLURMD_NODENAME: $*"
[ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ] && exit 0
while :; do sleep 0.2; done
"""


class Meanwhile:
    """Jobs that run at the same time; each has settings and a launcher of its own."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.submits: dict[str, Submit] = {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.ids: dict[str, list[str]] = {}

    def send(self, name: str, *flags: str, restarts: int, settings: str = "", node: int = 0, first: str = "") -> None:
        folder = self.folder / name
        folder.mkdir()
        launcher = folder / "python"
        launcher.write_text(LAUNCHER.format(restarts=restarts, first=first))
        launcher.chmod(0o755)
        submit = self.submits[name] = Submit(self.cluster, folder, {})
        text = submit.settings.read_text().replace(sys.executable, str(launcher))
        where = "" if "sbatch" in settings else f'sbatch = {{ nodelist = "{NODES[node]}" }}\n'
        submit.settings.write_text(
            f"{where}{settings}{text.replace('time_minutes = 10', '') if 'time' in settings else text}"
        )
        process = self.processes[name] = submit("--wait", *flags)
        self.ids[name] = []
        while len(self.ids[name]) < (3 if "--each-fold" in flags else 1):
            assert process.stdout
            line = process.stdout.readline()
            found = re.match(r"submitted (\S+)", line)
            assert found, line + process.stdout.read()
            self.ids[name].append(found[1])

    def log(self, name: str, task: int = 0) -> str:
        path = self.submits[name].folder / "logs" / f"{self.ids[name][task]}_0_log.out"
        return path.read_text() if path.exists() else ""

    def control(self, *arguments: str) -> Done:
        """`jobs/control.py` without the settings that the jobs were sent with."""
        command = [sys.executable, "jobs/control.py", *arguments]
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)

    def status(self, name: str, task: int = 0) -> dict[str, Any]:
        done = self.control("status", "--json", self.ids[name][task])
        assert done.code == 0, done.err
        (found,) = json.loads(done.out)
        return dict(found)

    def recorded(self, name: str, what: str) -> str:
        """Columns of sacct for a job."""
        job_id = self.ids[name][0]
        return self.cluster.run(
            "sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", f"--format={what}"
        )


@pytest.fixture(scope="module")
def meanwhile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meanwhile]:
    require(install(), "Slurm (root, and Debian's slurm-wlm, slurmdbd, munge and mariadb-server)")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    sent = Meanwhile(cluster, tmp_path_factory.mktemp("jobs"))
    try:
        limit = "time_minutes = 3\nsignal_seconds = 90\n"  # the shortest that settings allow
        sent.send("limit", restarts=1, settings=limit)
        deaf = f'sbatch = {{ nodelist = "{NODES[0]}", time = "1" }}\n'
        sent.send("deaf", restarts=1, settings=deaf, first="trap '' USR2 TERM")
        sent.send("array", "--each-fold", "--", "--folds=3", restarts=1)
        sent.send("moved", "--queue=cheap", restarts=2, node=1)
        other = 'constraint = "big"\npartition = "urgent"\nsbatch = { comment = "other" }\nsetup = ["export A=b"]\n'
        sent.send("other", "--priority=high", restarts=0, settings=other, first='echo "A is $A"')
        yield sent
    finally:
        for process in sent.processes.values():
            with process:
                process.kill()
        cluster.stop()


def test_other_settings_reach_slurm(meanwhile: Meanwhile) -> None:
    done = ended(meanwhile.processes["other"])
    assert done.code == 0, done.out + meanwhile.log("other")
    assert meanwhile.recorded("other", "Partition,QOS,NodeList,State") == f"urgent|high|{NODES[1]}|COMPLETED"
    assert "A is b" in meanwhile.log("other")
    shown = meanwhile.status("other")
    assert (shown["state"], shown["code"], shown["said"]) == ("finished", 0, meanwhile.log("other").splitlines()[-1])
    assert Path(shown["log"]).read_text() == meanwhile.log("other"), "found without its settings"


def test_a_task_of_an_array_is_cancelled_alone(meanwhile: Meanwhile) -> None:
    wait_for(lambda: all("start 0" in meanwhile.log("array", task) for task in (0, 1)), "two tasks")
    first, second, third = meanwhile.ids["array"]
    listed = {job["id"]: job for job in json.loads(meanwhile.control("list", "--cluster=slurm", "--json").out)}
    assert {first, second, third, *meanwhile.ids["limit"]} <= set(listed)
    assert meanwhile.control("logs", first.partition("_")[0]).code == 64
    assert "--fold 1" in meanwhile.control("logs", second).out
    assert meanwhile.control("cancel", second).out.startswith(f"{second} is asked to stop")
    wait_for(lambda: meanwhile.status("array", 1)["state"] == "cancelled", "its end")
    assert meanwhile.status("array", 0)["state"] == "running"
    for task in (first, third):  # the others are requeued, and end with 0 after the restart
        wait_for(lambda task=task: "start 0" in meanwhile.log("array", int(task[-1])), task)
        meanwhile.cluster.run("scancel", "--signal=USR2", task)
    done = ended(meanwhile.processes["array"])
    assert done.code == 143, done.out
    assert [meanwhile.status("array", task)["code"] for task in range(3)] == [0, 143, 0]


def test_a_job_is_requeued_after_a_preemption_and_after_the_loss_of_its_node(meanwhile: Meanwhile) -> None:
    cluster, (job_id,) = meanwhile.cluster, meanwhile.ids["moved"]
    wait_for(lambda: "start 0" in meanwhile.log("moved"), "its start")
    assert meanwhile.recorded("moved", "Partition") == "cheap"
    cluster.run(
        "sbatch",
        "--partition=urgent",
        f"--nodelist={NODES[1]}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 1",
    )
    wait_for(lambda: "start 1" in meanwhile.log("moved"), "its start after the preemption")
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    wait_for(lambda: meanwhile.status("moved")["state"] == "waiting", "its place in the queue")
    assert "DOWN" in cluster.run("sinfo", "--noheader", f"--nodes={NODES[1]}", "--format=%T").upper()
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
    done = meanwhile.control("wait", job_id)
    assert done.code == 0 == ended(meanwhile.processes["moved"]).code, done.out
    assert meanwhile.status("moved")["why"] == "requeued 2 times"
    assert re.findall(r"^start (\d)", meanwhile.log("moved"), re.MULTILINE) == ["0", "1", "2"]


def test_a_time_limit_leads_to_a_requeue(meanwhile: Meanwhile) -> None:
    followed = meanwhile.control("logs", "--follow", *meanwhile.ids["limit"])
    done = ended(meanwhile.processes["limit"])
    assert done.code == 0, done.out + meanwhile.log("limit")
    assert meanwhile.log("limit").count("asked to stop") == 1
    assert meanwhile.log("limit").count("stopped on request, requeued") == 1
    assert re.findall(r"^start (\d)", followed.out, re.MULTILINE) == ["0", "1"], (
        "the log is followed through the requeue"
    )


def test_a_job_that_ignores_signals_ends_with_143_at_its_time_limit(meanwhile: Meanwhile) -> None:
    done = ended(meanwhile.processes["deaf"])
    assert done.code == 143, done.out
    assert "TIMEOUT with exit code 143" in done.out
    shown = meanwhile.status("deaf")
    assert (shown["state"], shown["code"], shown["why"]) == ("failed", 143, "TIMEOUT")
