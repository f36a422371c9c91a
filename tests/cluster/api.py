"""Reads objects through `kubectl proxy`: tests poll three times per second, and a kubectl takes 0.2 s of CPU."""

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
    """HTTP over a Unix socket; the argument `host` is the path of the socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.host)


@dataclass(frozen=True)
class Api:
    """The API server behind a `kubectl proxy`; `proxy` is the path of its socket."""

    proxy: str

    def get(self, path: str, **query: str) -> Any:
        """The object or list at a path; None when there is none."""
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
