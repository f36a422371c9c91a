"""What a result was made with: the revision of the code, and a digest of the code that decides what is computed."""

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
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def revision() -> str:
    """The git revision of this package; "unknown" where there is none."""
    if given := variable("FUSION_REVISION"):  # an image has no git
        return given
    git, options = ["git", "-C", str(PACKAGE)], ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # An installed package may lie below somebody else's repository, which does not know this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        return subprocess.run([*git, "describe", *options], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def code_digest(root: str = "prediction") -> str:
    """sha256 of the code that `fusion.<root>` and the models run, directly or through what they import.

    Comments and docstrings do not count, nor do other commands: a night is not computed again because of them.
    """
    models = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.glob("*/model.py"))
    waiting, found = [root, *map(str, models)], dict[str, str]()
    while waiting:
        name = waiting.pop()
        paths = (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py")
        path = next((path for path in paths if path.exists()), None)
        if name in found or path is None:
            continue
        source = path.read_text()
        found[name] = storage.sha256(code_of(source).encode())
        waiting += _imports(source)
    return digest(found)


def code_of(source: str) -> str:
    """The source without comments, docstrings and blank lines: the same on every version of Python.

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
    """Modules of this package that are imported anywhere in the source, as paths without an ending."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            module = (node.module or "").removeprefix(PACKAGE.name).lstrip(".").replace(".", "/")
            yield module
            yield from (f"{module}/{alias.name}".lstrip("/") for alias in node.names)
