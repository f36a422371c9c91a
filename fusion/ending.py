"""How a rank reports the error that ends it."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from fusion.errors import FusionError


def tell(error: FusionError, trace: str = "") -> None:
    """To the launcher that started this rank, which says it once; without one, on standard error."""
    rank, folder = os.environ.get("RANK", "0"), os.environ.get("FUSION_EXIT_DIR")
    if folder:
        told = {"code": error.code, "error": error.message, "hint": error.remedy, "time": time.time()}
        with suppress(OSError):  # a full disk: then say it here
            Path(folder, f"{rank}.json").write_text(json.dumps(told | {"traceback": trace}))
            return
    if trace or folder or rank == "0":  # what users can mend goes wrong on all ranks alike: one of them speaks
        print(f"{trace}{error.report()}", file=sys.stderr, flush=True)
