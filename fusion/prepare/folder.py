"""The folder of a prepared source: its shards, and the manifest that commits them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass

from fusion import storage
from fusion.data.inputs import UNFINISHED, sources_folder
from fusion.errors import DataError, FusionError, UsageError
from fusion.prepare.claim import Claim, ReleasedError, claim, superseded
from fusion.records.contention import turns
from fusion.records.manifests import SOURCE_MANIFEST, Folder
from fusion.records.schemas import FileEntry, InputFile, SourceManifest, read_if_whole, seal
from fusion.storage import Entry
from fusion.storage.backend import store_of

_PARQUET = ".parquet"
STAGING = "_staging"


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

    def new_staging(self) -> str:
        """A folder for shards that the workers of a cluster write, and that are not yet checked."""
        return self.at(STAGING, uuid.uuid4().hex)

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

    def check_staged(self, staged: str, files: Iterable[FileEntry]) -> None:
        """Raises an error if not all of the files that workers wrote are in the folder `staged`.

        Raises:
            DataError: the folder is not one that all workers share.
            SupersededError: another command has written the source, and has removed them.
        """
        there = {storage.base(entry.url): entry.size for entry in storage.entries(staged)}
        lost = [entry.key for entry in files if there.get(entry.key) != entry.bytes]
        if lost and store_of(staged) != "/":
            raise superseded(self.url)
        if lost:
            message = f"{len(lost)} files that workers of the cluster have written are not in {staged}"
            raise DataError(message, "name a bucket with --to, or a folder that all nodes share")

    def publish(self, staged: str, manifest: SourceManifest) -> SourceManifest:
        """Replaces the files of the folder by those of the manifest. Until the end, training refuses to read it.

        Args:
            staged: URL of the folder that has these files.

        Raises:
            SupersededError: another command has begun to write the folder.
        """
        is_alone = True
        for _ in turns(self.url):
            held = claim(self.at(UNFINISHED))
            is_alone = is_alone and not held.contested
            with suppress(ReleasedError):
                self._write(held, staged, manifest)
                # A command that was superseded may have had one last write under way, which came after ours.
                if is_alone or self._has(manifest):
                    self._remove_staging()
                    held.release()
                    return manifest
            is_alone = False
        raise AssertionError("turns() raises an error after its last turn")

    def _write(self, held: Claim, staged: str, manifest: SourceManifest) -> None:
        try:
            storage.remove_temporary(self.url)
            for entry in manifest.files:
                held.check()
                _copy(storage.join(staged, entry.key), self.at(entry.key))
            for name in self._surplus(manifest):
                held.check()
                storage.remove(self.at(name))
            held.check()
            storage.write(self.at(SOURCE_MANIFEST), seal(asdict(manifest)))
        except FusionError:
            held.check()  # the cause may be that a newer command has removed what this one was writing
            raise

    def _remove_staging(self) -> None:
        """Removes what this command and others on clusters have staged; those that still run notice it."""
        if self.at(STAGING) in storage.ls(self.url):
            storage.remove(self.at(STAGING))

    def _surplus(self, manifest: SourceManifest) -> list[str]:
        """Names of the shards that the manifest does not have."""
        there = [storage.base(entry.url) for entry in storage.entries(self.url)]
        return [name for name in there if name.endswith(_PARQUET) and name not in {one.key for one in manifest.files}]

    def _has(self, manifest: SourceManifest) -> bool:
        """Whether the files of the folder are exactly those of the manifest; reads all of them."""
        expected = {entry.key: entry.sha256 for entry in manifest.files}
        expected[SOURCE_MANIFEST] = storage.sha256(seal(asdict(manifest)))
        return not self._surplus(manifest) and all(
            storage.sha256(storage.read_if_exists(self.at(name)) or b"") == sha256 for name, sha256 in expected.items()
        )


def _copy(source: str, target: str) -> None:
    """Copies a file, within a store if both are in one; else through this process."""
    if store_of(source) == store_of(target):
        storage.copy(source, target)
    else:
        storage.write(target, storage.read(source))
