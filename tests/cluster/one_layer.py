"""Makes container images of one layer, for programs without dependencies. Needs no image builder."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path


def one_layer(archive: Path, name: str, files: Mapping[str, Path]) -> Path:
    """Writes an image with these files in its root folder; its entry point is the first of them."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as packed:
        for place, path in files.items():
            packed.add(path.resolve(), arcname=place)
    content = layer.getvalue()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]}
    settings = {"Entrypoint": [f"/{next(iter(files))}"]}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": settings, "rootfs": rootfs}).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(archive, "w") as packed:
        for place, data in {"layer.tar": content, "config.json": config, "manifest.json": manifest}.items():
            entry = tarfile.TarInfo(place)
            entry.size = len(data)
            packed.addfile(entry, io.BytesIO(data))
    return archive
