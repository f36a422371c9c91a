"""A namespace for each test, on the cluster that `python -m tests.cluster` has prepared."""

from __future__ import annotations

import re
from collections.abc import Iterator

import fsspec
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.cluster.cluster import Cluster
from tests.cluster.namespace import Namespace
from tests.s3_server import KEY, SECRET

SHARED = ("test_apply.py", "test_exit_codes.py")  # files whose tests share a namespace and so must run in one process


class _OneByOne(LoadScopeScheduling):
    """Schedules single tests, except those of the files SHARED, which stay together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith(SHARED) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return _OneByOne(config, log)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster. The environment of this process is set for its S3 server."""
    found = Cluster.of_tests()
    if not found:
        pytest.skip("`make test-cluster` starts the cluster that this needs")
    where = {"AWS_ENDPOINT_URL_S3": found.endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**where, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield found


@pytest.fixture(scope="session")
def node(cluster: Cluster) -> Cluster:
    """The cluster if it was started for the tests, so that they may stop its node; it has JobSet and Kueue."""
    if not cluster.folder:
        pytest.skip("needs a cluster that was started for the tests, and not that of KUBECONFIG")
    return cluster


@pytest.fixture
def namespace(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Namespace]:
    yield from made(cluster, request.node.name, tmp_path_factory)


def made(cluster: Cluster, name: str, folders: pytest.TempPathFactory) -> Iterator[Namespace]:
    """A namespace with the name of its test."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).removeprefix("test-")[:50].strip("-")
    namespace = Namespace(cluster, f"fusion-{plain}", folders.mktemp("k8s"))
    try:
        yield namespace
    finally:
        namespace.remove()
