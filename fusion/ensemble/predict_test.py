"""Predicts test.csv with an ensemble: `python -m fusion.ensemble.predict_test --output s3://bucket/output`.

`python -m fusion.ensemble` makes ensembles. The runs that are members of an ensemble have to stay under --output,
because predictions read their checkpoints.
"""

import sys
from collections.abc import Sequence

from fusion.command import run
from fusion.config import PredictConfig


def _job(settings: PredictConfig) -> None:
    from fusion.ensemble.prediction import predict_test

    predict_test(settings)


def main(argv: Sequence[str] | None = None) -> int:
    return run(PredictConfig, _job, argv, module="fusion.ensemble.predict_test", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
