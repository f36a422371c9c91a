"""Every flag, variable and command that an error message or hint names exists in the command that prints it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fusion.all_embeddings.config import Config
from fusion.command.settings import _flag, _flags, _variable
from fusion.compare import __main__ as compare
from fusion.config import AblateConfig, EvaluateConfig, PredictConfig
from fusion.convert import __main__ as convert
from fusion.ensemble import __main__ as ensemble
from fusion.errors import ExitCode, Parser, UsageError
from fusion.jobs import submit
from fusion.launch import launcher
from fusion.prepare import __main__ as prepare
from fusion.verify import __main__ as verify

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

SETTINGS = {"train": Config, "evaluate": EvaluateConfig, "predict": PredictConfig, "ablate": AblateConfig}
# Commands with parsers of their own, and the file that has it.
PARSERS = {
    "launch": "fusion/launch/launcher.py",
    "verify": "fusion/verify/__main__.py",
    "compare": "fusion/compare/__main__.py",
    "ensemble": "fusion/ensemble/__main__.py",
    "convert": "fusion/convert/__main__.py",
    "demo": "fusion/demo/__main__.py",
    "prepare": "fusion/prepare/__main__.py",
    "report": "fusion/report/__main__.py",
    "doctor": "fusion/jobs/doctor.py",
    "pull": "fusion/jobs/pull.py",
    "submit": "fusion/jobs/submit.py",
    "manifests": "fusion/jobs/manifests.py",
    "control": "fusion/jobs/control.py",
}
# Functions of fusion/command/parser.py, and the flag that each adds.
HELP = {"--help", "--help-all"}
SHARED = {"add_output": "--output", "add_store_timeout": "--store-timeout"}
RUNS = ("train", "evaluate", "predict")

# Commands that print the messages of a module, or of one of its functions. A flag must exist in all of them.
PRINTED_BY = {
    "fusion/records/best_run.py": ("train",),
    "fusion/report/__main__.py": ("report",),
    "fusion/report/leaderboard.py": ("report",),  # in a command that it names
    "fusion/report/publish.py": ("report",),  # in a command that it names
    "fusion/report/gather.py": ("compare",),  # in a command that it names
    "fusion/report/model_use.py": ("report", "evaluate", "ablate"),  # in commands that it prints
    "fusion/report/origin.py": ("train",),  # in a command that it prints
    "fusion/records/checkpoint.py": ("train",),
    "fusion/compare/__main__.py": ("compare",),
    "fusion/storage/conditional.py": RUNS,
    "fusion/config.py:StoreConfig": (*RUNS, "ablate"),
    "fusion/config.py:RunConfig": ("train",),
    "fusion/config.py:PredictConfig": ("predict",),
    "fusion/config.py:ReadRunConfig": ("evaluate", "predict", "ablate"),
    "fusion/config.py:AblateConfig": ("ablate",),
    "fusion/convert/__main__.py": ("convert",),
    "fusion/demo/__main__.py": ("demo",),
    "fusion/prepare/__main__.py": ("prepare",),
    "fusion/prepare/checks.py": ("prepare",),
    "fusion/prepare/claim.py": ("prepare",),
    "fusion/prepare/folder.py": ("prepare",),
    "fusion/prepare/on_ray.py": ("prepare",),
    "fusion/prepare/prepare.py": ("prepare",),
    "fusion/prepare/requests.py": ("prepare",),
    "fusion/distributed/world.py": RUNS,
    "fusion/data/duplicates.py": ("train",),
    "fusion/data/embeddings.py": ("train", "predict"),
    "fusion/data/source_file.py": ("convert",),  # in a command that it names
    "fusion/data/node_rows.py": ("train",),
    "fusion/data/row_cache.py": (*RUNS, "ablate"),
    "fusion/cli/completion.py": (*RUNS, *PARSERS),
    "fusion/cli/main.py": (*RUNS, *PARSERS),
    "fusion/cli/variant.py": ("evaluate", "predict"),
    "fusion/ensemble/__main__.py:_other_rows": ("train",),
    "fusion/ensemble/__main__.py:_warn_of_several_data": ("predict",),
    "fusion/ensemble/__main__.py": ("ensemble",),
    "fusion/ensemble/folder.py": ("ensemble",),
    "fusion/ensemble/prediction.py": ("ensemble", "predict"),
    "fusion/ensemble/tables.py": ("predict",),  # in a command that it names
    "fusion/errors.py": (*RUNS, *PARSERS),
    "fusion/evaluation/rows.py": ("evaluate",),
    "fusion/evaluation/rows.py:is_as_trained": ("evaluate", "ablate"),
    "fusion/features/fitted.py": ("train",),
    "fusion/features/columns.py": ("train",),
    "fusion/training/trainer.py": ("train",),
    "fusion/command/parser.py:add_output": ("compare", "ensemble", "report"),
    "fusion/command/parser.py:add_store_timeout": ("compare", "ensemble", "prepare", "report", "verify"),
    "fusion/command/settings.py": RUNS,
    "fusion/submissions/guards.py": ("predict",),
    "fusion/data/inputs.py:_no_table": (*RUNS, "doctor"),
    "fusion/data/inputs.py:_no_source": ("train", "doctor"),
    "fusion/launch/launcher.py": ("launch",),
    "fusion/launch/rendezvous.py": ("launch",),
    "fusion/records/memory.py": ("train",),
    "fusion/prediction/predict.py": ("predict",),
    "fusion/records/attempts.py": ("train",),
    "fusion/records/start.py": ("train",),
    "fusion/records/run.py": ("evaluate", "predict"),
    "fusion/records/split.py": ("train",),
    "fusion/records/find_run.py:_no_finished_run": ("evaluate", "predict"),
    "fusion/compare/out_of_fold.py:scored_runs": ("pull",),  # in a command that it names
    "fusion/compare/out_of_fold.py:find_run": ("pull",),  # in a command that it names
    "fusion/compare/out_of_fold.py:_evaluated": ("evaluate",),
    "fusion/records/find_run.py:no_run": ("pull",),  # in a command that it names
    "fusion/records/find_run.py:open_run": ("evaluate", "predict"),
    "fusion/records/find_run.py:data_of": ("evaluate", "predict"),
    "fusion/data/source_rows.py": ("train", "predict", "prepare"),
    "fusion/ablation/source_worth.py": ("ablate",),
    "fusion/data/splits.py": ("train",),
    "fusion/submissions/submission.py": ("predict",),
    "fusion/training/saver.py": ("train",),
    "fusion/training/loop.py": ("train",),
    "fusion/training/order.py": ("train",),
    "fusion/training/dataset.py": ("train",),
    "fusion/training/outcome.py:next_commands": ("evaluate", "predict"),
    "fusion/training/outcome.py:_typed": ("evaluate", "predict"),
    "fusion/training/outcome.py": ("train",),
    "fusion/tracking/choice.py": ("train",),
    "fusion/tracking/mlflow.py": ("train",),
    "fusion/tracking/tensorboard.py": ("train",),
    "fusion/tracking/wandb.py": ("train",),
    "fusion/tracking/__init__.py": ("train",),
    "fusion/records/validation.py": ("train",),
    "fusion/verify/__main__.py": ("verify",),
    "fusion/verify/submission.py": ("verify",),
    "fusion/distributed/watchdog.py": ("train",),
    "fusion/training/memory_build.py": ("train",),
    "fusion/jobs/checks/store.py": ("doctor",),
    "fusion/jobs/schedulers/description.py": ("submit",),
    "fusion/jobs/schedulers/kubectl.py": ("submit", "control"),
    "fusion/jobs/schedulers/local.py": ("submit",),
    "fusion/jobs/schedulers/kubernetes_sent.py": ("control",),
    "fusion/jobs/schedulers/sent.py": ("control",),
    "fusion/jobs/schedulers/settings_file.py": ("submit", "manifests", "control"),
    "fusion/jobs/schedulers/slurm_wait.py": ("submit",),
    "fusion/jobs/control.py": ("control",),
    "fusion/jobs/doctor.py": ("doctor",),
    "fusion/jobs/manifests.py": ("manifests",),
    "fusion/jobs/pull.py": ("pull",),
    "fusion/jobs/results/choice.py": ("pull",),
    "fusion/jobs/results/compare.py": ("pull",),
    "fusion/jobs/results/transfer.py": ("pull",),
    "fusion/jobs/submit.py": ("submit",),
}
# Of git, docker and kubectl; and of the training whose flags follow the `--` of a submission.
FOREIGN = {"fusion/records/provenance.py": {"--error-unmatch"}, "fusion/data/shared_memory.py": {"--shm-size"}}
FOREIGN |= {"fusion/data/inputs.py:_no_source": {"--embeddings", "--ids", "--to"}}  # of fusion.convert
FOREIGN |= {"fusion/jobs/schedulers/kubectl.py": {"--output"}}
KUBECTL = ("--api-group", "--cascade", "--container", "--field-selector", "--output", "--selector", "--since-time")
FOREIGN |= {"fusion/jobs/schedulers/kubernetes_sent.py": {*KUBECTL, "--tail", "--timestamps", "--wait"}}
FOREIGN |= {"fusion/jobs/schedulers/slurm_sent.py": {"--jobs", "--starttime"}}
FOREIGN |= {"fusion/jobs/schedulers/description.py": {"--folds", "--fold", "--name", "--run-id"}}
MODULES = sorted((ROOT / "fusion").glob("**/*.py"))


def flags_of(command: str) -> set[str]:
    """The flags of a command; `--sources` stands for all flags `--sources.ROLE`."""
    if command in SETTINGS:
        keys = set(_flags(SETTINGS[command]))
        roles = {"--sources"} if any(key.startswith("sources.") for key in keys) else set()
        return {_flag(key) for key in keys} | roles | {"--config", *HELP}
    tree = ast.parse((ROOT / PARSERS[command]).read_text())
    added = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and _name(call.func).startswith("add")]
    words = {word.value for call in added for word in call.args if isinstance(word, ast.Constant)}
    words |= {SHARED[_name(call.func)] for call in added if _name(call.func) in SHARED}
    roles = {"--sources"} if command == "doctor" else set()
    return {word for word in words if isinstance(word, str)} | roles | HELP


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts of all error messages, hints and log lines; expressions within f-strings are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "hint")]:
                if _name(node.func).endswith("Error") or isinstance(node.func, ast.Attribute):
                    parts = [part.value for part in ast.walk(argument) if isinstance(part, ast.Constant)]
                    yield " ".join(part for part in parts if isinstance(part, str))


def named(tree: ast.AST) -> set[str]:
    return {flag for text in texts(tree) for flag in FLAG.findall(text)}


def parts_of(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """The parts of a module that PRINTED_BY has entries for: functions and classes first, then the rest."""
    key, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
    rest = []
    for node in tree.body:
        own = f"{key}:{getattr(node, 'name', '')}"
        if own in PRINTED_BY:
            yield own, node
        else:
            rest.append(node)
    yield key, ast.Module(rest, [])


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


@pytest.mark.parametrize("command", [*SETTINGS, *PARSERS])
def test_flags_of_finds_flags(command: str) -> None:
    assert len(flags_of(command)) > 3


def test_flags_in_messages_exist() -> None:
    for path in MODULES:
        for key, tree in parts_of(path):
            flags = named(tree) - FOREIGN.get(key, set())
            assert not flags or key in PRINTED_BY, f"{key} names {flags}: add it to PRINTED_BY"
            for command in PRINTED_BY.get(key, ()):
                assert flags <= flags_of(command), (key, command, flags - flags_of(command))


def test_the_table_names_existing_code() -> None:
    there = {key for path in MODULES for key, _ in parts_of(path)}
    assert set(PRINTED_BY) <= there, "renamed or removed"


def test_variables_in_messages_exist() -> None:
    known = {_variable(key) for config in SETTINGS.values() for key in _flags(config)}
    for path in MODULES:
        read = re.findall(r'variable\("(FUSION_[A-Z_]+)', path.read_text())
        known |= set(read)
    for path in MODULES:
        for text in texts(ast.parse(path.read_text())):
            assert set(re.findall(r"FUSION_[A-Z_]+[A-Z]", text)) <= known, (path, text)


def test_only_training_suggests_to_bind_another_source() -> None:
    for path in MODULES:
        for key, tree in parts_of(path):
            if any(command in PRINTED_BY.get(key, ()) for command in ("evaluate", "predict")):
                assert not [text for text in texts(tree) if "bind another source" in text], key


def test_modules_in_messages_exist() -> None:
    for path in MODULES:
        for text in texts(ast.parse(path.read_text())):
            for module in re.findall(r"python -m (fusion(?:\.[a-z_]+)+)(?![.\w{])", text):
                assert importlib.util.find_spec(module), (path, module)
            for script in re.findall(r"jobs/[a-z]+\.py", text):
                assert (ROOT / script).exists(), (path, script)


@pytest.mark.parametrize("parser", [launcher._parser(), submit._parser()], ids=lambda parser: parser.prog)
def test_the_example_of_a_parser_can_be_parsed(parser: Parser) -> None:
    with pytest.raises(UsageError) as caught:
        parser.parse_args([])
    assert (
        caught.value.remedy
        == f"for example `{parser.prog} {parser.example}`; `{parser.prog} --help-all` lists all flags"
    )
    parser.parse_args(parser.example.partition(" -- ")[0].split())


@pytest.mark.parametrize("command", [verify, convert, compare, ensemble, prepare])
def test_a_command_without_arguments_shows_an_example(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == ExitCode.USAGE
    name = command.__name__.removesuffix(".__main__")
    assert f"hint: for example `python -m {name} " in capsys.readouterr().err
