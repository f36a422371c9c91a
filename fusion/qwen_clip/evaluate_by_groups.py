"""Evaluate a run of qwen_clip on its own validation rows: by price, by missing sources and by any column.

    python -m fusion.qwen_clip.evaluate_by_groups --output s3://bucket/output --by category
    python -m fusion.qwen_clip.evaluate_by_groups --output output --run-id my-run-1 --device cpu

Writes metrics/ in the run's folder: summary.json, and groups.csv and groups.parquet with one row per group. Sources
have the names that the run was trained with.
"""

import sys
from collections.abc import Sequence

from fusion.command import run
from fusion.config import EvaluateConfig
from fusion.qwen_clip.config import Config


def _job(settings: EvaluateConfig) -> None:
    from fusion.evaluation import evaluate_by_groups
    from fusion.qwen_clip.model import build_network

    evaluate_by_groups(settings, Config, build_network)


def main(argv: Sequence[str] | None = None) -> int:
    return run(EvaluateConfig, _job, argv, module="fusion.qwen_clip.evaluate_by_groups", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
