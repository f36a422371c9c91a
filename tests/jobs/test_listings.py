"""`pull.py runs` and `pull.py compare` on runs that these tests write without a training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fusion import storage
from fusion.errors import DataError
from fusion.jobs.pull import main
from fusion.jobs.results import shown
from fusion.jobs.results.bucket import list_runs
from tests.conftest import Done
from tests.fault_proxy import FaultProxy
from tests.made_runs import make_run, serve, write
from tests.s3_server import S3Server

HOSTILE = "no column [price] in \x1b[2Jtrain.csv \u202etxt [/b]"


def pull(*arguments: str) -> Done:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(arguments)
    return Done(code, out.getvalue(), err.getvalue())


def test_control_characters_from_a_bucket_are_escaped(tmp_path: Path) -> None:
    make_run(str(tmp_path), "bad", smapes=(), code=65, error=HOSTILE)
    make_run(str(tmp_path), "good", variant="[red]\x1b]0;title\x07")
    done = pull("runs", "--output", str(tmp_path))
    assert done.code == 0, done.err
    assert all(letter.isprintable() for line in done.out.splitlines() for letter in line)
    assert r"[red]\x1b]0;title\x07" in done.out


def test_control_characters_in_errors_are_escaped() -> None:
    error = DataError(HOSTILE, "a\nb\x1b")
    assert error.report().splitlines()[0] == r"error: no column [price] in \x1b[2Jtrain.csv \u202etxt [/b]"
    assert error.remedy == r"a b\x1b"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b'"text"'),
        ("metrics/groups.csv", b"by,group,smape\nprice,0-5,\xff\n"),
        ("metrics/groups.csv", b"by,group,smape\nprice,0-5,many\n"),
        ("metrics/groups.csv", b"by,smape\nprice,5\n"),
        ("metrics/groups.csv", b"by,group,smape\nprice\n"),
        ("metrics/groups.csv", b'by,group,smape\n"price,0-5,5\n'),
        ("metrics/groups.csv", b""),
    ],
)
def test_compare_names_a_damaged_file(name: str, content: bytes, tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_run(str(tmp_path), run)
    url = f"{tmp_path}/runs/b/{name}"
    storage.write(url, content)
    done = pull("compare", "a", "b", "--output", str(tmp_path))
    assert (done.code, done.err.splitlines()[0].startswith(f"error: {url} is damaged: ")) == (65, True), done.err


def test_compare_escapes_control_characters_and_keeps_brackets(tmp_path: Path) -> None:
    for run, column in (("a", "[price]"), ("b", "\x1b[2J")):
        storage.write(f"{make_run(str(tmp_path), run)}/config.json", storage.as_json({"text_column": column}))
        rows = f"by,group,smape\n[b]brand,{HOSTILE},5\n".encode()
        storage.write(f"{tmp_path}/runs/{run}/metrics/groups.csv", rows)
    done = pull("compare", "a", "b", "--output", str(tmp_path))
    assert done.code == 0 and "[price]" in done.out and r"\x1b[2J" in done.out and "[b]brand" in done.out
    assert all(letter.isprintable() for line in done.out.splitlines() for letter in line)
    assert json.loads(pull("compare", "a", "b", "--output", str(tmp_path), "--json").out)["runs"] == ["a", "b"]


@pytest.mark.parametrize("kind", ["folder", "bucket", "memory"])
def test_find_lists_all_objects_below_a_url(kind: str, bucket: str, tmp_path: Path) -> None:
    url = {"folder": str(tmp_path / "a"), "bucket": f"{bucket}/a", "memory": "memory://a"}[kind]
    assert storage.find(url) == {}
    before = datetime.now(UTC) - timedelta(seconds=2)
    for name in ("x", "b/c/y", "b/z"):
        storage.write(f"{url}/{name}", name.encode())
    storage.write(f"{url}b/other", b"")
    found = storage.find(url)
    assert {name: one.size for name, one in found.items()} == {"x": 1, "b/c/y": 5, "b/z": 3}
    assert {name: storage.read(one.url) for name, one in found.items()} == {n: n.encode() for n in found}
    assert all(one.modified and before < one.modified < before + timedelta(seconds=60) for one in found.values())


def listed(output: Path, *flags: str) -> dict[str, dict[str, Any]]:
    return {run["run_id"]: run for run in json.loads(pull("runs", "--output", str(output), "--json", *flags).out)}


def test_finished_runs_come_first_and_failed_ones_are_counted(tmp_path: Path) -> None:
    output = str(tmp_path)
    make_run(output, "first", started="2026-01-01T00:00:00Z")
    make_run(output, "second", started="2026-01-02T00:00:00Z", smapes=(None, 40.0, 41.0))
    make_run(output, "stopped", started="2026-01-03T00:00:00Z", code=75)
    make_run(output, "diverged", started="2026-01-04T00:00:00Z", code=70, error="the loss is nan")
    for i in range(3):
        make_run(output, f"typo{i}", started="2026-01-05T00:00:00Z", smapes=(), code=65, error="no train.csv")
    table = pull("runs", "--output", output).out
    assert re.findall(r"^ (\w+)", table, re.MULTILINE)[1:] == ["second", "first", "diverged", "stopped"]
    assert "40.00" in table and "failed (70)" in table and "diverged: the loss is nan\n" in table
    assert table.endswith("3 failed tries without a model: add --failed to list them\n")
    everything = pull("runs", "--output", output, "--failed").out
    assert "typo2" in everything and "failed (65)" in everything and "--failed" not in everything
    assert list(listed(tmp_path)) == ["second", "first", "typo2", "typo1", "typo0", "diverged", "stopped"]


def test_failed_runs_are_listed_when_there_are_no_others(tmp_path: Path) -> None:
    assert pull("runs", "--output", str(tmp_path)).out == f"no runs in {tmp_path}\n"
    make_run(str(tmp_path), "typo", smapes=(), code=65, error="no train.csv")
    assert "typo: no train.csv\n" in pull("runs", "--output", str(tmp_path)).out


def test_the_served_run_is_marked_and_equal_splits_share_a_letter(tmp_path: Path) -> None:
    output = str(tmp_path)
    for run, split in (("a", "1" * 64), ("b", "2" * 64), ("c", "1" * 64)):
        make_run(output, run, split=split)
    serve(output, "qwen_clip", "b", 50.0)
    found = listed(tmp_path)
    assert [run for run, facts in found.items() if facts["served"]] == ["b"]
    assert found["a"]["split"] == found["c"]["split"] != found["b"]["split"]
    table = pull("runs", "--output", output).out
    letters = {line.split()[0]: line.split()[3] for line in table.splitlines() if " qwen_clip " in line}
    assert letters == {"c": "A", "b": "B", "a": "A"}
    assert re.search(r"^ b .* served ", table, re.MULTILINE) and "SMAPE can be compared" in table


def test_a_run_that_has_written_nothing_for_an_hour_is_silent(tmp_path: Path) -> None:
    run = Path(make_run(str(tmp_path), "killed", code=None))
    assert listed(tmp_path)["killed"]["state"] == "running"
    an_hour_ago = time.time() - 3600
    for path in run.rglob("*"):
        os.utime(path, (an_hour_ago, an_hour_ago))
    found = listed(tmp_path)["killed"]
    sign = datetime.fromtimestamp(int(an_hour_ago), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (found["state"], found["last_sign"]) == ("silent", sign)
    assert f"killed: nothing written since {sign}: most likely killed" in pull("runs", "--output", str(tmp_path)).out
    (run / "checkpoints/step-00000000/MANIFEST.json").touch()
    assert listed(tmp_path)["killed"]["state"] == "running"
    assert listed(tmp_path)["killed"]["started"] == "2026-01-02T03:04:05Z"


def test_a_listing_takes_three_requests_per_run(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    n_runs = 8
    for i in range(n_runs):
        make_run(bucket, f"run-{i}")
    serve(bucket, "qwen_clip", "run-0", 50.0)
    proxy, seen = FaultProxy(s3.endpoint), Counter[str]()
    proxy.plan = lambda request: seen.update(["LIST" if "list-type=2" in request.path else request.method])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert pull("runs", "--output", bucket).code == 0
    proxy.stop()
    # run.json, exit.json and the manifest of the checkpoint per run, and one pointer for the served run
    assert seen == {"LIST": 1, "GET": 3 * n_runs + 1}


@pytest.mark.parametrize(
    "command", [["runs"], ["submissions"], ["run", "x"], ["run", "best"], ["submission", "current"]]
)
def test_a_missing_bucket_is_named(command: list[str], bucket: str) -> None:
    done = pull(*command, "--output", "s3://no-such-bucket/out", "--store-timeout", "1")
    assert done.code == 65 and "no-such-bucket" in done.err.splitlines()[0], done.err


def test_a_dead_proxy_is_an_unreachable_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    done = pull("runs", "--output", bucket, "--store-timeout", "0")
    assert (done.code, "does not answer" in done.err) == (69, True), done.err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 64, "for example `python jobs/pull.py runs --output s3://my-bucket/output`"),
        (["runs", "--output", ""], 78, "--output is empty"),
        (["run", "best", "--output="], 78, "--output is empty"),
        (["run", "best", "--to", ""], 78, "--to is empty"),
        (["run", "best", "--to", "s3://bucket/pulled"], 78, "--to is s3://bucket/pulled, expected a folder"),
        (["run", "best", "--to", "s3:/bucket/pulled"], 78, "expected a folder of this machine"),
        (["run", "god"], 65, "did you mean good? `python jobs/pull.py runs --output output` lists what is there"),
        (["run", "../good"], 65, "no run ../good under output"),
    ],
)
def test_user_errors_have_codes_and_hints(
    arguments: list[str], code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_OUTPUT", "")  # an empty variable is unset: the default is ./output
    monkeypatch.setenv("FUSION_STORE_TIMEOUT", "")
    make_run("output", "good")
    done = pull(*arguments)
    assert done.code == code and expected in done.err, done.err
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("script", ["pull", "doctor", "submit", "control", "manifests"])
@pytest.mark.parametrize("has_fusion", [True, False], ids=["fsspec is missing", "fusion is missing"])
def test_a_python_without_fusion_names_the_right_environment(script: str, has_fusion: bool) -> None:
    root = Path(__file__).parents[2]
    env = {"PYTHONPATH": str(root)} if has_fusion else {}
    command = [sys.executable, "-S", f"jobs/{script}.py", "--help"]  # -S: without the installed packages
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 78, done.stderr
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: No module named ") and error.endswith(f" for {sys.executable}")
    assert hint == "hint: run `. .venv/bin/activate` first; `make demo` makes .venv"


def test_ids_are_not_truncated_in_a_narrow_terminal(tmp_path: Path) -> None:
    make_run(str(tmp_path), "all-embeddings-b762e410", variant="all_embeddings")
    found = list_runs(str(tmp_path))
    for width, has_variant in ((None, True), (120, True), (80, False), (20, False)):
        with redirect_stdout(StringIO()) as out:
            shown.runs(found, str(tmp_path), width=width)
        assert " all-embeddings-b762e410 " in out.getvalue()
        assert ("variant" in out.getvalue()) == has_variant


def test_a_metric_that_is_not_defined_is_null(tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_run(str(tmp_path), run)
        storage.write(f"{tmp_path}/runs/{run}/metrics/groups.csv", b"by,group,r2\nprice,0-5,\nprice,5-10,nan\n")
    found = pull("compare", "a", "b", "--output", str(tmp_path), "--metric", "r2", "--json").out
    groups = json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["groups"]
    assert [group["r2"] for group in groups] == [[None, None], [None, None]]


def test_a_run_without_metrics_is_noted_with_the_command_that_makes_them(tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_run(str(tmp_path), run)
    table = pull("compare", "a", "b", "--output", str(tmp_path)).out
    assert f"`python -m fusion.qwen_clip.evaluate_by_groups --output {tmp_path} --run-id a` makes them" in table


def test_a_pointer_to_a_deleted_run_is_an_error(tmp_path: Path) -> None:
    make_run(str(tmp_path), "b")
    serve(str(tmp_path), "qwen_clip", "a", 50.0)
    done = pull("run", "best", "--output", str(tmp_path), "--to", str(tmp_path / "pulled"))
    assert (done.code, done.err.splitlines()[0]) == (65, f"error: no run a under {tmp_path}")


def test_a_variant_without_runs_names_those_with_runs(tmp_path: Path) -> None:
    make_run(str(tmp_path), "a")
    listed = pull("runs", "--output", str(tmp_path), "--variant", "qwen-clip")
    assert listed.out == f"no runs of qwen-clip in {tmp_path}; there are runs of qwen_clip\n"
    assert json.loads(pull("runs", "--output", str(tmp_path), "--variant", "qwen-clip", "--json").out) == []


def test_a_file_name_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), "a", split=storage.sha256(b"rows"))
    entry = {"key": "x" * 300, "bytes": 1, "sha256": storage.sha256(b"1")}
    write(f"{run}/metrics/MANIFEST.json", {"schema": 1, "files": [entry]})
    done = pull("run", "a", "--output", str(tmp_path), "--to", str(tmp_path / "pulled"))
    assert done.code in (65, 78) and "File name too long" in done.err, done.err
