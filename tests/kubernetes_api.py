"""A Kubernetes API server that stores objects and runs nothing (kmock), for a real kubectl to talk to."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

from kmock import KubernetesEmulator, ResourceInfo, Server, resource

VERBS = {"create", "delete", "get", "list", "patch", "update", "watch"}
KINDS = {
    "v1/configmaps": "ConfigMap",
    "v1/serviceaccounts": "ServiceAccount",
    "v1/services": "Service",
    "v1/pods": "Pod",
    "batch/v1/jobs": "Job",
    "batch/v1/cronjobs": "CronJob",
    "networking.k8s.io/v1/networkpolicies": "NetworkPolicy",
    "policy/v1/poddisruptionbudgets": "PodDisruptionBudget",
    "jobset.x-k8s.io/v1alpha2/jobsets": "JobSet",
}


class KubernetesApi:
    """Starts on construction, on loopback and a free port; `stop` ends it."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig.json"
        self.pods: list[object] = []  # what every list of pods shows
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(ready),))
        self._thread.start()
        assert ready.wait(60), "the API server did not start"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        api = KubernetesEmulator()
        for name, kind in KINDS.items():
            facts = ResourceInfo(kind=kind, singular=kind.lower(), namespaced=True, verbs=VERBS)
            api.resources[resource(name)] = facts
        api["get /api/v1"] << _core_resources()
        # kmock's own lists have no kind, and kubectl reads none without.
        api["get /api/v1/namespaces/fusion/pods"] << self._list_of_pods
        async with api, Server(api) as server:
            self._write_kubeconfig(str(server.url))
            ready.set()
            await self._ended.wait()

    def _list_of_pods(self) -> dict[str, object]:
        return {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": self.pods}

    def _write_kubeconfig(self, url: str) -> None:
        context = {"cluster": "test", "user": "test", "namespace": "fusion"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": context}],
        }
        self.kubeconfig.write_text(json.dumps(config))


def _core_resources() -> dict[str, object]:
    # kmock gives the core group's version as "/v1", where kubectl looks for "v1".
    names = [(name.removeprefix("v1/"), kind) for name, kind in KINDS.items() if name.startswith("v1/")]
    facts = [{"name": name, "kind": kind, "namespaced": True, "verbs": sorted(VERBS)} for name, kind in names]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1", "resources": facts}
