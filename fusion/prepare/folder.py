"""The folder of a prepared source: its shards, and the manifest that commits them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fusion import storage
from fusion.data.inputs import UNFINISHED
from fusion.errors import DataError, UsageError
from fusion.records.manifests import SOURCE_MANIFEST
from fusion.records.schemas import FileEntry, InputFile, SourceManifest, read_if_whole, seal
from fusion.storage import Entry

_PARQUET = ".parquet"
_NOTE = b"python -m fusion.prepare is writing this folder; if it was stopped, run it again\n"


def shard_name(number: int) -> str:
    return f"part-{number:05d}{_PARQUET}"


@dataclass(frozen=True)
class MadeFrom:
    """What decides the shards of a source; see `SourceManifest`."""

    table_sha256: str
    shard_rows: int
    inputs: tuple[InputFile, ...]


@dataclass(frozen=True)
class SourceFolder:
    """`<data>/embeddings/<split>/<source>/`."""

    data: str
    split: str
    source: str

    @property
    def url(self) -> str:
        return storage.join(self.data, "embeddings", self.split, self.source)

    def current(self, made_from: MadeFrom) -> SourceManifest | None:
        """The manifest in the folder, if its shards are there and were made from this; else None."""
        there = {storage.base(entry.url): entry.size for entry in storage.entries(self.url)}
        if SOURCE_MANIFEST not in there or UNFINISHED in there:
            return None
        found = read_if_whole(SourceManifest, storage.join(self.url, SOURCE_MANIFEST), "prepared_manifest_damaged")
        if found is None or MadeFrom(found.table_sha256, found.shard_rows, found.inputs) != made_from:
            return None
        shards = {name: size for name, size in there.items() if name.endswith(_PARQUET)}
        return found if shards == {entry.key: entry.bytes for entry in found.files} else None

    def check_replaceable(self, inputs: Iterable[Entry]) -> None:
        """Raises an error if the folder has files that this command has not written, or is read itself.

        Raises:
            UsageError: an input is in the folder.
            DataError: there are other files of this source.
        """
        for entry in inputs:
            if entry.url.startswith(f"{self.url}/"):
                raise UsageError(f"{entry.url} is read, and would be replaced", "name another folder with --to")
        beside = storage.join(self.data, "embeddings", self.split)
        names = {storage.base(entry.url) for entry in storage.entries(beside)}
        if f"{self.source}{_PARQUET}" in names:
            raise self._not_ours(f"{self.url}{_PARQUET}")
        there = {storage.base(entry.url) for entry in storage.entries(self.url)}
        if not there & {SOURCE_MANIFEST, UNFINISHED} and any(name.endswith(_PARQUET) for name in there):
            raise self._not_ours(self.url)

    def _not_ours(self, url: str) -> DataError:
        message = f"{url} exists, and this command has not written it"
        return DataError(message, "move it away, or name another folder with --to, or the source otherwise")

    def publish(self, shards: Sequence[Path], manifest: SourceManifest) -> SourceManifest:
        """Replaces the files of the folder by these shards. Until the end, training refuses to read it."""
        storage.write(storage.join(self.url, UNFINISHED), _NOTE)
        storage.remove_temporary(self.url)
        written = [self._write(shard) for shard in shards]
        names = {entry.key for entry in written}
        for entry in storage.entries(self.url):
            if entry.url.endswith(_PARQUET) and storage.base(entry.url) not in names:
                storage.remove(entry.url)
        manifest = replace(manifest, files=written)
        storage.write(storage.join(self.url, SOURCE_MANIFEST), seal(asdict(manifest)))
        storage.remove(storage.join(self.url, UNFINISHED))
        return manifest

    def _write(self, shard: Path) -> FileEntry:
        content = shard.read_bytes()
        storage.write(storage.join(self.url, shard.name), content)
        shard.unlink()
        return FileEntry(shard.name, len(content), storage.sha256(content))
