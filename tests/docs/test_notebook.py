"""docs/notebook.ipynb runs from its first cell to its last, and is stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
# In a process of its own: the client leaves sockets to the garbage collector, whose warnings are errors here.
EXECUTE = """
import nbclient, nbformat, sys
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[2] + "/executed.ipynb")
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The cells of code with their outputs."""
    folder = tmp_path_factory.mktemp("notebook")
    path = {"PYTHONPATH": str(NOTEBOOK.parents[1])}
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(folder)]
    done = subprocess.run(command, env={**os.environ, **path}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(folder / "executed.ipynb", 4)
    return [cell for cell in executed.cells if cell.cell_type == "code"]


def outputs(cells: list[Any], kind: str) -> list[str]:
    """The outputs of a MIME type, in their order."""
    found = [output.get("data", {}).get(kind) for cell in cells for output in cell.outputs]
    return [one for one in found if one]


def shown_on(stream: str, cells: list[Any]) -> str:
    return "".join(one.text for cell in cells for one in cell.outputs if one.get("name") == stream)


def test_the_notebook_runs(cells: list[Any]) -> None:
    pages = "\n".join(outputs(cells, "text/html"))
    assert "fusion.Model" in pages and "low_90" in pages and "covered_90" in pages
    assert len(outputs(cells, "image/png")) == 2


def test_the_log_of_a_training_fits_a_notebook(cells: list[Any]) -> None:
    lines = shown_on("stderr", cells).splitlines()
    epochs = [line for line in lines if " epoch=" in line]
    assert len(epochs) == 5 and max(map(len, epochs)) < 120, lines
    assert "costs about $" in shown_on("stdout", cells)


def test_it_is_stored_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
