"""jobs/control.py with scripts in place of kubectl and Slurm's commands: `pytest tests/jobs/test_control.py`.

test_slurm_outside.py tests it on a real Slurm, and tests/cluster on a real Kubernetes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion.jobs import control
from fusion.jobs.schedulers import kubernetes_sent, sent
from fusion.jobs.schedulers.sent import read_lines
from tests.jobs.test_slurm_wait import program
from tests.manifests import Object

ROOT = Path(__file__).parents[2]
CONFIG = {"current-context": "here", "contexts": [{"name": "here", "context": {"namespace": "fusion"}}]}
LABELS = {"app.kubernetes.io/part-of": "fusion"}
# A fake kubectl. `answers` maps the beginning of a command line to a list of outputs: each call removes and prints the
# first one, and the last one is printed again and again.
KUBECTL = """\
#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
with (folder / "asked").open("a") as asked:
    asked.write(" ".join(sys.argv[1:]) + "\\n")
answers = json.loads((folder / "answers").read_text())
words = [word for word in sys.argv[1:] if not word.startswith(("--context", "--namespace", "--request", "--ignore"))]
asked = " ".join(words)
key = max((key for key in answers if asked.startswith(key)), key=len, default=None)
if key is None:
    sys.exit("Error from server (NotFound): " + asked)
said = answers[key][0]
answers[key] = answers[key][1:] or answers[key]
(folder / "answers").write_text(json.dumps(answers))
sys.stdout.write(said if isinstance(said, str) else json.dumps(said) if said else "")
"""


class Kube:
    """A folder with the fake kubectl, and the answers that it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "kubectl").write_text(KUBECTL.format(python=sys.executable, folder=str(folder)))
        (folder / "kubectl").chmod(0o755)
        self.answers: dict[str, list[Object | str | None]] = {"config view": [CONFIG], "api-resources": ["jobsets.x\n"]}

    def give(self, **answers: Object | str | None) -> None:
        """Sets answers, by kind (jobs, pods, jobsets, events, job, jobset, pod) or by command (logs, delete)."""
        for word, answer in answers.items():
            asked = word if word in ("logs", "delete") else f"get {word} "
            self.answers[asked] = answer if isinstance(answer, list) else [answer]
        (self.folder / "answers").write_text(json.dumps(self.answers))

    def asked(self, word: str) -> list[str]:
        """The command lines so far that contain a word."""
        lines = (self.folder / "asked").read_text().splitlines()
        return [line for line in lines if f"{word} " in line]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kube:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kubernetes_sent, "POLL_STATE", 0.01)
    return Kube(tmp_path)


def job(name: str, kind: str = "Job", condition: str = "", reason: str = "", **spec: object) -> Object:
    conditions = [{"type": condition, "status": "True", "reason": reason}] if condition else []
    metadata = {"name": name, "labels": dict(LABELS), "creationTimestamp": "2999-01-02T03:04:05Z"}
    return {"kind": kind, "metadata": metadata, "spec": spec, "status": {"conditions": conditions}}


def pod(of: str, state: Object, number: int = 0, index: int = 0, label: str = "batch.kubernetes.io/job-name") -> Object:
    labels = {label: of, "batch.kubernetes.io/job-completion-index": str(index)}
    name = f"{of}-{index}-{number}"
    metadata = {"name": name, "uid": name, "labels": labels, "creationTimestamp": f"2999-01-02T03:04:{number:02}Z"}
    status = {"startTime": "2999-01-02T03:05:00Z", "containerStatuses": [{"name": "fusion", "state": state}]}
    return {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": f"node{number}"}, "status": status}


RUNS: Object = {"running": {"startedAt": "2999-01-02T03:05:00Z"}}


def ended(code: int, message: str = "") -> Object:
    return {"terminated": {"exitCode": code, "message": message, "finishedAt": "2999-01-02T03:06:00Z"}}


def listed(*found: Object) -> Object:
    return {"items": list(found)}


def test_jobs_and_jobsets_of_kubernetes_are_listed(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "no such\x1b[2J image"}}
    of_jobset = job("fusion-set-nodes-0")
    of_jobset["metadata"]["ownerReferences"] = [{"kind": "JobSet", "name": "fusion-set"}]
    old = job("fusion-old")
    old["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    going = job("fusion-going")
    going["metadata"]["deletionTimestamp"] = "2999-01-01T00:00:00Z"
    queued = job("fusion-queued", suspend=True)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "few"
    failed = job("fusion-b", condition="Failed", reason="PodFailurePolicy")
    late = job("fusion-late", condition="Failed", reason="DeadlineExceeded")
    kube.give(
        jobs=listed(
            *(job("fusion-a"), failed, late, job("fusion-c", condition="Complete"), job("fusion-d"), job("fusion-e")),
            *(going, queued, job("fusion-still", suspend=True), of_jobset, old),
        ),
        jobsets=listed(job("fusion-set", "JobSet")),
        pods=listed(
            pod("fusion-a", RUNS, 1), pod("fusion-a", ended(75), 0), pod("fusion-b", ended(65)), pod("fusion-d", waits),
            pod("fusion-set", RUNS, 2, label="jobset.sigs.k8s.io/jobset-name"),
        ),
    )  # fmt: skip
    assert control.main(["list", "--cluster=k8s", "--json"]) == 0
    found = {one["id"]: (one["state"], one["code"], one["why"]) for one in json.loads(capsys.readouterr().out)}
    assert found == {
        "job/fusion-a": ("running", None, "on node1, 1 pods ended before"),
        "job/fusion-b": ("failed", 65, "PodFailurePolicy"),
        "job/fusion-late": ("failed", 143, "DeadlineExceeded"),
        "job/fusion-c": ("finished", 0, ""),
        "job/fusion-d": ("waiting", None, "ImagePullBackOff: no such\x1b[2J image"),
        "job/fusion-e": ("waiting", None, "no pod yet"),
        "job/fusion-going": ("cancelled", None, "its pods are ending"),
        "job/fusion-queued": ("waiting", None, "in Kueue's queue few"),
        "job/fusion-still": ("waiting", None, "suspended"),
        "jobset/fusion-set": ("running", None, "on node2"),
    }
    assert control.main(["list", "--cluster=k8s"]) == 0
    assert r"no such\x1b[2J image" in capsys.readouterr().out


def test_jobsets_are_not_requested_from_a_cluster_without_them(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    kube.answers["api-resources"] = [""]
    kube.give(jobs=listed(job("fusion-a")), pods=listed())
    assert control.main(["list", "--cluster=k8s", "--context=here", "--namespace=mine"]) == 0
    assert "job/fusion-a" in capsys.readouterr().out
    assert not kube.asked("get jobsets")
    assert all("--context=here --namespace=mine" in line for line in kube.asked("get"))


def test_the_status_of_a_job_has_its_reason_and_last_line(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    message = "line\nerror: no \x1b[2Jcolumn\nhint: add it\n"
    kube.give(
        job=job("fusion-b", condition="Failed", reason="PodFailurePolicy"),
        pods=listed(pod("fusion-b", ended(65, message))),
    )
    assert control.main(["status", "fusion-b"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("job/fusion-b fusion-b: failed with exit code 65 (PodFailurePolicy)\n")
    assert out.endswith("  error: no \\x1b[2Jcolumn\n  hint: add it\n")
    kube.give(job=job("fusion-a"), pods=listed(pod("fusion-a", RUNS)), logs="epoch=3\n")
    assert control.main(["status", "job/fusion-a"]) == 0
    assert capsys.readouterr().out.endswith("  epoch=3\n")
    warnings = [
        {"reason": "FailedCreate", "message": text, "lastTimestamp": at} for at, text in (("2", "b"), ("1", "a"))
    ]
    kube.give(pods=listed(), events=listed(*warnings))
    assert control.main(["status", "job/fusion-a"]) == 0
    assert "waiting (FailedCreate: b)" in capsys.readouterr().out


@pytest.mark.parametrize("answers", [True, False])
def test_the_status_of_a_job_that_kueue_holds_back_says_why(
    answers: bool, kube: Kube, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = job("fusion-q", suspend=True)
    queued["metadata"] |= {"uid": "7", "labels": {**LABELS, "kueue.x-k8s.io/queue-name": "few"}}
    condition = {"type": "QuotaReserved", "status": "False", "message": "no quota for nvidia.com/gpu"}
    kube.give(job=queued, pods=listed())
    if answers:
        kube.give(workloads=listed({"metadata": {}, "status": {"conditions": [condition]}}))
    assert control.main(["status", "fusion-q"]) == 0
    why = ": no quota for nvidia.com/gpu" if answers else ""
    assert f"fusion-q: waiting (in Kueue's queue few{why})\n" in capsys.readouterr().out
    assert "--selector=kueue.x-k8s.io/job-uid=7" in kube.asked("get workloads")[0]


@pytest.mark.parametrize(
    ("ids", "code", "said"),
    [
        (["status", "job/none"], 65, "error: there is no job/none in namespace fusion\nhint: "),
        (["status", "cronjob/none"], 64, "error: cronjob/none is not the id of a job, expected job/NAME or jobset/"),
        (["cancel", "here/1"], 65, "error: no job here/1 runs on this machine\nhint: "),
        (["status", "here/x"], 65, "error: no job here/x runs on this machine\nhint: "),
        (["logs", "job/a", "--node=-1"], 64, "error: argument --node: expected 0 or more, found -1\n"),
        (["list", "--days=0"], 64, "error: argument --days: expected 1 or more, found 0\n"),
        (["list", "--settings=x"], 64, "error: --settings is for one cluster, and list asks all\nhint: "),
        (["status", "a", "--namespace="], 78, "error: --namespace is empty\n"),
        (["statos", "a"], 64, "error: "),
        ([], 64, "error: control expects a command: list, status, logs, cancel or wait\nhint: for example `python"),
    ],
)  # fmt: skip
def test_user_errors_are_named(
    ids: list[str], code: int, said: str, kube: Kube, capsys: pytest.CaptureFixture[str]
) -> None:
    kube.give(job=None)
    assert control.main(ids) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_log_is_followed_through_the_pods_of_a_job(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = pod("fusion-a", RUNS, 0), pod("fusion-a", RUNS, 1)
    oldest = pod("fusion-a", ended(75), 0)
    oldest["metadata"] |= {"uid": "before", "creationTimestamp": "2999-01-01T00:00:00Z"}
    done = job("fusion-a", condition="Complete")
    kube.give(
        job=[job("fusion-a"), job("fusion-a"), job("fusion-a"), done],
        pods=[listed(oldest, first), listed(oldest, first), listed(oldest, first, second)],
        # The first answer is for the last line in the status. Then the first pod's log breaks off twice while it runs.
        pod=[first, first, pod("fusion-a", ended(75), 0), None],
        logs=["b\n", "T1 a\nT2 b\n", "T2 b\nT3 c\x1b\n", "T3 c\x1b\n"],
    )
    kube.answers["logs fusion-a-0-1"] = ["T4 d\n"]
    kube.give()
    assert control.main(["logs", "--follow", "fusion-a"]) == 0
    assert capsys.readouterr().out == "a\nb\nc\\x1b\nd\n"
    assert ["--since-time=T2" in line for line in kube.asked("logs")][:3] == [False, False, True]


def test_following_a_waiting_job_says_why_it_waits(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    queued = job("fusion-a", suspend=True)
    kube.give(
        job=[queued, queued, job("fusion-a", condition="Complete")],
        pods=[listed(), listed(), listed(pod("fusion-a", RUNS))],
    )
    kube.give(logs="T1 a\n", pod=None)
    assert control.main(["logs", "--follow", "fusion-a"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\n", "job/fusion-a waits (suspended); its log follows\n")


def test_the_log_of_one_node_of_a_job_is_shown(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    kube.give(job=job("fusion-a"), pods=listed(pod("fusion-a", RUNS), pod("fusion-a", RUNS, 1, index=1)))
    kube.answers["logs fusion-a-1-1"] = ["T1 of node\t1\n"]
    kube.give()
    assert control.main(["logs", "fusion-a", "--node=1"]) == 0
    assert capsys.readouterr().out == "of node\t1\n"
    assert control.main(["logs", "fusion-a", "--node=2"]) == 69
    assert "job/fusion-a has no log yet (on node0, node1)" in capsys.readouterr().err


def test_a_job_that_has_ended_is_not_cancelled(kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    kube.give(job=[job("fusion-a"), job("fusion-a", condition="Complete")], pods=listed(), events=listed(), delete="ok")
    assert control.main(["cancel", "fusion-a"]) == 0
    assert control.main(["cancel", "fusion-a"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("job/fusion-a is asked to stop;") and out[1] == "job/fusion-a is finished already"
    assert [line.split("delete")[1] for line in kube.asked("delete")] == [
        " job fusion-a --wait=false --cascade=foreground"
    ]


# Rows of sacct; times are seconds since 1970, and the last column is how submitit called sbatch.
ROWS = """\
7|fusion-train-qwen-clip|FAILED|75:0|75:0|86400|86460|86461|n[1-2]|sbatch {folder}/.submission_file_ab.sh
7|fusion-train-qwen-clip|NODE_FAIL|0:0|0:0|86400|86460|86461|n[1-2]|sbatch {folder}/.submission_file_ab.sh
7|fusion-train-qwen-clip|RUNNING|0:0|0:0|86400|86460|Unknown|n[1-2]|sbatch {folder}/.submission_file_ab.sh
8|fusion-evaluate-qwen-clip|FAILED|65:0|65:0|86400|86460|86520|n1|sbatch {folder}/.submission_file_ab.sh
9_[0,2-3%1]|fusion-train|PENDING|0:0|0:0|86300|Unknown|Unknown|None assigned|sbatch {folder}/.submission_file_ab.sh
10|fusion-predict-qwen-clip|CANCELLED by 0|0:0|0:0|86200|86460|86520|n1|sbatch {folder}/.submission_file_ab.sh
11|other|RUNNING|0:0|0:0|86400|86460|Unknown|n1|sbatch mine.sh
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sent, "POLL_LOG", 0.01)
    monkeypatch.setattr(sent, "POLL_STATE", 0.01)
    (tmp_path / "rows").write_text(ROWS.format(folder=tmp_path))
    by_id = f'case "$*" in *--jobs=*) grep "^$(echo "$*" | sed \'s/.*--jobs=//\')|" {tmp_path}/rows || true ;;'
    program(tmp_path, "sacct", f"{by_id} *) cat {tmp_path}/rows ;; esac")
    queued = "fusion-train|PENDING|0:0|0:0|86300|N/A||(null)|Resources"
    rows = f"for id in 9_2 9_3; do echo \"$id|{queued}\"; done; echo '12|fusion-x{queued[6:]}'"
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    program(tmp_path, "squeue", f'case "$*" in *--jobs=*) {unknown} ;; *) {rows} ;; esac')
    program(tmp_path, "scancel", f'echo "$*" >> {tmp_path}/cancelled')
    return tmp_path


def test_jobs_of_slurm_are_listed(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control.main(["list", "--cluster=slurm", "--json"]) == 0
    found = {one["id"]: one for one in json.loads(capsys.readouterr().out)}
    assert {key: (one["state"], one["code"], one["why"]) for key, one in found.items()} == {
        "7": ("running", None, "on n[1-2], requeued 2 times"),
        "8": ("failed", 65, "FAILED"),
        "9_0": ("waiting", None, "PENDING"),
        "9_2": ("waiting", None, "PENDING, Resources"),
        "9_3": ("waiting", None, "PENDING, Resources"),
        "10": ("cancelled", 143, "CANCELLED"),
        "12": ("waiting", None, "PENDING, Resources"),  # sacct does not list it yet
    }
    assert (found["7"]["sent"], found["7"]["started"]) == ("1970-01-02T00:00:00Z", "1970-01-02T00:01:00Z")
    assert found["9_2"]["log"] == f"{slurm}/9_2_0_log.out"


def test_without_accounting_jobs_come_from_squeue(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(slurm, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    row = "7|fusion-train-qwen-clip|RUNNING|0:0|0:0|86400|86460||n1|None"
    program(slurm, "squeue", f"echo '{row}'")
    (slurm / "cluster.toml").write_text(f'folder = "{slurm}/logs"\n')
    assert control.main(["status", "7", f"--settings={slurm}/cluster.toml", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["why"], found["log"]) == ("running", "on n1", f"{slurm}/logs/7_0_log.out")


def test_the_status_of_a_slurm_job_ends_with_its_error(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm / "8_0_log.out").write_text("a\nerror: no \x1bcolumn\nhint: add it\nlast\n")
    (slurm / "7_0_log.out").write_text("a\nepoch=3\n\n")
    assert control.main(["status", "8", "7"]) == 0
    out = capsys.readouterr().out
    assert "  error: no \\x1bcolumn\n  hint: add it\n7 " in out and out.endswith("  epoch=3\n")
    assert control.main(["status", "99"]) == 65


def test_the_log_of_a_slurm_job_is_followed_until_it_has_ended(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control.main(["logs", "7"]) == 65
    assert "there is no log" in capsys.readouterr().err
    log = slurm / "7_1_log.out"

    def work() -> None:
        time.sleep(0.1)
        log.write_text("one\ntw")
        time.sleep(0.1)
        with log.open("a") as file:
            file.write("o\x1b\nlast")
        (slurm / "rows").write_text(
            ROWS.format(folder=slurm).replace("7|fusion-train-qwen-clip|RUNNING", "7|fusion|COMPLETED")
        )

    worker = threading.Thread(target=work)
    worker.start()
    assert control.main(["logs", "7", "--node=1", "--follow"]) == 0
    worker.join()
    assert capsys.readouterr().out == "one\ntwo\\x1b\nlast\n"


def test_slurm_jobs_are_cancelled(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control.main(["cancel", "7", "8"]) == 0
    assert (slurm / "cancelled").read_text() == "7\n"
    assert "8 is failed already" in capsys.readouterr().out


def test_an_unreachable_slurm_does_not_hide_jobs_of_other_clusters(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(slurm, "sacct", "echo 'sacct: fatal: Connection refused' >&2; exit 1")
    monkeypatch.setattr(control, "PROGRAMS", {"slurm": "squeue", "local": "sh"})
    control.main(["list"])
    said = capsys.readouterr()
    assert "jobs" in said.out.lower() and "error: sacct does not answer: sacct: fatal: Connection refused" in said.err
    assert control.main(["list", "--cluster=slurm"]) == 69


def test_a_missing_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no log"):
        list(read_lines(tmp_path / "none"))


def test_a_job_on_this_machine_is_found_in_proc(
    tmp_path: Path, catalog: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), "--epochs=900", "--patience=900", "--device=cpu"]
    command = [sys.executable, "jobs/submit.py", "--cluster=local", "--variant=qwen_clip", "--nproc-per-node=1", "--"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *flags, "--width=16"], cwd=ROOT, stderr=log)
        with process:
            deadline = time.monotonic() + 120
            while not (found := of(process.pid, capsys)) or "event=" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.2)
            (job,) = found
            assert (job["name"], job["state"], job["log"]) == ("fusion-train-qwen-clip", "running", f"{tmp_path}/log")
            assert control.main(["logs", job["id"]]) == 0 and "event=" in capsys.readouterr().out
            assert control.main(["wait", job["id"]]) == 64
            assert control.main(["cancel", job["id"]]) == 0
            assert process.wait(60) == 75
    assert control.main(["status", job["id"]]) == 65


def of(parent: int, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The jobs on this machine that a process has started."""
    capsys.readouterr()
    assert control.main(["list", "--cluster=local", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return [one for one in found if f" {parent} " in (Path("/proc") / one["id"][5:] / "stat").read_text()]
