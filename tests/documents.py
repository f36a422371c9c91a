"""Changes documents of a bucket as a program of ours would: with a seal that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusion import storage
from fusion.records.schemas import seal


def edit(url: str | Path, **values: Any) -> None:
    """Sets keys of a document, and seals it again."""
    storage.write(str(url), seal(json.loads(storage.read(str(url))) | values))
