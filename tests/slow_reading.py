"""A command that reads its input for more than 20 s: `python -m tests.slow_reading train|evaluate_by_groups [flags]`.

Every rank prints `reading` on standard error when it begins.
"""

import sys
import time
from importlib import import_module
from typing import Any

from fusion.data import source_file

vectors = source_file._vectors
begun: list[str] = []


def slowly(url: str, *arguments: Any) -> Any:
    if not begun:
        print("reading", file=sys.stderr, flush=True)
    begun.append(url)
    time.sleep(0.5)
    return vectors(url, *arguments)


if __name__ == "__main__":
    source_file.STREAM_ROWS, source_file._vectors = 2, slowly
    sys.exit(import_module(f"fusion.all_embeddings.{sys.argv[1]}").main(sys.argv[2:]))
