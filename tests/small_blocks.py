"""A training with blocks of 16 rows, mixed three at a time: `python -m tests.small_blocks [flags]`.

If FUSION_TEST_STOP_AT names a step, the last rank sends itself SIGTERM at it.
"""

import os
import sys
from collections.abc import Sequence

from fusion.all_embeddings import train
from fusion.training import order
from fusion.training.saver import Saver
from tests.stopping_train import stop_at


def main(flags: Sequence[str] | None = None) -> int:
    order.BLOCK, order.WINDOW = 16, 3
    if "FUSION_TEST_STOP_AT" in os.environ:
        Saver.agree = stop_at  # type: ignore[method-assign]
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
