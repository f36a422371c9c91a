"""jobs/submit.py --cluster k8s when the cluster returns errors: `pytest tests/jobs/test_submit_kubernetes_wait.py`.

A fake kubectl prints the answers, which are copied from those of a real one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fusion.errors import ConfigError, CredentialsError, FusionError, UnreachableError
from fusion.jobs.schedulers import kubernetes, kubernetes_wait
from fusion.jobs.schedulers.description import Job
from fusion.jobs.schedulers.kubectl import Kubectl, error_from
from tests.manifests import Object

NAME = "fusion-train-qwen-clip"
LEADER = "Error from server: etcdserver: leader changed"
REFUSED = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
LOGGED_OUT = "error: You must be logged in to the server (the server has asked for the client to provide credentials)"
# Each call prints the next folder of answers; the last one is printed again and again.
PROGRAM = """\
#!/bin/sh
cd {folder}
printf '%s\\n' "$*" >> asked
cat > sent
answer=$(ls -d answer-* | head -1)
cat $answer/out; cat $answer/err >&2; code=$(cat $answer/code)
[ $(ls -d answer-* | wc -l) -eq 1 ] || rm -r $answer
exit $code
"""


class Answers:
    """The answers of the fake kubectl, call by call: objects, or the message of a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "kubectl").write_text(PROGRAM.format(folder=folder))
        (folder / "kubectl").chmod(0o755)

    def give(self, *answers: Object | str | None) -> None:
        for index, answer in enumerate(answers):
            failed = isinstance(answer, str) and not answer.startswith("job.batch")
            said = answer if isinstance(answer, str) else json.dumps(answer) if answer is not None else ""
            folder = self.folder / f"answer-{index:03}"
            folder.mkdir()
            for name, text in (("out", "" if failed else said), ("err", said if failed else ""), ("code", int(failed))):
                (folder / name).write_text(str(text))

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setattr(kubernetes_wait, "POLL", 0.01)
    monkeypatch.setattr(kubernetes, "RETRY_PAUSE", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Answers(tmp_path)


def job(reason: str = "", kind: str = "Failed", suspend: bool = False, labels: dict[str, str] | None = None) -> Object:
    """A Job that has ended with this reason; without a reason, one that has not ended."""
    condition = {"type": kind, "status": "True", "reason": reason, "message": "as the controller says"}
    metadata = {"name": NAME, "labels": labels or {}}
    return {"metadata": metadata, "spec": {"suspend": suspend}, "status": {"conditions": [condition] if reason else []}}


def pods(*codes: int) -> Object:
    states = [{"terminated": {"exitCode": code, "finishedAt": f"2026-01-0{n + 1}"}} for n, code in enumerate(codes)]
    return {"items": [{"status": {"containerStatuses": [{"state": state}]}} for state in states]}


COMPLETE = job("Completed", "Complete")


def wait() -> int:
    return kubernetes_wait.wait([NAME], Kubectl("here", "fusion"))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("The connection to the server localhost:8080 was refused", 69),
        (REFUSED, 69),
        (LEADER, 69),
        ("Error from server (ServiceUnavailable): the server is currently unable to handle the request", 69),
        ("Error from server (TooManyRequests): the server has received too many requests", 69),
        ("Error from server (Timeout): the server was unable to return a response in the time allotted", 69),
        ('Error from server (InternalError): failed calling webhook "x": connect: connection refused', 69),
        ("Unable to connect to the server: net/http: TLS handshake timeout", 69),
        ("Unable to connect to the server: context deadline exceeded", 69),
        (LOGGED_OUT, 77),
        ("error: You must be logged in to the server (Unauthorized)", 77),
        ("Unable to connect to the server: getting credentials: exec: executable aws failed with exit code 255", 77),
        ('Unable to connect to the server: failed to refresh token: oauth2: "invalid_grant"', 77),
        ('Error from server (Forbidden): jobs.batch is forbidden: User "ada" cannot create resource "jobs"', 77),
        ('Error from server (Forbidden): jobs.batch "a" is forbidden: exceeded quota: few, requested: 1, used: 1', 78),
        (
            'Error from server (Forbidden): error when creating "STDIN": admission webhook "x" denied the request: no',
            78,
        ),
        ('Error from server: error when creating "STDIN": admission webhook "x" denied the request: no', 78),
        ("Unable to connect to the server: tls: failed to verify certificate: x509: signed by unknown authority", 78),
        ("The Job is invalid: spec.completions: Required value", 78),
        ('error: context "gone" does not exist', 78),
    ],
)
def test_errors_of_kubectl_have_exit_codes(said: str, code: int) -> None:
    assert error_from(f"E1126 memcache.go:265] couldn't get current server API group list\n{said}").code == code


def test_every_call_names_the_context_and_namespace_at_submission(answers: Answers) -> None:
    contexts = [
        {"name": "there", "context": {"namespace": "other"}},
        {"name": "here", "context": {"namespace": "mine"}},
    ]
    config = {"current-context": "here", "contexts": contexts}
    answers.give(config, config, None, "job.batch/x created", COMPLETE)
    assert Kubectl.now("given") == Kubectl("here", "given")
    kubectl = Kubectl.now(None)
    kubernetes_wait.wait(kubernetes.submit([Job("qwen_clip", "train")], None, kubectl), kubectl)
    _, _, *calls = answers.asked()
    assert len(calls) == 3
    assert all(call.startswith("--context=here --namespace=mine ") for call in calls)


def test_in_a_pod_no_context_is_named(answers: Answers) -> None:
    answers.give({"current-context": "", "contexts": None}, COMPLETE)
    assert Kubectl.now(None) == Kubectl()
    assert kubernetes_wait.wait([NAME], Kubectl()) == 0
    assert answers.asked()[1].startswith("get job ")


@pytest.mark.parametrize("said", [LEADER, REFUSED, LOGGED_OUT, "Error from server (Forbidden): RBAC is not ready"])
def test_a_wait_continues_when_the_cluster_answers_again(
    said: str, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.give(job(), said, said, said, COMPLETE)
    assert wait() == 0
    out = capsys.readouterr().out
    assert out.count("retrying for up to 300 s") == 1
    assert said in out


@pytest.mark.parametrize(("said", "kind"), [(REFUSED, UnreachableError), (LOGGED_OUT, CredentialsError)])
def test_a_wait_ends_when_the_cluster_stays_unreachable(
    said: str, kind: type[FusionError], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_wait, "RETRY_SECONDS", 0.1)
    answers.give(said)
    with pytest.raises(kind):
        wait()
    assert len(answers.asked()) > 1


def test_submission_is_retried_while_etcd_elects_a_leader(answers: Answers) -> None:
    answers.give(LEADER, None, LEADER, None, "job.batch/x created")
    assert kubernetes.submit([Job("qwen_clip", "train")], None, Kubectl()) == [NAME]


def test_a_job_that_is_being_deleted_is_sent_again_afterwards(answers: Answers) -> None:
    going = job()
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    answers.give(going, going, None, "job.batch/x created")
    assert kubernetes.submit([Job("qwen_clip", "train")], None, Kubectl()) == [NAME]


@pytest.mark.parametrize("said", [REFUSED, LOGGED_OUT])
def test_permanent_errors_are_not_retried(said: str, answers: Answers) -> None:
    answers.give(said)
    with pytest.raises(FusionError):
        kubernetes.submit([Job("qwen_clip", "train")], None, Kubectl())
    assert len(answers.asked()) == 1


def test_a_job_that_exceeds_its_deadline_ends_with_143(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.give(job("DeadlineExceeded"), pods(69))
    assert wait() == 143
    assert capsys.readouterr().out == (
        f"job/{NAME} failed with exit code 143: DeadlineExceeded: as the controller says\n"
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (pods(), ""),
        ('Error from server (Forbidden): User "ada" cannot list resource "pods"', "how its pods ended is not known: "),
    ],
)
def test_a_job_whose_pods_cannot_be_read_fails_with_1(
    answer: Object | str,
    said: str,
    answers: Answers,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kubernetes_wait, "RETRY_SECONDS", 0.0)
    answers.give(job("BackoffLimitExceeded"), answer)
    assert wait() == 1
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert out.endswith(f"job/{NAME} failed with exit code 1: BackoffLimitExceeded: as the controller says\n")


def test_the_exit_code_is_that_of_the_last_failure(answers: Answers) -> None:
    answers.give(job("BackoffLimitExceeded"), pods(69, 124, 0))
    assert wait() == 124


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({}, f"job/{NAME} is suspended\nhint: to resume it: kubectl --namespace=fusion patch job {NAME} --patch "),
        ({"kueue.x-k8s.io/queue-name": "few"}, f"job/{NAME} waits in Kueue's queue few\n"),
    ],
)
def test_a_suspended_job_is_reported_with_the_command_that_resumes_it(
    labels: dict[str, str], said: str, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    suspended = job(suspend=True, labels=labels)
    answers.give(suspended, suspended, suspended, job(), COMPLETE)
    kubernetes.submit([Job("qwen_clip", "train")], None, Kubectl("here", "fusion"))
    assert capsys.readouterr().out.startswith(said)
    assert wait() == 0
    assert capsys.readouterr().out.count(said) == 1


def test_a_deleted_job_ends_with_143(answers: Answers) -> None:
    answers.give(job(), None)
    assert wait() == 143


def test_an_unreadable_kubeconfig_is_a_config_error(answers: Answers) -> None:
    answers.give("error: error loading config file: yaml: line 3")
    with pytest.raises(ConfigError):
        Kubectl.now(None)


def test_a_job_owns_its_service_and_network_policy(answers: Answers) -> None:
    sent = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": NAME, "uid": "7"}}
    answers.give(None, "job.batch/x created", sent, "job.batch/x configured")
    kubernetes.submit([Job("qwen_clip", "train", nodes=2)], None, Kubectl())
    owned = json.loads((answers.folder / "sent").read_text())["items"]
    assert [found["kind"] for found in owned] == ["Service", "NetworkPolicy"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": NAME, "uid": "7"}
    assert all(found["metadata"]["ownerReferences"] == [owner] for found in owned)


def jobset(kind: str = "", suspend: bool = False) -> Object:
    conditions = [{"type": kind, "status": "True", "reason": "FailJobSet", "message": "as told"}] if kind else []
    metadata = {"name": "fusion-x-jobset", "uid": "8"}
    status = {"conditions": conditions}
    return {
        "kind": "JobSet",
        "apiVersion": "j/v1",
        "metadata": metadata,
        "spec": {"suspend": suspend},
        "status": status,
    }


@pytest.mark.parametrize(("kind", "code"), [("Completed", 0), ("Failed", 70)])
def test_waiting_for_a_jobset_returns_its_exit_code(kind: str, code: int, answers: Answers) -> None:
    answers.give(jobset(), jobset(suspend=True), jobset(kind), pods(70))
    assert kubernetes_wait.wait(["jobset/fusion-x-jobset"], Kubectl()) == code
    asked = answers.asked()
    assert asked[0].startswith("get jobset fusion-x-jobset ")
    assert len(asked) == 3 or "--selector=jobset.sigs.k8s.io/jobset-name=fusion-x-jobset" in asked[3]


def test_a_jobset_owns_its_network_policy(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.give(None, "job.batch/x created", jobset(), "job.batch/x configured")
    (name,) = kubernetes.submit([Job("qwen_clip", "train", nodes=2, jobset=True)], None, Kubectl())
    assert name == "jobset/fusion-train-qwen-clip-jobset"
    assert "--selector=jobset.sigs.k8s.io/jobset-name=fusion-train-qwen-clip-jobset\n" in capsys.readouterr().out
    (policy,) = json.loads((answers.folder / "sent").read_text())["items"]
    assert policy["metadata"]["ownerReferences"][0]["kind"] == "JobSet"
