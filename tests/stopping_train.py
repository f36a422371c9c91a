"""A training in which the last rank sends itself SIGTERM at the step that FUSION_TEST_STOP_AT names."""

import os
import signal
import sys

from fusion.all_embeddings import train
from fusion.training.saver import Saver

agree = Saver.agree


def stop_at(saver: Saver, **options: bool) -> None:
    last = saver.world.rank == saver.world.size - 1
    if last and saver.fit.step >= int(os.environ["FUSION_TEST_STOP_AT"]):
        os.kill(os.getpid(), signal.SIGTERM)
    agree(saver, **options)


if __name__ == "__main__":
    Saver.agree = stop_at  # type: ignore[method-assign]
    sys.exit(train.main())
