"""Evaluate a run of all_embeddings on its own validation rows: by price, by missing sources and by any column.

    python -m fusion.all_embeddings.evaluate_by_groups --output s3://bucket/output --by category
    python -m fusion.all_embeddings.evaluate_by_groups --output output --run-id my-run-1 --device cpu

Writes metrics/ in the run's folder: summary.json, and groups.csv and groups.parquet with one row per group. Sources
have the names that the run was trained with.
"""

import sys
from collections.abc import Sequence

from fusion.all_embeddings.config import Config
from fusion.command import run
from fusion.config import EvaluateConfig


def _job(settings: EvaluateConfig) -> None:
    from fusion.all_embeddings.model import build_network
    from fusion.evaluation import evaluate_by_groups

    evaluate_by_groups(settings, Config, build_network)


def main(argv: Sequence[str] | None = None) -> int:
    return run(EvaluateConfig, _job, argv, module="fusion.all_embeddings.evaluate_by_groups", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
