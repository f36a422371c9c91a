"""Runs and submissions are pulled from a bucket completely and verified, or not at all, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

import boto3
import fsspec
import pytest

from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.jobs.pull import main as pull_main
from fusion.records.schemas import seal
from fusion.verify.__main__ import verify
from tests.conftest import BUCKET, SMALL, Done
from tests.fault_proxy import RESETS, Fault, FaultProxy, Request, at_random
from tests.s3_server import S3Server
from tests.services import require

ROOT = Path(__file__).parents[2]
LARGE = ["--width", "32", "--hidden", "32", "16", "--batch-size", "64", "--device", "cpu"]
DATE = "2026-01-02"
OUTPUT = f"s3://{BUCKET}/test-pull/out"
PREFIX = OUTPUT.removeprefix(f"s3://{BUCKET}/")


@pytest.fixture(scope="module")
def made(s3: S3Server, catalog: Path) -> str:
    """An output in a bucket, made by the real commands: two evaluated runs, a failed one, and a submission."""
    flags = ["--epochs", "2", "--data", str(catalog), "--tensorboard"]
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with patch.dict(os.environ, {**s3.environment(), "FUSION_OUTPUT": OUTPUT}):
        assert train.main([*flags, *SMALL, "--run-id", "small"]) == 0
        assert train.main([*flags, *LARGE, "--run-id", "large"]) == 0
        assert train.main([*flags, *SMALL, "--run-id", "failed", "--data", "/nowhere"]) == 65
        assert [evaluate_by_groups.main(["--run-id", run]) for run in ("small", "large")] == [0, 0]
        assert predict_test.main(["--run-id", "small", "--name", "prices", "--date", DATE]) == 0
    return OUTPUT


@pytest.fixture
def output(made: str, bucket: str) -> str:
    """The output of `made`, for tests that only read; the fixture `bucket` sets the environment."""
    return made


@pytest.fixture
def copied(made: str, bucket: str) -> str:
    """A copy of the output without the large run, for tests that change it."""
    client = boto3.client("s3")
    target = f"{bucket}/out"
    for key in keys(PREFIX):
        if "/runs/large/" not in key:
            to = target.removeprefix(f"s3://{BUCKET}/") + key.removeprefix(PREFIX)
            client.copy_object(Bucket=BUCKET, Key=to, CopySource={"Bucket": BUCKET, "Key": key})
    return target


@pytest.fixture
def proxy(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    made = FaultProxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.endpoint)
    yield made
    made.stop()


def keys(prefix: str) -> list[str]:
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts the command as a process, which a test can kill."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "jobs/pull.py", *arguments], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def pull(*arguments: str, **env: str) -> Done:
    """Runs the command in this process, because an interpreter takes longer to start than most pulls."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with patch.dict(os.environ, env), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = pull_main(arguments)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


def check(done: Done, code: int, *expected: str) -> None:
    """Asserts that the command ended with this code, and with an error and a hint that contain the expected texts."""
    assert done.code == code, done.err
    assert [line.split(":")[0] for line in done.err.splitlines()[-2:]] == ["error", "hint"]
    for text in expected:
        assert text in done.err


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_verified(*folders: Path) -> None:
    """Asserts that `fusion.verify` finds nothing wrong with the folders, although they lack files of the bucket."""
    assert [finding for folder in folders for finding in verify(str(folder)) if finding.verdict == "BAD"] == []


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def document(url: str) -> Any:
    return json.loads(storage.read(url))


def step_of(output: str, run: str) -> str:
    """The path of the run's only checkpoint below the output."""
    (folder,) = storage.ls(f"{output}/runs/{run}/checkpoints")
    return folder.removeprefix(f"{output}/")


def test_runs_are_listed(output: str) -> None:
    listed = pull("runs", "--output", output, "--json")
    found = {run["run_id"]: run for run in json.loads(listed.out)}
    assert list(found) == ["large", "small", "failed"]
    assert [run for run in found if found[run]["served"]] == [min(("large", "small"), key=lambda r: found[r]["smape"])]
    assert found["small"]["split"] == found["large"]["split"] != ""
    best = document(f"{output}/pointers/runs/all_embeddings/best.json")
    assert found[best["run_id"]]["smape"] == best["smape"] == min(found[run]["smape"] for run in ("small", "large"))
    assert {run: (one["state"], one["code"], one["attempts"]) for run, one in found.items()} == {
        "small": ("finished", 0, 1),
        "large": ("finished", 0, 1),
        "failed": ("failed", 65, 1),
    }
    assert "/nowhere" in found["failed"]["error"] and found["failed"]["smape"] is None
    table = pull("runs", "--failed", FUSION_OUTPUT=output).out
    assert f"{found['small']['smape']:.2f}" in table and "failed (65)" in table
    only = pull("runs", "--output", output, "--variant", "qwen_clip")
    assert (only.code, only.out) == (0, f"no runs of qwen_clip in {output}; there are runs of all_embeddings\n")


def edit(url: str, **values: Any) -> None:
    storage.write(url, seal(document(url) | values))


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda run: edit(f"{run}/attempts/1/exit.json", code=75), "stopped"),
        (lambda run: edit(f"{run}/attempts/1/exit.json", code=137), "failed"),
        (lambda run: storage.remove(f"{run}/attempts/1/exit.json"), "running"),
        (lambda run: storage.write(f"{run}/run.json", b"{"), "unreadable"),
        (lambda run: storage.write(f"{storage.ls(f'{run}/checkpoints')[0]}/MANIFEST.json", b"{}"), "finished"),
        (lambda run: storage.remove(f"{run}/lease.json"), "unreadable"),
    ],
    ids=["stopped", "failed", "running", "damaged run.json", "damaged manifest", "no lease"],
)
def test_the_state_of_a_run(change: Callable[[str], None], state: str, copied: str) -> None:
    change(f"{copied}/runs/small")
    listed = pull("runs", "--output", copied, "--json")
    assert listed.code == 0
    (run,) = [run for run in json.loads(listed.out) if run["run_id"] == "small"]
    assert run["state"] == state
    assert bool(run["error"]) == (state == "unreadable")


def test_submissions_are_listed(copied: str) -> None:
    current = document(f"{copied}/pointers/submissions/prices/current.json")["submission"]
    name, date, digest = current.split("/")
    folder = f"{copied}/submissions/prices"
    manifest = document(f"{folder}/{date}/{digest}/MANIFEST.json")
    storage.write(f"{folder}/2026-01-01/{digest}/MANIFEST.json", seal(manifest | {"date": "2026-01-01"}))
    storage.write(f"{folder}/2026-01-03/{'0' * 12}/MANIFEST.json", b"[]")
    storage.write(f"{folder}/2026-01-04/parts-1/0", b"not committed")
    found = json.loads(pull("submissions", "--output", copied, "--json").out)
    assert [(one["date"], one["rows"], one["current"]) for one in found] == [
        ("2026-01-03", None, False),
        (DATE, manifest["rows"], True),
        ("2026-01-01", manifest["rows"], False),
    ]
    assert (found[1]["name"], found[1]["digest"], found[1]["run"]) == (name, digest, "small")
    table = pull("submissions", "--output", copied, "--name", "prices").out
    assert "current" in table and digest in table and "is damaged" in table
    assert pull("submissions", "--output", copied, "--name", "others").out == f"no submissions in {copied}\n"


def test_runs_are_compared(output: str) -> None:
    found = json.loads(pull("compare", "small", "large", "--output", output, "--json").out)
    assert set(found["settings"]) == {"width", "hidden", "lr"} and found["settings"]["width"] == [16, 32]
    assert found["same_rows"] and found["not_evaluated"] == []
    summaries = [document(f"{output}/runs/{run}/metrics/summary.json") for run in ("small", "large")]
    assert found["groups"][0]["smape"] == pytest.approx([summary["smape"] for summary in summaries])
    table = pull("compare", "best", "latest", "failed", "--output", output)
    assert table.code == 0, table.err
    assert "note: failed has no metrics by group" in table.out and "not validate on the same rows" in table.out
    metric = pull("compare", "small", "large", "--output", output, "--metric", "mae", "--json")
    assert json.loads(metric.out)["groups"][0]["mae"] == pytest.approx([summary["mae"] for summary in summaries])
    check(pull("compare", "small", "large", "--output", output, "--metric", "f1"), 64, "choose one of", "r2")
    check(pull("compare", "small", "--output", output), 64, "at least two runs")


def test_a_run_is_pulled_without_its_lease_and_state(output: str, tmp_path: Path) -> None:
    done = pull("run", "best", "--output", output, "--to", str(tmp_path))
    assert done.code == 0, done.err
    run = document(f"{output}/pointers/runs/all_embeddings/best.json")["run_id"]
    assert done.out.strip() == str(tmp_path / "runs" / run)
    whole = {key.removeprefix(f"{PREFIX}/") for key in keys(f"{PREFIX}/runs/{run}")}
    left = {f"runs/{run}/lease.json", f"{step_of(output, run)}/state.pt"}
    assert left < whole
    added = {"pointers/runs/all_embeddings/best.json", f"runs/{run}/pulled.json"}
    assert files(tmp_path) == whole - left | added
    check_verified(tmp_path, tmp_path / "runs" / run, tmp_path / "pointers/runs/all_embeddings/best.json")
    for name in files(tmp_path) - {f"runs/{run}/pulled.json"}:
        assert (tmp_path / name).read_bytes() == storage.read(f"{output}/{name}")
    assert pull("run", "best", "--output", output, "--to", str(tmp_path), "--state").code == 0
    assert files(tmp_path) - added == whole - {f"runs/{run}/lease.json"}
    check_verified(tmp_path, tmp_path / "runs" / run)
    (tmp_path / step_of(output, run) / "state.pt").unlink()
    assert [finding for finding in verify(str(tmp_path)) if finding.verdict == "BAD"] != [], (
        "state.pt was pulled, so its absence is damage"
    )
    assert predict_test.main(["--output", str(tmp_path), "--date", DATE]) == 0


@pytest.mark.parametrize("which", ["current", DATE, "digest"])
def test_a_submission_is_pulled(which: str, output: str, tmp_path: Path) -> None:
    current = document(f"{output}/pointers/submissions/prices/current.json")["submission"]
    wanted = current.removeprefix("prices/") if which == "digest" else which
    done = pull("submission", wanted, "--name", "prices", "--output", output, "--to", str(tmp_path))
    assert done.code == 0, done.err
    csv = tmp_path / "submissions" / current / "submission.csv"
    assert done.out.strip() == str(csv)
    assert csv.read_bytes() == storage.read(f"{output}/submissions/{current}/submission.csv")
    pointer = {"pointers/submissions/prices/current.json"} if which == "current" else set()
    folder = f"submissions/{current}"
    names = ("submission.csv", "predictions.parquet", "fingerprints.parquet", "MANIFEST.json", "pulled.json")
    assert files(tmp_path) == {f"{folder}/{name}" for name in names} | pointer
    assert [finding for finding in verify(str(csv.parent)) if finding.verdict != "ok"] == []
    check_verified(tmp_path)


def test_a_date_with_several_submissions_means_the_current_one(copied: str, tmp_path: Path) -> None:
    current = document(f"{copied}/pointers/submissions/prices/current.json")["submission"]
    other = f"{copied}/submissions/prices/{DATE}/{'0' * 12}"
    storage.write(f"{other}/MANIFEST.json", storage.read(f"{copied}/submissions/{current}/MANIFEST.json"))
    flags = ["--name", "prices", "--output", copied, "--to", str(tmp_path)]
    assert pull("submission", DATE, *flags).out.strip().endswith(f"{current}/submission.csv")
    storage.remove(f"{copied}/pointers/submissions/prices/current.json")
    check(pull("submission", DATE, *flags), 65, f"2 submissions {DATE}", f"{DATE}/{'0' * 12}")
    check(pull("submission", "2026-02-02", *flags), 65, "no submissions 2026-02-02")


class Requests:
    """Records the requests through a proxy. Those for which `hold` returns True wait until `go_on` is set."""

    def __init__(self, proxy: FaultProxy, hold: Callable[[Request], bool] = lambda _: False) -> None:
        self.seen: list[Request] = []
        self.held, self.go_on = threading.Event(), threading.Event()
        self.hold = hold
        proxy.plan, proxy.hold = None, self._pass

    def _pass(self, request: Request) -> None:
        self.seen.append(request)
        if self.hold(request):
            self.held.set()
            self.go_on.wait(300)

    def gets(self, name: str) -> int:
        """The number of GET requests for objects with this name."""
        return sum(request.method == "GET" and request.path.split("?")[0].endswith(f"/{name}") for request in self.seen)


def test_a_killed_pull_is_continued_without_fetching_files_twice(
    output: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    first = Requests(proxy, hold=lambda request: "state.pt" in request.path and request.method == "GET")
    flags = ["run", "large", "--state", "--output", output, "--to", str(tmp_path)]
    folder = tmp_path / step_of(output, "large")
    with start(*flags, "--store-timeout", "300") as process:  # on a busy machine the model takes a while
        assert first.held.wait(60)
        while not (folder / "model.safetensors").exists():
            assert process.poll() is None, "the pull ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first.go_on.set()
    assert not (folder / "state.pt").exists() and not (folder / "MANIFEST.json").exists()
    second = Requests(proxy)
    assert pull(*flags).code == 0
    assert (second.gets("state.pt"), second.gets("model.safetensors"), second.gets("split.parquet")) == (1, 0, 0)
    third = Requests(proxy)
    done = pull(*flags)
    assert (done.code, third.gets("state.pt"), third.gets("model.safetensors")) == (0, 0, 0)
    assert "0 files fetched" in done.err
    assert pull(*flags, "--check").code == 0


def manifest_of(output: str, run: str) -> Any:
    return document(f"{output}/{step_of(output, run)}/MANIFEST.json")


def test_a_pull_lists_one_run_and_not_the_whole_bucket(output: str, proxy: FaultProxy, tmp_path: Path) -> None:
    requests = Requests(proxy)
    assert pull("run", "small", "--output", output, "--to", str(tmp_path)).code == 0
    assert pull("runs", "--output", output).code == 0
    assert pull("submission", "current", "--name", "prices", "--output", output, "--to", str(tmp_path)).code == 0
    listings = [request.path for request in requests.seen if "list-type=2" in request.path]
    prefixes = [parse_qs(urlsplit(path).query)["prefix"][0].removeprefix(f"{PREFIX}/") for path in listings]
    assert prefixes == ["runs/", "runs/small/", "runs/"]  # the ids alone, one run, all runs


def test_a_pull_survives_a_store_with_random_errors(output: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.plan = at_random(0.2, (*RESETS, Fault.TRUNCATE, Fault.SLOW_DOWN), seed=1)
    flags = ["run", "large", "--output", output, "--to", str(tmp_path)]
    assert pull(*flags).code == 0
    assert sum(count for fault, count in proxy.met.items() if fault)
    proxy.plan = None
    assert pull(*flags, "--check").code == 0


def damage_object(output: str, change: Callable[[bytes], bytes]) -> str:
    """Changes the weights of the small run in the bucket; returns their URL."""
    url = f"{output}/{step_of(output, 'small')}/model.safetensors"
    storage.write(url, change(storage.read(url)))
    return url


@pytest.mark.parametrize("change", [flip, lambda content: content[:-1], lambda content: content + b"1"])
def test_a_damaged_object_in_the_bucket_is_not_pulled(
    change: Callable[[bytes], bytes], copied: str, tmp_path: Path
) -> None:
    url = damage_object(copied, change)
    flags = ["run", "small", "--output", copied, "--to", str(tmp_path)]
    check(pull(*flags), 65, f"{url} ", "its manifest says")
    folder = tmp_path / step_of(copied, "small")
    assert not (folder / "model.safetensors").exists() and not (folder / "MANIFEST.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_document_with_a_broken_seal_is_not_pulled(copied: str, tmp_path: Path) -> None:
    url = f"{copied}/runs/small/run.json"
    storage.write(url, storage.read(url).replace(b"all_embeddings", b"qwen_clip"))
    check(pull("run", "small", "--output", copied, "--to", str(tmp_path)), 65, f"{url} is damaged: it has changed")
    assert not (tmp_path / "runs/small/run.json").exists()


def test_metrics_that_a_manifest_names_are_verified(copied: str, tmp_path: Path) -> None:
    folder, flags = f"{copied}/runs/small/metrics", ["run", "small", "--output", copied, "--to", str(tmp_path)]
    content = storage.read(f"{folder}/groups.csv")
    entry = {"key": "groups.csv", "bytes": len(content), "sha256": storage.sha256(content)}
    storage.write(f"{folder}/MANIFEST.json", storage.as_json({"schema": 1, "files": [entry]}))
    assert pull(*flags).code == 0
    pulled = tmp_path / "runs/small/metrics"
    assert {path.name for path in pulled.iterdir()} == {storage.base(url) for url in storage.ls(folder)}
    (pulled / "groups.csv").unlink()
    storage.write(f"{folder}/groups.csv", flip(content))
    check(pull(*flags), 65, f"{folder}/groups.csv is damaged")
    assert not (pulled / "groups.csv").exists()


def test_a_damaged_file_in_the_folder_is_replaced(copied: str, tmp_path: Path) -> None:
    flags = ["run", "small", "--output", copied, "--to", str(tmp_path)]
    assert pull(*flags).code == 0
    model = tmp_path / step_of(copied, "small") / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(flip(whole))
    check(pull(*flags, "--check"), 65, f"{model} has sha256")
    done = pull(*flags)
    assert done.code == 0 and "model.safetensors was damaged in" in done.err
    assert model.read_bytes() == whole and pull(*flags, "--check").code == 0
    model.unlink()
    check(pull(*flags, "--check"), 65, f"{model} is missing")


def test_a_file_damaged_in_folder_and_bucket_is_removed(copied: str, tmp_path: Path) -> None:
    flags = ["run", "small", "--output", copied, "--to", str(tmp_path)]
    assert pull(*flags).code == 0
    model = tmp_path / step_of(copied, "small") / "model.safetensors"
    model.write_bytes(flip(model.read_bytes()))
    damage_object(copied, flip)
    check(pull(*flags), 65, "model.safetensors is damaged")
    assert not model.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "MANIFEST.json"])
def test_a_link_in_the_folder_is_replaced_and_not_written_through(name: str, output: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "pulled"
    outside.write_bytes(b"mine")
    path = f"runs/small/{name}" if name == "config.json" else f"{step_of(output, 'small')}/{name}"
    (folder / path).parent.mkdir(parents=True)
    (folder / path).symlink_to(outside)
    sha256 = storage.sha256(storage.read(f"{output}/{path}"))
    (folder / f"{path}.{sha256[:12]}.part").symlink_to(outside)  # the temporary file of earlier versions
    assert pull("run", "small", "--output", output, "--to", str(folder)).code == 0
    assert outside.read_bytes() == b"mine" and not (folder / path).is_symlink()
    assert (folder / path).read_bytes() == storage.read(f"{output}/{path}")


def test_a_checkpoint_that_is_pruned_during_the_pull_is_replaced_by_a_newer_one(
    copied: str, proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    old = f"{copied.removeprefix(f's3://{BUCKET}/')}/{step_of(copied, 'small')}"
    new = f"{old.rsplit('/', 1)[0]}/step-99999999"
    client, moved = boto3.client("s3", endpoint_url=s3.endpoint), list[str]()
    files = ("model.safetensors", "state.pt", "validation.parquet", "intervals.json")

    def prune(request: Request) -> bool:
        if "model.safetensors" in request.path and not moved:
            moved.append(request.path)
            for name in (*files, "MANIFEST.json"):
                source = {"Bucket": BUCKET, "Key": f"{old}/{name}"}
                client.copy_object(Bucket=BUCKET, Key=f"{new}/{name}", CopySource=source)
            manifest = json.loads(client.get_object(Bucket=BUCKET, Key=f"{new}/MANIFEST.json")["Body"].read())
            client.put_object(Bucket=BUCKET, Key=f"{new}/MANIFEST.json", Body=seal(manifest | {"step": 99999999}))
            for name in ("MANIFEST.json", *files):
                client.delete_object(Bucket=BUCKET, Key=f"{old}/{name}")
        return False

    Requests(proxy, hold=prune)
    done = pull("run", "small", "--output", copied, "--to", str(tmp_path))
    assert done.code == 0, done.err
    assert (tmp_path / "runs/small/checkpoints/step-99999999/MANIFEST.json").exists()


def test_dry_run_prints_commands(output: str, tmp_path: Path, s3: S3Server) -> None:
    flags = ["--output", output, "--to", str(tmp_path), "--dry-run"]
    sync, pointer = map(shlex.split, pull("run", "best", *flags).out.splitlines())
    run = document(f"{output}/pointers/runs/all_embeddings/best.json")["run_id"]
    path, (step,) = f"runs/{run}", [step_of(output, run).rsplit("/", 1)[1]]
    assert sync[:5] == ["aws", "s3", "sync", f"{output}/{path}", str(tmp_path / path)]
    assert sync[-2:] == ["--endpoint-url", s3.endpoint]
    assert [f"checkpoints/{step}/*", "--exclude", "*/state.pt"] == sync[-5:-2]
    best = "pointers/runs/all_embeddings/best.json"
    assert pointer[:5] == ["aws", "s3", "cp", f"{output}/{best}", str(tmp_path / best)]
    commands = pull("submission", "current", "--name", "prices", *flags).out.splitlines()
    assert [command.split()[2] for command in commands] == ["sync", "cp"]
    assert len(pull("submission", DATE, "--name", "prices", *flags).out.splitlines()) == 1
    assert files(tmp_path) == set()
    check(pull("run", "x", "--output", output, "--dry-run"), 65, "no run x under")


def test_dry_run_refuses_a_folder(tmp_path: Path) -> None:
    check(pull("run", "r", "--output", str(tmp_path), "--dry-run"), 64, "--output is", "s3://")


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["run", "smal"], 65, "did you mean small?"),
        (["run", "best", "--variant", "qwen_clip"], 65, "no finished run of qwen_clip"),
        (["submission", "current", "--name", "price"], 65, "did you mean prices?"),
        (["submission", "current", "--nam", "prices"], 64, "did you mean --name?"),
        (["fetch"], 64, "invalid choice"),
        (["runs", "--store-timeout", "-1"], 64, "expected 0 or more"),
        (["run", "small", "--to", "/proc/nowhere"], 78, "cannot be written"),
    ],
)
def test_user_errors_have_codes_and_hints(flags: list[str], code: int, expected: str, output: str) -> None:
    check(pull(*flags, FUSION_OUTPUT=output), code, expected)


def test_latest_needs_a_variant_where_there_are_several(copied: str, tmp_path: Path) -> None:
    pointer = storage.read(f"{copied}/pointers/runs/all_embeddings/latest.json")
    storage.write(f"{copied}/pointers/runs/qwen_clip/latest.json", pointer)
    check(pull("run", "latest", "--output", copied), 64, "--variant all_embeddings")


@pytest.mark.parametrize(
    ("env", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 77),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, 69),
        ({"FUSION_OUTPUT": "s3://no-such-bucket/out"}, 65),
    ],
    ids=["wrong secret", "unreachable", "no bucket"],
)
def test_errors_of_the_store_end_with_their_exit_codes(env: dict[str, str], code: int, output: str) -> None:
    where = {"FUSION_OUTPUT": output, "FUSION_STORE_TIMEOUT": "1"}
    check(pull("run", "small", **{**where, **env}), code, "s3://")


def test_two_pulls_into_one_folder_at_the_same_time_succeed(output: str, proxy: FaultProxy, tmp_path: Path) -> None:
    requests = Requests(proxy, hold=lambda request: "state.pt" in request.path)
    flags = ["run", "large", "--state", "--to", str(tmp_path)]
    with start(*flags, "--output", output) as first:
        assert requests.held.wait(60)
        assert pull(*flags, "--output", output, AWS_ENDPOINT_URL_S3=direct(proxy)).code == 0
        requests.go_on.set()
        assert first.wait() == 0
    assert pull(*flags, "--output", output, "--check").code == 0


def direct(proxy: FaultProxy) -> str:
    """The endpoint of the store behind the proxy."""
    host, port = proxy.upstream
    return f"http://{host}:{port}"


def test_an_interrupted_pull_ends_at_once_and_says_how_to_continue(
    output: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    requests = Requests(proxy, hold=lambda request: "state.pt" in request.path)
    with start("run", "large", "--state", "--output", output, "--to", str(tmp_path)) as process:
        assert requests.held.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)  # the store has not answered yet
        requests.go_on.set()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("stopped; run the same command again")


@pytest.mark.parametrize("what", ["run failed", "submission current --name prices"], ids=["not in a manifest", "named"])
def test_a_full_disk_is_one_error_for_all_files(what: str, output: str, tmp_path: Path) -> None:
    require(os.geteuid() == 0, "root, to mount a small disk")
    mount = f'mount -t tmpfs -o size=4k tmpfs {tmp_path} && exec "$@"'  # room for one file
    command = [sys.executable, "jobs/pull.py", *what.split(), "--output", output, "--to", str(tmp_path)]
    command = ["unshare", "-m", "sh", "-c", mount, "-", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    check(Done(done.returncode, done.stdout, done.stderr), 69, "no space is left for")


def test_jobs_do_not_load_torch() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "fusion" / "jobs").rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(path.with_suffix("").parts) for path in files]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
