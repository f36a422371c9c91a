"""Runs the tests of this folder on a real Kubernetes: `make test-cluster`, or `python -m tests.cluster [FLAGS]`.

They run on the cluster of KUBECONFIG. Without KUBECONFIG, a cluster is started from the binaries in the folder that
FUSION_KUBERNETES names, and removed afterwards. Without either the tests are skipped. `k8s/README.md` explains both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.cluster.cluster import MissingError, prepared

N_PROCESSES = 6  # tests mostly wait for pods


def main(argv: Sequence[str]) -> int:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # unlike SIGTERM, sys.exit lets `prepared` remove the cluster
    begun = time.monotonic()
    try:
        with prepared() as cluster:
            print(f"the cluster is ready after {time.monotonic() - begun:.0f} s", flush=True)
            flags = [
                "-m",
                "cluster",
                f"--numprocesses={N_PROCESSES}",
                "--dist=loadscope",
                "--no-loadscope-reorder",
                "--durations=0",
                *argv,
            ]
            command = [sys.executable, "-m", "pytest", *flags, "tests/cluster"]
            code = subprocess.run(command, check=False, env={**os.environ, **cluster.variables()}).returncode
    except MissingError as missing:
        is_required = os.environ.get("FUSION_REQUIRE_SERVICES") == "1"
        print(f"{'error' if is_required else 'skipped'}: {missing}", file=sys.stderr)
        return int(is_required)
    print(f"the tests on a cluster took {time.monotonic() - begun:.0f} s in all", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
