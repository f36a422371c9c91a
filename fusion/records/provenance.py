"""Identifies the code that a result was made with: its git revision, and a digest of the code that decides the result.

The digest answers whether a night has to be computed again: it changes only if the code that computes prices does.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fusion import storage
from fusion.config import digest
from fusion.environment import variable

PACKAGE = Path(__file__).parents[1]
ENSEMBLE_CODE = "ensemble/prediction"  # root of the code that decides the price of an ensemble
# Rooms that show results and decide none: a chart in another colour is no other training.
SHOWING = ("report", "tracking")
# Kinds of syntax nodes that can have a docstring.
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def revision() -> str:
    """The git revision of this package; "unknown" if it is not in a git repository of its own."""
    if given := variable("FUSION_REVISION"):  # set in container images, which have neither git nor the repository
        return given
    git, options = ["git", "-C", str(PACKAGE)], ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # A package that is installed in a virtual environment inside another repository would get that repository's
        # revision. This command fails if the repository does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        return subprocess.run([*git, "describe", *options], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def code_digest(root: str = "prediction") -> str:
    """sha256 of the source of `fusion.<root>`, of all models, and of every module of this package that they import.

    Comments, docstrings, modules that only other commands import and reports do not count, so that a change of them
    does not cause nightly predictions to be computed again.
    """
    # Variants have settings beside their model; `api/model.py` is a door to them, and decides no price.
    variants = (path.parent for path in PACKAGE.glob("*/config.py") if path.with_name("model.py").exists())
    models = (folder.relative_to(PACKAGE) / "model" for folder in variants)
    waiting, found = [root, *map(str, models)], dict[str, str]()
    while waiting:
        name = waiting.pop()
        paths = (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py")
        path = next((path for path in paths if path.exists()), None)
        if name in found or path is None or name.split("/")[0] in SHOWING:
            continue
        source = path.read_text()
        found[name] = storage.sha256(code_of(source).encode())
        waiting += _imports(source)
    return digest(found)


def code_of(source: str) -> str:
    """The source without comments, docstrings and blank lines. The result is the same on every version of Python.

    >>> code_of('def f() -> int:\\n    \\"\\"\\"Says.\\"\\"\\"\\n\\n    return 1  # one')
    'def f() -> int:\\n    return 1'
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * len(lines[text.lineno - 1 : text.end_lineno])
    return "\n".join(line for line in lines if line.strip())


def _imports(source: str) -> Iterator[str]:
    """Modules of this package that the source imports anywhere, as paths without ".py".

    `from fusion.data import tables` gives both "data" and "data/tables", as either may be the module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            module = (node.module or "").removeprefix(PACKAGE.name).lstrip(".").replace(".", "/")
            yield module
            yield from (f"{module}/{alias.name}".lstrip("/") for alias in node.names)
