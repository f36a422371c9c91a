"""The names of `import fusion`: listed, lazy, documented, annotated, and known to editors."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fusion

NAMES = sorted(set(fusion.__all__) - {"__version__"})
HEAVY = ("torch", "pandas", "pyarrow", "matplotlib", "numpy")


def functions_of(name: str) -> Iterator[tuple[str, Any]]:
    """The public functions of a name: itself, or the methods and properties of a class that this project defines."""
    found = getattr(fusion, name)
    if inspect.isfunction(found):
        yield name, found
    if inspect.isclass(found) and not issubclass(found, Exception):
        for key, member in vars(found).items():
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function) and (not key.startswith("_") or key == "__init__"):
                yield f"{name}.{key}", function


def test_completion_shows_the_public_names_alone() -> None:
    assert {name for name in dir(fusion) if not name.startswith("__")} == set(NAMES)
    with pytest.raises(AttributeError, match="module 'fusion' has no attribute 'lode'"):
        fusion.lode  # noqa: B018


def test_editors_know_the_same_names() -> None:
    stub = ast.parse(Path(fusion.__file__).with_suffix(".pyi").read_text())
    imported = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(fusion, name)), name
    for key, function in functions_of(name):
        assert key.endswith(".__init__") or inspect.getdoc(function), key


@pytest.mark.parametrize("name", NAMES)
def test_a_public_function_is_annotated(name: str) -> None:
    for key, function in functions_of(name):
        signature = inspect.signature(function)
        parameters = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
        assert all(one.annotation is not one.empty for one in parameters), key
        assert key.endswith(".__init__") or signature.return_annotation is not signature.empty, key


@pytest.mark.parametrize("name", ["load", "train", "score", "make_config", "Model.predict", "Model.evaluate"])
def test_what_notebooks_call_says_what_it_takes_and_raises(name: str) -> None:
    owner, _, method = name.rpartition(".")
    function = getattr(getattr(fusion, owner), method) if owner else getattr(fusion, method)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Raises:"):
        assert section in text, (name, section)
    for parameter in set(inspect.signature(function).parameters) - {"self"}:
        assert parameter in text, (name, parameter)


def test_importing_loads_nothing_heavy() -> None:
    code = f"import fusion, sys; dir(fusion); print([one for one in {HEAVY} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_settings_load_no_torch() -> None:
    code = "import fusion, sys; fusion.make_config('qwen_clip', epochs=1); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
