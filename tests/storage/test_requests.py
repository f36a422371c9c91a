"""The number of requests per command. Object stores bill each request, and each takes 20 to 100 ms."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from fusion.all_embeddings import predict_test, train
from tests.conftest import DIMS, SMALL, upload
from tests.fault_proxy import FaultProxy
from tests.s3_server import S3Server

N_FILES, N_GROUPS = 25, 2  # of each of the four sources, and the row groups of a file


@pytest.fixture(scope="module")
def prepared(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `out`, and data with sources of many files."""
    folder = tmp_path_factory.mktemp("requests")
    shutil.copytree(catalog, folder / "data")
    where = ["--data", str(folder / "data"), "--output", str(folder / "out")]
    assert train.main([*where, *SMALL, "--run-id", "r", "--epochs", "1"]) == 0
    for role in DIMS:
        split_up(folder / "data/embeddings/test" / f"{role}.parquet")
    return folder


def split_up(single: Path) -> None:
    table = pq.read_table(single)
    folder = single.with_suffix("")
    folder.mkdir()
    n_rows = -(-len(table) // N_FILES)
    for number in range(N_FILES):
        part = table.slice(number * n_rows, n_rows)
        pq.write_table(part, folder / f"{number:03d}.parquet", row_group_size=-(-len(part) // N_GROUPS))
    single.unlink()


@pytest.fixture
def proxy(s3: S3Server, prepared: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    upload(prepared, bucket)
    counted = FaultProxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", counted.endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield counted
    counted.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_number_of_requests_per_command(proxy: FaultProxy, bucket: str) -> None:
    def night(date: str) -> list[str]:
        proxy.seen.clear()
        flags = ["--data", f"{bucket}/data", "--output", f"{bucket}/out", "--date", date, "--device", "cpu"]
        assert predict_test.main(flags) == 0
        return list(proxy.seen)

    first = night("2026-01-02")
    sources = [request for request in first if "/embeddings/" in request]
    n_files = len(DIMS) * N_FILES
    # Small files are fetched whole, whatever row groups they have; see test_source_file.py for larger ones.
    assert len([request for request in sources if ".parquet" in request]) == n_files
    assert len([request for request in sources if "list-type" in request]) == 2, "before and after reading"
    assert not [request for request in sources if request.startswith("HEAD")]
    assert len(first) - len(sources) <= 30, "the model, the table, and what is written"

    assert len(night("2026-01-02")) <= 6, proxy.seen  # nothing has changed
    assert len(night("2026-01-03")) <= 11, proxy.seen  # nothing has changed, and it is published for another day
