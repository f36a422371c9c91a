"""Checks of sources that `fusion.prepare` wrote: their files, and that they are what the manifest says."""

from __future__ import annotations

import io

from fusion import storage
from fusion.data.inputs import UNFINISHED
from fusion.records.manifests import SOURCE_MANIFEST, Folder
from fusion.records.schemas import FileEntry, SourceManifest
from fusion.verify.findings import Report, check_content, first_line, parsed, read


def is_source(folder: str) -> bool:
    """Whether `fusion.prepare` has written this folder, or began to."""
    return bool({SOURCE_MANIFEST, UNFINISHED} & {storage.base(url) for url in storage.ls(folder)})


def prepared_sources(data: str) -> list[str]:
    """URLs of the folders of a data folder, `<data>/embeddings/<split>/<source>`, that `fusion.prepare` has written."""
    splits = [entry.url for entry in storage.entries(storage.join(data, "embeddings")) if entry.is_folder]
    folders = [entry.url for split in splits for entry in storage.entries(split) if entry.is_folder]
    return [folder for folder in folders if is_source(folder)]


def check_data(report: Report, data: str) -> None:
    """Checks all prepared sources of a data folder."""
    for folder in prepared_sources(data):
        with report.within("/".join(folder.split("/")[-3:])):
            check_source(report, Folder(folder))


def check_source(report: Report, folder: Folder) -> None:
    """Checks the manifest of a source, and every file, one after the other, as there may be many large ones."""
    there = {storage.base(url) for url in storage.ls(folder.url)}
    if UNFINISHED in there:
        report.note("not complete: `python -m fusion.prepare` was stopped; training refuses it")
        return
    manifest = parsed(report, SOURCE_MANIFEST, read(folder.at(SOURCE_MANIFEST)), SourceManifest)
    if manifest is None:
        return
    *_, above, split, source = ["", "", "", *folder.url.split("/")]
    if above == "embeddings":  # a copy elsewhere may have any name
        report.expect(f"{SOURCE_MANIFEST}: path", f"{split}/{source}", f"{manifest.split}/{manifest.source}")
    n_vectors = sum(_vectors_of(report, folder, entry, manifest) for entry in manifest.files)
    report.expect("vectors", manifest.vectors, n_vectors)
    for name in sorted(there - {entry.key for entry in manifest.files}):
        if name.endswith(".parquet") and name[0] not in "._":
            report.bad(name, "only the files of the manifest, as training reads all", "another file")


def _vectors_of(report: Report, folder: Folder, entry: FileEntry, manifest: SourceManifest) -> int:
    """Checks a file, and returns how many vectors it has; 0 if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read(folder.at(entry.key))
    check_content(report, entry.key, entry, content)
    if content is None:
        return 0
    try:
        with pq.ParquetFile(io.BytesIO(content)) as file:
            kind = file.schema_arrow.field("embedding").type
            found, n_rows = f"{kind.list_size} x {kind.value_type.to_pandas_dtype().__name__}", file.metadata.num_rows
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        report.bad(entry.key, "a Parquet file with vectors", first_line(error))
        return 0
    if found != f"{manifest.dim} x {manifest.dtype}":
        report.bad(entry.key, f"vectors of {manifest.dim} x {manifest.dtype}", found)
    return int(n_rows)
