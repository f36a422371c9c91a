"""Predict the prices of test.csv with a run of all_embeddings, check them, and publish them.

    python -m fusion.all_embeddings.predict_test --output s3://bucket/output --name my-prices
    python -m fusion.all_embeddings.predict_test --output output --data new_data --device cpu

Writes submissions/<name>/<date>/<digest>/submission.csv in --output, and makes it the current one of this name. The
night's embeddings and prices are compared with those of the training and of the last submission; exit code 65 means
that they differ too much to be published.
"""

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
