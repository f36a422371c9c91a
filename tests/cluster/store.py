"""A real S3 server in a pod, with the data that the jobs of the tests read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import boto3

from fusion.demo.catalog import generate
from tests.conftest import BUCKET, DIMS
from tests.s3_server import IDENTITIES, KEY, SECRET

IMAGE = "localhost/weed:test"
NAMESPACE, PORT = "fusion-tests-store", 8333
ENDPOINT = f"http://store.{NAMESPACE}.svc:{PORT}"  # for pods
FLAGS = "-logtostderr=true server -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -master.telemetry=false "
FLAGS += f"-master.electionTimeout=1s -master.volumeSizeLimitMB=256 -volume.max=50 -filer -s3 -s3.port={PORT} "
FLAGS += "-s3.config=/settings/s3.json -s3.port.iceberg=0 -s3.port.lance=0"
N_PRODUCTS = 303


def manifest(image: str) -> str:
    """The objects of the S3 server as JSON, for `kubectl apply`."""
    labels = {"app": "store"}
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in ("data", "tmp", "settings")]  # sockets are in /tmp
    ready = {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 1}
    container = {"name": "store", "image": image, "imagePullPolicy": "IfNotPresent", "args": FLAGS.split()}
    container |= {"volumeMounts": mounts, "readinessProbe": ready}
    volumes: list[object] = [{"name": name, "emptyDir": {}} for name in ("data", "tmp")]
    volumes += [{"name": "settings", "configMap": {"name": "settings"}}]
    spec = {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 1}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels, "ports": [{"port": PORT}]}
    items = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        _object("ConfigMap", "settings", data={"s3.json": json.dumps(IDENTITIES)}),
        _object("Service", "store", spec=service),
        _object("Pod", "store", labels, spec=spec),
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def _object(kind: str, name: str, labels: dict[str, str] | None = None, **rest: object) -> dict[str, object]:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **rest}


def fill(endpoint: str) -> None:
    """Creates the bucket, and uploads a small catalog to `data`."""
    client = boto3.client(
        "s3", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket=BUCKET)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), n_products=N_PRODUCTS, dims=DIMS)
        for path in sorted(Path(folder).rglob("*.*")):
            client.upload_file(str(path), BUCKET, f"data/{path.relative_to(folder)}")
