"""Measures what each source is worth to a run: `python -m fusion.ablation --run-id RUN --output s3://bucket/output`.

The model predicts the run's validation rows with every subset of its sources; the other sources are marked missing. The
table shows, for each source, the SMAPE with it alone and without it, what is lost without it, and its Shapley value:
how much the source lowers the SMAPE, averaged over all orders in which sources can be added. Shapley values add up to
the difference between no source and all sources. Differences are means over rows, and standard errors come from groups
of near-duplicates.

The model has learned to predict with missing sources (--modality-dropout), but a model that was trained without a
source could be better. So what a source is really worth may be less than what is lost without it. Two sources with the
same information both seem worth little, because each replaces the other. For more than 6 sources, only some subsets are
computed. On a CPU: --device cpu.
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
