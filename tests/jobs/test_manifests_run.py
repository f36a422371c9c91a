"""Commands and variables in the manifests are valid: `pytest tests/jobs/test_manifests_run.py`."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fusion import storage
from fusion.command.settings import _flags, _variable, parse
from fusion.config import EvaluateConfig, PredictConfig, RunConfig
from fusion.errors import ExitCode
from fusion.launch.launcher import Options, _parse, _parser
from fusion.launch.processes import SETTLE
from fusion.prepare import __main__ as prepare
from fusion.prepare.requests import requests
from tests import services
from tests.cluster import cluster
from tests.conftest import run_command
from tests.manifests import K8S, Workload, one, workloads

README = (K8S / "README.md").read_text()
TEXTS = {path: path.read_text() for path in [*K8S.glob("*/**/*.yaml"), K8S / "README.md"]}
each_workload = pytest.mark.parametrize("work", workloads(), ids=str)


def options(work: Workload, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The options that the launcher parses from a pod's arguments, in the environment of that pod."""
    config = one("config", "ConfigMap")["data"]
    for name, value in {**config, **work.env, "JOB_COMPLETION_INDEX": "0", "PET_NPROC_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    return _parse(
        [argument.replace("$(FUSION_OUTPUT)", config["FUSION_OUTPUT"]) for argument in work.container["args"][3:]]
    )


def config_class(module: str) -> type[Any]:
    """The class of the settings of `fusion.<variant>.<command>`."""
    variant, command = module.rsplit(".", 1)
    shared = {"evaluate_by_groups": EvaluateConfig, "predict_test": PredictConfig}
    return shared.get(command) or importlib.import_module(f"{variant}.config").Config


@each_workload
def test_the_command_understands_its_flags_and_environment(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    module, *flags = options(work, monkeypatch).command[2:]
    if module == "fusion.prepare":
        given = prepare._parse(flags)
        assert given.to == "s3://my-bucket/data" and requests(given.source, given.folds)
        return
    config = parse(config_class(module), flags, prog=module, description="")
    assert config.output.startswith("s3://my-bucket/output")


@pytest.mark.parametrize("args", sorted({tuple(work.container["args"]) for work in workloads()}), ids=" ".join)
def test_every_command_has_help(
    args: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_NNODES", "1")
    module, *flags = _parse([*args[3:], "--help"]).command[2:]
    with pytest.raises(SystemExit) as ended:
        (prepare if module == "fusion.prepare" else importlib.import_module(module)).main(flags)
    assert not ended.value.code
    assert f"usage: python -m {module}" in capsys.readouterr().out


@each_workload
def test_the_grace_periods_of_training_launcher_and_pod_are_nested(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, nodes = options(work, monkeypatch).grace, work.job.get("completions", 1)
    assert float(work.env.get("FUSION_GRACE", RunConfig.grace)) <= launcher
    # The launcher kills ranks that do not end in time; then it waits as long for the launchers of other nodes.
    assert (launcher + 2 * SETTLE) * min(nodes, 2) < work.pod["terminationGracePeriodSeconds"]


def test_the_default_grace_is_the_one_that_comments_name() -> None:
    assert _parser().get_default("grace") == RunConfig.grace == 60
    named = [text for text in TEXTS.values() if "60 s of the launcher's --grace" in text]
    assert len(named) == len({work.source for work in workloads() if not work.source.startswith("overlays")})


def test_every_variable_is_a_setting() -> None:
    """Each FUSION_… variable in k8s/ is a setting of a command, or of the tests on a cluster."""
    classes = [config_class(f"fusion.{variant}.train") for variant in ("all_embeddings", "qwen_clip")]
    known = {_variable(flag) for one in (*classes, EvaluateConfig, PredictConfig) for flag in _flags(one)}
    known |= {
        name for one in (cluster, services) for name in re.findall(r"\bFUSION_[A-Z_]+", Path(one.__file__).read_text())
    }
    named = {name: path for path, text in TEXTS.items() for name in re.findall(r"\bFUSION_[A-Z_]+", text)}
    assert set(named) <= known, {name: str(path) for name, path in named.items() if name not in known}


@pytest.mark.parametrize("code", ExitCode)
def test_the_readme_explains_every_exit_code(code: ExitCode) -> None:
    assert re.search(rf"^\| {int(code)} \| \w", README, re.MULTILINE)


def test_the_smoke_run_from_its_manifest(bucket: str, tmp_path: Path) -> None:
    """It generates data, trains on two ranks and writes to the store. A second run has nothing to do."""
    (work,) = (work for work in workloads() if work.source == "overlays/cpu-smoke")
    (init,) = work.pod["initContainers"]

    def here(argument: str) -> str:
        return argument.replace("/tmp/catalog", str(tmp_path)).replace("$(FUSION_OUTPUT)", bucket)

    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")} | work.env
    assert init["args"][:2] == ["python", "-c"]
    subprocess.run([sys.executable, "-c", here(init["args"][2])], check=True)
    command = [here(argument) for argument in work.container["args"][2:]]
    first = run_command(*command, env=environment)
    assert (first.code, "event=finished " in first.err) == (ExitCode.DONE, True), first.err
    assert len(storage.ls(f"{bucket}/smoke/runs")) == 1
    again = run_command(*command, env=environment)
    assert (again.code, "event=finished_before" in again.err) == (ExitCode.DONE, True), again.err
