"""What each source is worth to a run: `python -m fusion.ablation --run-id RUN --output s3://bucket/output`.

The run's validation rows are priced again with every set of its sources, the others hidden, as a row that lacks them is
priced. A source is worth what it lowers the SMAPE by: alone, when all others are there, and on average over all orders
in which the sources can be joined (its Shapley value; these add up). Differences are taken row by row, and errors by
groups of near-duplicates. The model has learned to do without a source (--modality-dropout), but another one that never
had it could do better: what is lost without a source is at most this much, and two sources that say the same are both
worth little when the other is there. More than 6 sources are sampled. On a CPU: --device cpu.
"""

import sys
from collections.abc import Sequence

from fusion.command import run
from fusion.config import AblateConfig


def _job(settings: AblateConfig) -> None:
    from fusion.ablation.source_worth import ablate

    ablate(settings)


def main(argv: Sequence[str] | None = None) -> int:
    return run(AblateConfig, _job, argv, module="fusion.ablation", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
