"""A variant is a config and a model: a new one is one folder, and no shared file knows of it."""

from __future__ import annotations

from pathlib import Path

from fusion import pointers
from fusion.records import SubmissionPointer
from tests.conftest import run_command

FILES = {
    "__init__.py": "",
    "config.py": """
from typing import ClassVar
from pydantic.dataclasses import dataclass
from fusion.config import STRICT, RunConfig, setting


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sources:
    qwen_text: str = setting("qwen_text", "source of the text embeddings", "sources")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    variant: ClassVar[str] = "text_only"

    sources: Sources = Sources()
""",
    "model.py": """
from torch import nn


class Linear(nn.Module):
    def __init__(self, config, dims):
        super().__init__()
        self.linear = nn.Linear(dims["qwen_text"], 1)

    def forward(self, inputs, present):
        return self.linear(inputs["qwen_text"]).squeeze(1)


build_network = Linear
""",
    "train.py": """
import sys
from fusion.command import run
from fusion.training import train
from text_only.config import Config
from text_only.model import build_network

if __name__ == "__main__":
    sys.exit(run(Config, lambda config: train(config, build_network), None, module="text_only.train", doc=""))
""",
    "evaluate_by_groups.py": """
import sys
from fusion.command import run
from fusion.config import EvaluateConfig
from fusion.evaluation import evaluate_by_groups
from text_only.config import Config
from text_only.model import build_network

if __name__ == "__main__":
    job = lambda settings: evaluate_by_groups(settings, Config, build_network)
    sys.exit(run(EvaluateConfig, job, None, module="text_only.evaluate_by_groups", doc=""))
""",
    "predict_test.py": """
import sys
from fusion.command import run
from fusion.config import PredictConfig
from fusion.prediction import predict_test
from text_only.config import Config
from text_only.model import build_network

if __name__ == "__main__":
    job = lambda settings: predict_test(settings, Config, build_network)
    sys.exit(run(PredictConfig, job, None, module="text_only.predict_test", doc=""))
""",
}


def test_a_third_variant_is_one_folder(catalog: Path, tmp_path: Path) -> None:
    package = tmp_path / "text_only"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    where, path = ["--output", str(tmp_path / "out"), "--device", "cpu"], {"PYTHONPATH": str(tmp_path)}
    trained = run_command("text_only.train", "--data", str(catalog), *where, "--epochs", "2", env=path)
    assert trained.code == 0, trained.err
    evaluated = run_command("text_only.evaluate_by_groups", *where, env=path)
    assert evaluated.code == 0 and "by price_bin" in evaluated.out
    assert run_command("text_only.predict_test", *where, env=path).code == 0
    assert pointers.read(SubmissionPointer, str(tmp_path / "out"), "submissions", "test", "current") is not None
