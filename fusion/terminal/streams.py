"""Standard output and error to which writing never fails, because display must not change how a command ends.

If the reader has exited (`| head`), the stream is closed (`2>&-`), the disk is full, the terminal is gone or the
encoding lacks a character, then the text is dropped and the command continues.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

# Errors of a write that cannot succeed. OSError: no reader, no space, no terminal. ValueError: the stream is closed.
LOST = (OSError, ValueError)
STDIN, STDOUT, STDERR = 0, 1, 2
# Held by the thread that writes a line of the log, or that starts or ends a bar. Otherwise a line that another thread
# writes as the bar ends would bring the bar back, for good.
WRITING = threading.RLock()


class Unfailing(io.TextIOBase):
    """Wraps a text stream. Text that cannot be written is dropped; characters that it cannot encode become `?`."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> IO[bytes]:
        """The underlying binary stream; writing to it can fail."""
        return io.BytesIO() if self._stream is None else self._stream.buffer  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with suppress(*LOST):
            if self._stream is not None:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(*LOST):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with suppress(*LOST):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no such stream")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True


def has_colours(stream: Unfailing) -> bool:
    """Whether colours can be shown: on a terminal that has them, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def unfailing() -> Iterator[None]:
    """Inside the block, printing never fails, and neither does Python's flush when the process exits later."""
    if isinstance(sys.stdout, Unfailing):
        yield
        return
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unfailing(before[0]), Unfailing(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for number, stream in zip((STDOUT, STDERR), before, strict=True):
            _settle(number, stream)


def _open_closed() -> None:
    """Opens /dev/null in place of each closed standard stream.

    Otherwise the next file that is opened would get the stream's number, and what is printed would go into that file.
    """
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == number, "the lowest free number is taken"
            os.set_inheritable(number, True)  # child processes need it for the same reason


def _settle(number: int, stream: IO[str] | None) -> None:
    """Flushes a stream, and redirects it to /dev/null if that fails.

    Otherwise Python's own flush at exit would fail again and change the exit code to 120.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except LOST:
        with suppress(*LOST):
            if stream.fileno() == number:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
