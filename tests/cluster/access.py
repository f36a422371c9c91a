"""Makes keys, certificates and kubeconfigs of a cluster for one test run."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

NAMES = "subjectAltName=IP:127.0.0.1,IP:10.96.0.1,DNS:localhost"
USERS = {"admin": "/O=system:masters/CN=admin", "node": "/O=system:nodes/CN=system:node:localhost"}


def make(folder: Path, server: str) -> None:
    """Writes keys and certificates `ca`, `api`, `sa`, `admin` and `node`, and a kubeconfig for admin and node."""
    folder.mkdir()
    _openssl(folder, "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=ca")
    (folder / "names").write_text(NAMES)
    for name, subject in {"api": "/CN=localhost", **USERS}.items():
        _openssl(folder, f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj {subject}")
        signed = f"-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out {name}.crt -extfile names"
        _openssl(folder, f"x509 -req -in {name}.csr {signed}")
    _openssl(folder, "genrsa -out sa.key 2048")
    _openssl(folder, "rsa -in sa.key -pubout -out sa.pub")
    for user in USERS:
        (folder / f"{user}.conf").write_text(json.dumps(_kubeconfig(folder, user, server)))


def _openssl(folder: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True, cwd=folder)


def _kubeconfig(folder: Path, user: str, server: str) -> dict[str, object]:
    cluster = {"server": server, "certificate-authority-data": encoded(folder / "ca.crt")}
    keys = {f"client-{kind}-data": encoded(folder / f"{user}.{end}") for kind, end in KEYS.items()}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": user, "user": keys}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": user}}],
    }


KEYS = {"certificate": "crt", "key": "key"}


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
