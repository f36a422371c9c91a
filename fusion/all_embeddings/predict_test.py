"""Predict test.csv with a run of all_embeddings: `python -m fusion.all_embeddings.predict_test --output s3://bucket/output`."""

import sys
from collections.abc import Sequence

from fusion.all_embeddings.config import Config
from fusion.command import run
from fusion.config import PredictConfig


def _job(settings: PredictConfig) -> None:
    from fusion.all_embeddings.model import build_network
    from fusion.prediction import predict_test

    predict_test(settings, Config, build_network)


def main(argv: Sequence[str] | None = None) -> int:
    return run(PredictConfig, _job, argv, module="fusion.all_embeddings.predict_test", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
