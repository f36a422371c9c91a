"""Torch's compiler is loaded by who compiles, and by nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL

TRAINS = """
import sys
from fusion.all_embeddings import train
code = train.main(sys.argv[1:])
loaded = [name for name in ("sympy", "torch._inductor", "torch._dynamo.symbolic_convert") if name in sys.modules]
sys.exit(code or " ".join(loaded) or 0)
"""

COMPILES = """
import torch
from fusion.distributed import world

def twice(value):
    return value * 2

with world("cpu"):
    weight = torch.nn.Parameter(torch.ones(3))
    torch.optim.AdamW([weight]).step()
    assert torch.compile(twice, backend="eager")(torch.ones(2)).tolist() == [2, 2]
with world("cpu"):
    assert torch.optim.AdamW([weight]).step() is None
assert torch.compiler.disable(twice)(1) == torch.compiler.disable()(twice)(1) == 2
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("before", ["", "import torch._dynamo.config\n"])
def test_a_function_can_be_compiled(before: str) -> None:
    assert run(before + COMPILES) == ""


def test_a_training_does_not_load_it(catalog: Path, tmp_path: Path) -> None:
    assert run(TRAINS, "--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1") == ""
