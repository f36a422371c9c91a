"""Runs the blocks of one page in order, in the current folder: `python -m tests.docs.run_page README.md`.

Python blocks share their variables, and shell blocks their environment, as if a reader typed them. The exit code is 0
if every block did what it should; otherwise the page, the line and what was printed are shown.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.docs.blocks import ROOT, Block, blocks_of

ENVIRONMENT = ".environment"  # file in which a shell leaves its variables for the next block


def run_page(page: Path) -> None:
    """Raises AssertionError at the first block that does not do what it should."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    printed = {"output": "", "stderr": ""}
    for block in blocks_of(page):
        if block.value("file"):
            _write(block)
        elif block.value("output"):
            _check(block, printed["stderr" if block.value("output") == "stderr" else "output"])
        elif block.runs and block.language == "python":
            printed = _python(block, variables)
        elif block.runs:
            printed = _shell(block)


def _write(block: Block) -> None:
    path = Path(block.value("file"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)


def _python(block: Block, variables: dict[str, Any]) -> dict[str, str]:
    with redirect_stdout(io.StringIO()) as out:
        # The lines before make the line numbers of a traceback those of the page.
        exec(compile("\n" * block.line + block.text, block.page, "exec"), variables)
    return {"output": out.getvalue(), "stderr": ""}


def _shell(block: Block) -> dict[str, str]:
    script = f"trap 'env -0 > {ENVIRONMENT}' EXIT\n{block.text}"
    done = subprocess.run(["bash", "-e", "-u", "-c", script], capture_output=True, text=True, check=False)
    expected = int(block.value("fails") or 0)
    said = f"{block.page}:{block.line} ended with {done.returncode}\n{block.text}\n{done.stdout}{done.stderr}"
    assert done.returncode == expected, said
    for entry in Path(ENVIRONMENT).read_text().rstrip("\0").split("\0"):
        name, _, value = entry.partition("=")
        os.environ[name] = value
    return {"output": done.stdout, "stderr": done.stderr}


def _check(block: Block, printed: str) -> None:
    """Compares with what the block before printed; `…` stands for anything, also for several lines."""
    pattern = block.text.strip().replace("[", "[[]").replace("…", "*")
    said = f"{block.page}:{block.line} shows\n{block.text}\nprinted was\n{printed}"
    assert fnmatchcase(printed.strip(), pattern), said


if __name__ == "__main__":
    try:
        run_page(ROOT / sys.argv[1])
    except AssertionError as wrong:
        sys.exit(str(wrong))
