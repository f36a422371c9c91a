"""Every flag, variable and command that a message names exists in the command that prints the message."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion.all_embeddings.config import Config
from fusion.config import EvaluateConfig, PredictConfig
from fusion.flags import _flag, _flags

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

COMMANDS = {"train": Config, "evaluate": EvaluateConfig, "predict": PredictConfig}
FLAGS = {name: {_flag(key) for key in _flags(config)} | {"--config"} for name, config in COMMANDS.items()}

# Modules whose messages only these commands print. `--sources` is followed by a role.
ONLY = {
    "fusion/training.py": ("train",),
    "fusion/fitting.py": ("train",),
    "fusion/splits.py": ("train",),
    "fusion/embeddings.py": ("train", "predict"),
    "fusion/prediction.py": ("predict",),
    "fusion/submission.py": ("predict",),
}


def texts(path: Path) -> Iterator[str]:
    """The texts given to every error and every log line of a module, holes of f-strings left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "hint")]:
                if _name(node.func).endswith("Error") or isinstance(node.func, ast.Attribute):
                    parts = [part.value for part in ast.walk(argument) if isinstance(part, ast.Constant)]
                    yield " ".join(part for part in parts if isinstance(part, str))


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


@pytest.mark.parametrize("module", ONLY)
def test_each_flag_exists_in_the_command_that_names_it(module: str) -> None:
    named = {flag for text in texts(ROOT / module) for flag in FLAG.findall(text)}
    for command in ONLY[module]:
        known = FLAGS[command] | ({"--sources"} if command == "train" else set())
        assert named <= known, (command, named - known)


def test_each_module_that_is_named_exists() -> None:
    for path in [*ROOT.glob("fusion/**/*.py"), *ROOT.glob("jobs/**/*.py")]:
        for text in texts(path):
            for module in re.findall(r"python -m (fusion(?:\.[a-z_]+)+)(?![.\w{])", text):
                assert importlib.util.find_spec(module), (path, module)
            for script in re.findall(r"jobs/[a-z]+\.py", text):
                assert (ROOT / script).exists(), (path, script)
