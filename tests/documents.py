"""Changes JSON documents of a bucket, and updates their seal (checksum) as the project's own code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusion import storage
from fusion.records.schemas import seal


def edit(url: str | Path, **values: Any) -> None:
    """Sets keys of a document, and updates its seal."""
    storage.write(str(url), seal(json.loads(storage.read(str(url))) | values))
