"""`fusion.verify` finds every change of a folder that `fusion.prepare` wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusion.errors import DataError
from fusion.prepare.__main__ import main
from fusion.verify.__main__ import verify
from tests.prepare.test_prepare import IDS, VECTORS, parquet
from tests.verify.test_verify_everything import Mutation, mutations, wrong


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared sources of the same table."""
    folder = tmp_path_factory.mktemp("prepared")
    np.savetxt(folder / "table.csv", IDS, "%d", header="sample_id", comments="")
    flags = ["--table", str(folder / "table.csv"), "--to", str(folder / "data"), "--shard-rows", "60"]
    for name, shift in (("a", 0), ("b", 1)):
        flags += ["--source", f"{name}={parquet(folder / f'{name}.parquet', IDS, VECTORS + shift)}"]
    assert main(flags) == 0
    return folder / "data"


def test_prepared_data_pass(data: Path) -> None:
    assert {finding.verdict for finding in verify(str(data))} == {"ok"}
    assert {finding.verdict for finding in verify(str(data / "embeddings/train/a"))} == {"ok"}


def is_found(mutation: Mutation, data: Path) -> bool:
    before = {path: path.read_bytes() for path in mutation[1]}
    try:
        for path, content in mutation[1].items():
            path.unlink() if content is None else path.write_bytes(content)
        return bool(wrong(data))
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_every_change_is_found(data: Path) -> None:
    tried = list(mutations(data / "embeddings"))
    missed = {mutation[0] for mutation in tried if not is_found(mutation, data)}
    # Without its manifest, a folder is a source like any other, about which nothing is known.
    assert missed == {"train/a/_MANIFEST.json: removed", "train/b/_MANIFEST.json: removed"}
    assert len(tried) > 60


def test_a_file_beside_the_shards_is_found(data: Path) -> None:
    added = data / "embeddings/train/a/part-00009.parquet"
    added.write_bytes((data / "embeddings/train/a/part-00000.parquet").read_bytes())
    assert len(wrong(data)) == 1 and "another file" in wrong(data)[0]
    added.unlink()


def test_a_folder_that_was_not_completed_is_a_note(data: Path) -> None:
    marker = data / "embeddings/train/a/_UNFINISHED"
    marker.write_bytes(b"")
    (note,) = verify(str(marker.parent))
    assert note.verdict == "note" and "training refuses it" in note.what
    marker.unlink()


def test_a_folder_of_other_files_is_none_of_the_kinds(tmp_path: Path) -> None:
    parquet(tmp_path / "embeddings/train/a/x.parquet", IDS, VECTORS)
    with pytest.raises(DataError, match="does not exist, or has neither"):
        verify(str(tmp_path))
