"""Breaks each thing that `doctor.py` checks, and expects its finding and exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import boto3
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fusion import storage
from fusion.errors import ExitCode
from fusion.jobs.checks import machine
from fusion.jobs.checks.check import Check, PlannedJob, fail, ok
from fusion.jobs.doctor import CHECKS, run_check, worst
from fusion.jobs.doctor import main as doctor_main
from fusion.launch import launcher
from tests.conftest import BUCKET, upload
from tests.fault_proxy import Fault, FaultProxy, _Exchange
from tests.s3_server import READER_KEY, READER_SECRET, S3Server
from tests.services import require

ROOT = Path(__file__).parents[2]
Found = dict[str, dict[str, Any]]


def doctor(*flags: str, **env: str) -> tuple[int, Found]:
    """Runs the command in this process; returns its exit code, and what each check found."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with patch.dict(os.environ, env), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = doctor_main([*flags, "--json"])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return code, {finding.pop("check"): finding for finding in json.loads(out.getvalue())}


def only(check: str, *flags: str, **env: str) -> tuple[int, str, str]:
    """Exit code, verdict and text of one check."""
    code, found = doctor("--only", check, *flags, **env)
    assert list(found) == [check]
    assert bool(found[check]["remedy"]) == (found[check]["verdict"] != "ok")
    return code, found[check]["verdict"], found[check]["found"]


def process(*flags: str, wrap: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    command = [*wrap, sys.executable, "jobs/doctor.py", *flags]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture
def place(bucket: str, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with a catalog, which FUSION_DATA names, and an output beside it, which FUSION_OUTPUT names."""
    upload(catalog, f"{bucket}/data")
    monkeypatch.setenv("FUSION_DATA", f"{bucket}/data")
    monkeypatch.setenv("FUSION_OUTPUT", f"{bucket}/out")
    monkeypatch.setenv("FUSION_STORE_TIMEOUT", "0.5")
    return bucket


def keys(url: str) -> list[str]:
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    return [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]]


def test_all_checks_pass(place: str) -> None:
    before = keys(place)
    done = process("--variant", "all_embeddings", FUSION_DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert {line.split()[1] for line in lines[:-1]} == {check.name for check in CHECKS} - {"gpus"}
    stores = ("settings", "credentials", "store", "clock", "data", "writable", "conditions", "torch")
    assert [line for line in lines if line.split()[1:2] and line.split()[1] in stores and line[:2] != "ok"] == []
    assert "they do not expire" in done.stdout and lines[-1] == "OK"
    assert keys(place) == before


def test_help_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor_main(["--help-all"])
    said = capsys.readouterr().out
    assert all(f"  {check.name} " in said and check.about in said for check in CHECKS)
    assert doctor_main(["--outputt", "x"]) == 64
    assert "did you mean --output?" in capsys.readouterr().err


def test_checks_come_after_those_they_need() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(names.index(check.needs) < names.index(check.name) for check in CHECKS if check.needs)


def test_a_store_that_does_not_answer_skips_the_checks_that_need_it(place: str, s3: S3Server) -> None:
    proxy = FaultProxy(s3.endpoint)
    proxy.stop()
    flags = ["--only", "store", "clock", "data", "writable", "conditions"]
    code, found = doctor(*flags, AWS_ENDPOINT_URL_S3=proxy.endpoint)
    assert code == 69
    assert [(one["verdict"], one["code"]) for one in found.values()] == [("fail", 69)] * 3 + [("warn", 0)] * 2
    assert "does not answer" in found["store"]["found"] and "does not answer" in found["clock"]["found"]
    assert found["writable"]["found"] == "skipped: needs check store"


def test_a_dead_proxy_is_an_unreachable_store(place: str) -> None:
    flags = ["--only", "store", "clock", "data"]
    code, found = doctor(*flags, HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    assert (code, [one["code"] for one in found.values()]) == (69, [69] * 3), found


@pytest.mark.parametrize(
    ("env", "failing", "code", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "store", 77, "no access to s3://"),
        (
            {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET},
            "writable",
            77,
            "no access to s3://",
        ),
        ({"FUSION_OUTPUT": "s3://no-such-bucket/out"}, "store", 65, "no-such-bucket"),
        ({"FUSION_OUTPUT": "/proc/nowhere"}, "writable", 78, "cannot write below /proc"),
        ({"FUSION_DATA": "s3://no-such-bucket/data"}, "data", 65, "no-such-bucket"),
        ({"FUSION_EPOCHS": "-1"}, "settings", 78, "--epochs is '-1' (in the environment)"),
        ({"FUSION_GRACE": "soon"}, "settings", 78, "--grace is 'soon'"),
        ({"FUSION_CONFIG": "/nowhere.json"}, "settings", 65, "/nowhere.json does not exist"),
    ],
    ids=["wrong secret", "reader", "no bucket", "no folder", "no data", "epochs", "grace", "no file"],
)
def test_wrong_settings_and_permissions_fail_with_their_exit_codes(
    env: dict[str, str], failing: str, code: int, expected: str, place: str
) -> None:
    flags = ["--only", "settings", "store", "data", "writable", "conditions", "grace"]
    found_code, found = doctor(*flags, **env)
    assert found_code == code
    failed = [name for name, finding in found.items() if finding["verdict"] == "fail"]
    assert failing == failed[0] and expected in found[failing]["found"]
    assert not [key for key in keys(place) if ".probe" in key]


def test_a_read_only_output_fails(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "root, to mount a read-only folder")
    mount = f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"'
    flags = ["--only", "writable", "--output", str(tmp_path / "out")]
    done = process(*flags, wrap=("unshare", "-m", "sh", "-c", mount, "-"))
    assert done.returncode == 77, done.stdout
    assert f"no access to {tmp_path}/out/" in done.stdout and "Read-only file system" in done.stdout


def test_missing_tables_and_sources_are_named(catalog: Path, place: str) -> None:
    flags = ["--variant", "all_embeddings"]
    assert only("data", *flags)[:2] == (0, "ok")
    storage.remove(f"{place}/data/embeddings/test/clip_image.parquet")
    storage.remove(f"{place}/data/test.csv")
    assert only("data", *flags) == (0, "warn", "train is there, test lacks test.csv, clip_image")
    code, verdict, found = only("data", *flags, FUSION_SOURCES_CLIP_IMAGE="img_efflite0")
    assert (code, verdict) == (65, "fail") and "has no img_efflite0; it has clip_image, " in found
    storage.remove(f"{place}/data/embeddings/train")
    code, verdict, found = only("data")
    assert (code, verdict) == (65, "fail") and "has no sources; it has nothing" in found
    storage.remove(f"{place}/data/train.csv")
    assert only("data")[0] == 65


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--variant", "none_such"], "--variant is 'none_such', expected one of all_embeddings, qwen_clip"),
        (["--store-timeout", "-1"], "--store-timeout: is -1, expected 0 or more"),
        (["--store-timeout", "nan"], "--store-timeout: is nan, expected 0 or more"),
        (["--store-timeout", "soon"], "--store-timeout: invalid seconds value: 'soon'"),
    ],
)
def test_rejects_invalid_flags(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_main(flags) == 64
    assert expected in capsys.readouterr().err.splitlines()[0]


class Careless(MemoryFileSystem):  # type: ignore[misc]
    """A store that ignores the conditions of conditional writes, as some S3 clones do."""

    protocol = "careless"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        super().pipe_file(path, value)


def test_warns_of_a_store_without_conditional_writes(tmp_path: Path) -> None:
    fsspec.register_implementation("careless", Careless, clobber=True)
    assert only("conditions", FUSION_OUTPUT="careless://out")[:2] == (0, "warn")
    assert only("conditions", FUSION_OUTPUT="memory://out")[:2] == (0, "warn")  # it has no If-Match
    assert only("conditions", FUSION_OUTPUT=str(tmp_path))[:2] == (0, "ok")
    assert Careless.store == {}


class LateExchange(_Exchange):
    """Replaces the Date header of answers by that of a clock that is ahead."""

    ahead: ClassVar[timedelta] = timedelta()

    def _reply(self, answer: bytes, fault: Fault | None) -> None:
        date = format_datetime(datetime.now(UTC) + self.ahead, usegmt=True).encode()
        head, split, body = answer.partition(b"\r\n\r\n")
        super()._reply(re.sub(rb"(?i)\r\ndate: [^\r]*", b"\r\nDate: " + date, head) + split + body, fault)


@pytest.mark.parametrize(
    ("minutes", "code", "verdict", "expected"),
    [
        (0, 0, "ok", "0 s"),
        (-20, 78, "fail", r"1(199|20\d) s ahead of"),  # a Date header has whole seconds
        (20, 78, "fail", "s behind"),
        (1, 0, "warn", "s behind"),
    ],
)
def test_a_clock_that_differs_from_the_stores_is_found(
    minutes: int, code: int, verdict: str, expected: str, place: str, s3: S3Server
) -> None:
    proxy = FaultProxy(s3.endpoint)
    proxy.RequestHandlerClass = LateExchange
    with patch.object(LateExchange, "ahead", timedelta(minutes=minutes)):
        found = only("clock", AWS_ENDPOINT_URL_S3=proxy.endpoint)
    proxy.stop()
    assert found[:2] == (code, verdict)
    assert re.search(expected, found[2]) or minutes == 0


@pytest.fixture
def profile(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that the credential_process of the AWS profile prints; tests write credentials into it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    printed = tmp_path / "credentials.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {printed}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    yield printed
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def prints(profile: Path, **more: str) -> None:
    made = {"Version": 1, "AccessKeyId": "rwkey", "SecretAccessKey": "rwsecret", **more}
    profile.write_text(json.dumps(made))


def in_minutes(minutes: int) -> str:
    return (datetime.now(UTC) + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_credentials_from_a_credential_process(profile: Path) -> None:
    code, verdict, found = only("credentials")
    assert (code, verdict) == (77, "fail") and "No such file" in found
    prints(profile)
    assert only("credentials") == (0, "ok", "from custom-process: they do not expire")
    prints(profile, SessionToken="t", Expiration=in_minutes(200))
    assert only("credentials")[2] in [f"from custom-process: valid for 3 h {n} min, then renewed" for n in (19, 20)]
    prints(profile, SessionToken="t", Expiration=in_minutes(-60))
    code, verdict, found = only("credentials")
    assert (code, verdict) == (77, "fail") and "expired" in found


def test_credentials_from_the_environment(profile: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "rwkey", "AWS_SECRET_ACCESS_KEY": "rwsecret"}
    assert only("credentials", **keys) == (0, "ok", "from env: they do not expire")
    token = {**keys, "AWS_SESSION_TOKEN": "t"}
    code, verdict, found = only("credentials", **token)
    assert (code, verdict) == (0, "warn") and "does not say when it expires" in found
    assert only("credentials", **token, AWS_CREDENTIAL_EXPIRATION=in_minutes(5))[1] == "warn"
    assert only("credentials", **token, AWS_CREDENTIAL_EXPIRATION=in_minutes(500))[1] == "ok"
    assert only("credentials", **token, AWS_CREDENTIAL_EXPIRATION=in_minutes(-5))[0] == 77


def test_a_missing_profile_ends_with_77(profile: Path) -> None:
    code, found = doctor("--only", "credentials", "store", "clock", "data", AWS_PROFILE="nope")
    assert code == 77
    assert {name: one["code"] for name, one in found.items()} == dict.fromkeys(found, 77)


def test_missing_credentials_end_with_77(profile: Path) -> None:
    code, verdict, found = only("credentials", AWS_CONFIG_FILE=str(profile))
    assert (code, verdict) == (77, "fail") and "finds none" in found
    assert doctor("--only", "credentials", "clock", FUSION_DATA="data", FUSION_OUTPUT="output") == (0, {})


def dist_info(folder: Path, name: str, version: str) -> None:
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_old_library_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only("libraries")[:2] == (0, "ok")
    dist_info(tmp_path, "tenacity", "1.2")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert only("libraries") == (78, "fail", "tenacity is 1.2, expected >=8.3")


def test_code_that_is_not_installed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    assert only("libraries")[:2] == (0, "ok")


def test_a_missing_library_and_an_old_python_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist_info(tmp_path, "fusion", "9.9")
    with next(tmp_path.glob("*/METADATA")).open("a") as file:
        file.write('Requires-Python: >=3.99\nRequires-Dist: nosuchlib>=1\nRequires-Dist: pip>=999; extra == "test"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    code, verdict, found = only("libraries")
    assert (code, verdict) == (78, "fail")
    assert re.fullmatch(r"Python is 3\.\S+, expected >=3\.99; nosuchlib is not installed, expected >=1", found)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that comes first in PATH, for a script in place of `nvidia-smi`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def says(smi: Path, script: str) -> None:
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)


def test_gpus_are_described_and_busy_ones_named(smi: Path) -> None:
    free = "0, NVIDIA H100 80GB HBM3, 570.86.15, 4, 81559"
    says(smi, f"echo '{free}'; echo '1{free[1:]}'")
    assert only("gpus") == (0, "ok", "2 x NVIDIA H100 80GB HBM3, driver 570.86.15")
    says(smi, "echo '0, NVIDIA L4, 550.54, 20000, 23034'")
    assert only("gpus")[1:] == ("warn", "1 x NVIDIA L4, driver 550.54; GPU 0 has 20000 of 23034 MiB in use")
    says(smi, "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver'; exit 9")
    assert only("gpus")[:2] == (78, "fail")
    assert doctor("--only", "gpus", FUSION_DEVICE="cpu") == (0, {})


def test_no_gpu_is_a_warning_unless_the_device_is_cuda() -> None:
    if machine._nvidia_smi():
        pytest.skip("this machine has GPUs")
    assert only("gpus")[:2] == (0, "warn")
    assert only("gpus", FUSION_DEVICE="cuda")[::2] == (78, "no GPU, and FUSION_DEVICE is cuda")


def test_torch_that_finds_no_gpu_fails_where_nvidia_smi_finds_one(smi: Path) -> None:
    says(smi, "echo '0, NVIDIA L4, 550.54, 0, 23034'")
    code, verdict, found = only("torch", CUDA_VISIBLE_DEVICES="")
    assert (code, verdict) == (78, "fail") and "finds none of the GPUs" in found


def test_torch_that_cannot_be_loaded_fails(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = process("--only", "torch", PYTHONPATH=path)
    assert done.returncode == 78 and "torch cannot be loaded (ImportError: libcudart.so.12" in done.stdout


def test_warns_of_a_small_dev_shm() -> None:
    require(os.geteuid() == 0, "root, to mount a small /dev/shm")
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    done = process("--only", "shm", wrap=("unshare", "-m", "sh", "-c", mount, "-"))
    assert done.returncode == 0, done.stderr
    assert re.match(r"warn shm +/dev/shm has 64 MiB, 64 MiB free\n +hint: mount a larger one", done.stdout)


def test_warns_when_the_own_host_name_does_not_resolve() -> None:
    require(os.geteuid() == 0, "root, to rename the machine")
    rename = 'printf nowhere-fusion > /proc/sys/kernel/hostname && exec "$@"'
    done = process("--only", "names", wrap=("unshare", "-u", "sh", "-c", rename, "-"))
    assert done.returncode == 0, done.stderr
    assert "warn names        this machine's own name nowhere-fusion does not resolve" in done.stdout


def test_master_addr_must_be_set_and_resolve() -> None:
    assert only("names", MASTER_ADDR="127.0.0.1")[1:] == ("ok", f"{os.uname().nodename} resolves, and so does "
        "MASTER_ADDR 127.0.0.1")  # fmt: skip
    code, verdict, found = only("names", MASTER_ADDR="node0.nowhere.invalid")
    assert (code, verdict, found) == (78, "fail", "MASTER_ADDR node0.nowhere.invalid does not resolve")
    assert only("names", PET_NNODES="2")[::2] == (78, "2 nodes, and MASTER_ADDR is not set")


def test_warns_of_a_low_limit_on_open_files() -> None:
    done = process("--only", "memory", wrap=("sh", "-c", 'ulimit -n 256 && exec "$@"', "-"))
    assert done.returncode == 0 and done.stdout.startswith("warn memory") and "256 open files" in done.stdout


def test_warns_of_a_dev_shm_larger_than_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: 2**28)
    monkeypatch.setattr(machine, "MIN_FREE_BYTES", 0)
    code, verdict, found = only("shm")
    assert (code, verdict) == (0, "warn") and "which it counts towards, is 256 MiB" in found


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    assert only("folders", TRITON_CACHE_DIR=str(tmp_path / "new" / "triton"))[:2] == (0, "ok")
    assert not (tmp_path / "new").exists()
    code, verdict, found = only("folders", TRITON_CACHE_DIR="/proc/triton")
    assert (code, verdict) == (78, "fail") and "/proc/triton (TRITON_CACHE_DIR) cannot be written" in found


def test_the_scheduler_is_named_with_the_time_that_is_left() -> None:
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
    end = int(time.time()) + 7230
    assert only("cluster", **slurm, SLURM_JOB_END_TIME=str(end))[1:] == (
        "ok",
        "Slurm job 12, 2 nodes, which ends in 120 min",
    )
    assert only("cluster", **slurm, SLURM_JOB_END_TIME=str(end - 7200))[1] == "warn"
    assert "index 3" in only("cluster", KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")[2]
    assert "alone" in only("cluster")[2]


def test_warns_of_a_grace_period_longer_than_the_launchers() -> None:
    assert launcher._parser().get_default("grace") == machine.LAUNCHER_GRACE
    assert only("grace")[1] == "ok"
    assert only("grace", KUBERNETES_SERVICE_HOST="10.0.0.1")[1] == "ok"
    assert only("grace", FUSION_GRACE="15")[1:] == (
        "ok",
        "training takes at most 15 s to stop, and fusion.launch allows 60 s",
    )
    assert only("grace", FUSION_GRACE="120")[1:] == (
        "warn",
        "FUSION_GRACE is 120 s, and fusion.launch kills its ranks after 60 s",
    )


def test_an_exception_in_a_check_is_a_failure_with_70() -> None:
    finding = run_check(Check("x", "", lambda job: ok(job.nothing)), PlannedJob("", ""))  # type: ignore[attr-defined]
    assert finding is not None and (finding.verdict, finding.code) == ("fail", 70)
    assert "this check broke: AttributeError: 'PlannedJob' object has no attribute 'nothing'" in finding.found


def test_the_exit_code_is_that_of_the_worst_failure() -> None:
    codes = [ExitCode.UNREACHABLE, ExitCode.BUG, ExitCode.DATA, ExitCode.CONFIG, ExitCode.CREDENTIALS]
    for i, code in enumerate(codes):
        assert worst([ok(""), *(fail("", "", one) for one in codes[: i + 1])]) == code
    assert worst([ok("")]) == 0
    assert worst([fail("", "", ExitCode.STALLED)]) == 70
