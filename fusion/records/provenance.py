"""Identifies the code that a result was made with: its git revision, and a digest of the code that decides the result.

The digest answers whether a night has to be computed again: it changes only if the code that computes prices does.
"""

from __future__ import annotations

import re
import subprocess
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
# Tokens in which a `#` or a quote can stand, and brackets. Python's own parser would take a second in every command.
_TOKEN = re.compile(
    r"""
    (?P<prefix> [a-zA-Z]{0,2} )
    (?P<string> \"{3} (?:[^\\]|\\.)*? \"{3} | '{3} (?:[^\\]|\\.)*? '{3}
        | " (?:[^"\\\n]|\\.)* " | ' (?:[^'\\\n]|\\.)* ' )
    | (?P<comment> [\ \t]* \# [^\n]* )
    | (?P<opening> [(\[{] )
    | (?P<closing> [)\]}] )
    """,
    re.VERBOSE | re.DOTALL,
)
_IMPORT = re.compile(r"^[ \t]*from fusion\b\.?([\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


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
        code = code_of(path.read_text())
        found[name] = storage.sha256(code.encode())
        waiting += _imports(code)
    return digest(found)


def code_of(source: str) -> str:
    """The source without comments, docstrings and blank lines. The result is the same on every version of Python.

    >>> code_of('def f() -> int:\\n    \\"\\"\\"Says.\\"\\"\\"\\n\\n    return 1  # one')
    'def f() -> int:\\n    return 1'
    """
    kept, end, depth = [""], 0, 0  # depth: the number of open brackets
    before = ""  # the last text other than space that was kept
    for token in _TOKEN.finditer(source):
        between, end = source[end : token.start()], token.end()
        before = between.strip() or before
        opens_block = not depth and before[-1:] in ("", ":")
        if token["comment"] or (opens_block and _is_docstring(token, source)):
            kept.append(between)
        else:
            kept += between, token[0]
            before = token[0]
            depth += bool(token["opening"]) - bool(token["closing"])
    kept.append(source[end:])
    return "\n".join(line for line in "".join(kept).splitlines() if line.strip())


def _is_docstring(token: re.Match[str], source: str) -> bool:
    """Whether a token is a string alone on its lines, as a docstring is; the caller knows what stands before."""
    line = source[source.rfind("\n", 0, token.start()) + 1 : token.start()]
    rest = source[token.end() :].partition("\n")[0].partition("#")[0]
    plain = bool(token["string"]) and token["prefix"].lower() in ("", "r", "u")
    return plain and not (line + rest).strip()


def _imports(code: str) -> Iterator[str]:
    """Modules of this package that the code imports anywhere, as paths without ".py".

    `from fusion.data import tables` gives both "data" and "data/tables", as either may be the module.
    """
    for package, names in _IMPORT.findall(code):
        module = package.replace(".", "/")
        yield module
        yield from (f"{module}/{name.split()[0]}".lstrip("/") for name in names.strip("()").split(",") if name.strip())
