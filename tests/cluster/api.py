"""Reads objects by `kubectl proxy`: tests look three times a second, and a kubectl takes 0.2 s of a core."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from tests.manifests import Object

GROUPS = {
    "jobs": "apis/batch/v1",
    "jobsets": "apis/jobset.x-k8s.io/v1alpha2",
    "networkpolicies": "apis/networking.k8s.io/v1",
    "pods": "api/v1",
    "services": "api/v1",
    "workloads": "apis/kueue.x-k8s.io/v1beta2",
}


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket, whose path stands where the host does."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.host)


@dataclass(frozen=True)
class Api:
    """Answers of the API server behind the socket of a `kubectl proxy`."""

    proxy: str

    def get(self, path: str, **query: str) -> Any:
        """What is at a path; None where there is nothing."""
        connection = _Connection(self.proxy)
        try:
            connection.request("GET", f"/{path}?{urlencode(query)}", headers={"Host": "localhost"})
            answer = connection.getresponse()
            said = answer.read()
        finally:
            connection.close()
        if answer.status == 404:
            return None
        assert answer.status == 200, said.decode()
        return json.loads(said)

    def one(self, namespace: str, kind: str, name: str) -> Object | None:
        return self.get(f"{GROUPS[kind]}/namespaces/{namespace}/{kind}/{name}")

    def items(self, namespace: str, kind: str, selector: str = "") -> list[Object]:
        return self.get(f"{GROUPS[kind]}/namespaces/{namespace}/{kind}", labelSelector=selector)["items"]
