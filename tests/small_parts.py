"""A command with resumable chunks of 16 rows: `python -m tests.small_parts predict_test|evaluate_by_groups [flags]`.

The last rank sends itself the signal that FUSION_TEST_SIGNAL names when it has written its second chunk. With
FUSION_TEST_BLOCKS, predictions read blocks of two chunks, and every row group by itself.
"""

import os
import signal
import sys
from importlib import import_module

from fusion.data.source_file import Part
from fusion.prediction import predict, resumable

write = resumable._write
written: list[str] = []


def write_and_signal(url: str, arrays: resumable.Arrays) -> None:
    write(url, arrays)
    written.append(url)
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if last and len(written) == 2 and "FUSION_TEST_SIGNAL" in os.environ:
        os.kill(os.getpid(), signal.Signals[os.environ["FUSION_TEST_SIGNAL"]])


if __name__ == "__main__":
    resumable.PART_ROWS, resumable._write = 16, write_and_signal
    if "FUSION_TEST_BLOCKS" in os.environ:
        predict.PART_ROWS, predict.BLOCK_PARTS = 16, 2
        Part.is_small = property(lambda _: False)  # type: ignore[assignment, method-assign]
    sys.exit(import_module(f"fusion.all_embeddings.{sys.argv[1]}").main(sys.argv[2:]))
