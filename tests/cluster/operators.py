"""Starts the controllers of JobSet and Kueue with their webhooks, as processes of this machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import yaml

from tests.cluster import access
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.services import free_ports, listens, until
from tests.manifests import Object

FIXED = Path("/etc/kueue/metrics/certs")  # Kueue reads a certificate here, and has no setting for it
SETTINGS = {
    "jobset": "apiVersion: config.jobset.x-k8s.io/v1alpha1\nkind: Configuration\n",
    "kueue": "apiVersion: config.kueue.x-k8s.io/v1beta2\nkind: Configuration\n"
    "integrations: {frameworks: [batch/job, jobset.x-k8s.io/jobset]}\n",
}
SHARED = """\
internalCertManagement: {{enable: false}}
leaderElection: {{leaderElect: false}}
metrics: {{bindAddress: "127.0.0.1:{metrics}"}}
health: {{healthProbeBindAddress: "127.0.0.1:{health}"}}
webhook: {{host: 127.0.0.1, port: {port}, certDir: {certificates}}}
"""
FLAGS = {"jobset": (), "kueue": ("--feature-gates=VisibilityOnDemand=false",)}
# Paths of the webhooks that are registered. Kueue's manifest has webhooks for all kinds of jobs, also those not
# installed.
SERVED = {"jobset": re.compile(""), "kueue": re.compile("kueue-x-k8s-io|batch-v1-job$|jobset$")}


def start(kubernetes: Kubernetes) -> None:
    """Starts JobSet and Kueue. Kueue manages the Jobs and JobSets that have a label with a queue."""
    certificates = kubernetes.folder / "webhooks"
    for folder in (certificates, FIXED):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(kubernetes.folder / "pki" / "api.crt", folder / "tls.crt")
        shutil.copy(kubernetes.folder / "pki" / "api.key", folder / "tls.key")
    for name in SETTINGS:
        _start(kubernetes, name, certificates)


def remove_traces() -> None:
    """Removes the files that `start` has written outside of the cluster's folder."""
    shutil.rmtree(FIXED.parents[1], ignore_errors=True)


def _start(kubernetes: Kubernetes, name: str, certificates: Path) -> None:
    definitions = f"--filename={kubernetes.binaries / name / 'crd.yaml'}"
    kubernetes.kubectl("apply", "--server-side", definitions)
    established = "wait", "--for=condition=Established", "--timeout=30s", definitions
    until(lambda: kubernetes.answers(*established), f"the definitions of {name}")
    port, metrics, health = free_ports(3)
    settings = kubernetes.folder / f"{name}.yaml"
    more = SHARED.format(port=port, metrics=metrics, health=health, certificates=certificates)
    settings.write_text(SETTINGS[name] + more)
    files = "--config", settings, "--kubeconfig", kubernetes.kubeconfig
    kubernetes.service(name).run(kubernetes.unpacked(name), *files, *FLAGS[name])
    until(lambda: listens(port), f"the webhooks of {name}")
    registered = yaml.safe_load_all((kubernetes.binaries / name / "webhooks.yaml").read_text())
    ca = access.encoded(kubernetes.folder / "pki" / "ca.crt")
    items = [_here(one, name, port, ca) for one in registered if one]
    kubernetes.kubectl("apply", "--filename=-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def _here(registered: Object, name: str, port: int, ca: str) -> Object:
    """A webhook configuration with loopback URLs in place of services, and with the controller's name in its own."""
    hooks = []
    for hook in registered["webhooks"]:
        path = hook["clientConfig"]["service"]["path"]
        if SERVED[name].search(path):
            hooks.append(hook | {"clientConfig": {"url": f"https://127.0.0.1:{port}{path}", "caBundle": ca}})
    return registered | {"metadata": {"name": f"{registered['metadata']['name']}-{name}"}, "webhooks": hooks}
