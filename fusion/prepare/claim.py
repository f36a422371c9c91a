"""Keeps two commands apart that write the folder of one source at the same time: the newest one completes it.

The marker `_UNFINISHED` is in the folder while its files are replaced, and contains a token of the command that writes
them. A command that begins replaces the marker by its own, by compare-and-swap. Another command that was writing, or
was killed, is superseded by that: it compares the token before each of its writes, and ends.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from fusion import storage
from fusion.errors import SupersededError
from fusion.records.contention import turns

_NOTE = "python -m fusion.prepare is writing this folder; if it was stopped, run it again"


class ReleasedError(Exception):
    """The marker is gone, so that another command has completed the folder, or removed this marker for its own."""


@dataclass(frozen=True)
class Claim:
    """The right to write the files of a folder.

    Attributes:
        url: of the marker.
        content: of the marker; it identifies the holder.
        contested: whether there was another marker, so that another command may still be writing a file.
    """

    url: str
    content: bytes
    contested: bool

    def check(self) -> None:
        """Raises SupersededError if another command has taken over, ReleasedError if there is no marker."""
        found = storage.read_if_exists(self.url)
        if found is None:
            raise ReleasedError
        if found != self.content:
            raise superseded(self.url.rpartition("/")[0])

    def release(self) -> None:
        """Removes the marker. Raises the errors of `check` instead if it is not that of this command."""
        self.check()
        storage.remove(self.url)


def claim(url: str) -> Claim:
    """Writes the marker, in place of any other."""
    content = f"{_NOTE}\n{uuid.uuid4().hex}\n".encode()
    for _ in turns(url):
        held = storage.read_version(url)
        is_written = storage.create(url, content) if held is None else storage.replace(url, content, held[1])
        if is_written:
            return Claim(url, content, contested=held is not None)
    raise AssertionError("turns() raises an error after its last turn")


def superseded(folder: str) -> SupersededError:
    """The error for a command after which another one has begun to write, or has written, the same folder."""
    message = f"another fusion.prepare has written {folder} since this one began"
    return SupersededError(message, "let it finish; if it was given other files, run this command again afterwards")
