"""The folder of a prepared source: its shards, and the manifest that commits them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fusion import storage
from fusion.data.inputs import UNFINISHED, sources_folder
from fusion.errors import DataError, UsageError
from fusion.records.manifests import SOURCE_MANIFEST, Folder
from fusion.records.schemas import InputFile, SourceManifest, read_if_whole, seal
from fusion.storage import Entry
from fusion.storage.backend import store_of

_PARQUET = ".parquet"
_NOTE = b"python -m fusion.prepare is writing this folder; if it was stopped, run it again\n"


@dataclass(frozen=True)
class MadeFrom:
    """What decides the shards of a source; see `SourceManifest`."""

    table_sha256: str
    shard_rows: int
    inputs: tuple[InputFile, ...]


class SourceFolder(Folder):
    """`<data>/embeddings/<split>/<source>/`."""

    @classmethod
    def of(cls, data: str, split: str, source: str) -> SourceFolder:
        return cls(storage.join(sources_folder(data, split), source))

    @property
    def split(self) -> str:
        return self.url.split("/")[-2]

    @property
    def staging(self) -> str:
        """Where the workers of a cluster write shards that are not yet checked."""
        return self.at("_staging")

    def current(self, made_from: MadeFrom) -> SourceManifest | None:
        """The manifest in the folder, if its shards are there and were made from this; else None."""
        there = {storage.base(entry.url): entry.size for entry in storage.entries(self.url)}
        if SOURCE_MANIFEST not in there or UNFINISHED in there:
            return None
        found = read_if_whole(SourceManifest, self.at(SOURCE_MANIFEST), "prepared_manifest_damaged")
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
        beside = self.url.rpartition("/")[0]
        if f"{self.url}{_PARQUET}" in {entry.url for entry in storage.entries(beside)}:
            raise self._not_ours(f"{self.url}{_PARQUET}")
        there = {storage.base(entry.url) for entry in storage.entries(self.url)}
        if not there & {SOURCE_MANIFEST, UNFINISHED} and any(name.endswith(_PARQUET) for name in there):
            raise self._not_ours(self.url)

    def _not_ours(self, url: str) -> DataError:
        message = f"{url} exists, and this command has not written it"
        return DataError(message, "move it away, or name another folder with --to, or the source otherwise")

    def publish(self, staged: str, manifest: SourceManifest) -> SourceManifest:
        """Replaces the files of the folder by those of the manifest. Until the end, training refuses to read it.

        Args:
            staged: URL of the folder that has these files.
        """
        storage.write(self.at(UNFINISHED), _NOTE)
        storage.remove_temporary(self.url)
        for entry in manifest.files:
            _copy(storage.join(staged, entry.key), self.at(entry.key))
        names = {entry.key for entry in manifest.files}
        for found in storage.entries(self.url):
            if found.url.endswith(_PARQUET) and storage.base(found.url) not in names:
                storage.remove(found.url)
        storage.write(self.at(SOURCE_MANIFEST), seal(asdict(manifest)))
        storage.remove(self.at(UNFINISHED))
        return manifest


def _copy(source: str, target: str) -> None:
    """Copies a file, within a store if both are in one; else through this process."""
    if store_of(source) == store_of(target):
        storage.copy(source, target)
    else:
        storage.write(target, storage.read(source))
