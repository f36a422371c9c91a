"""Runs a Ray cluster of two nodes with one CPU each, on this machine, until its standard input is closed.

    python -m tests.prepare.ray_cluster

Prints the cluster's address in a line of its own. The nodes have none of the variables with which clients find a store.
"""

from __future__ import annotations

import os
import sys
import tempfile

from ray.cluster_utils import Cluster

STORE = 80 * 2**20  # bytes of each node's object store; 75 MiB is the least that Ray accepts

if __name__ == "__main__":
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_", "FUSION_"))]:
        del os.environ[name]
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    os.chdir(tempfile.gettempdir())
    node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
