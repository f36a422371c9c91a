"""Checks of `tensorboard/` in a run: each event file is whole, by the checksums that its records contain."""

from __future__ import annotations

import re
import struct
from functools import cache

from fusion import storage
from fusion.records.run import RunFolder
from fusion.verify.findings import Report, read

NAME = re.compile(r"events\.out\.tfevents\.\d{8}\.fusion")
POLYNOMIAL = 0x82F63B78  # of CRC-32C, bits reversed
MASK = 0xA282EAD8  # TFRecord stores checksums rotated and with this added


def check_segments(report: Report, run: RunFolder) -> None:
    """Checks all event files. A run without --tensorboard has none, and an epoch may be missing: its write failed."""
    for url in storage.ls(run.tensorboard):
        name = f"tensorboard/{storage.base(url)}"
        content = read(url)
        if not NAME.fullmatch(storage.base(url)):
            report.note(f"{name}: it was not written by a training")
        elif content is None or not is_whole(content):
            report.bad(name, "whole records", "a damaged one")
        else:
            report.ok(name)


def is_whole(content: bytes) -> bool:
    """Whether bytes are a sequence of TFRecords: length (8 bytes) and its checksum, data and their checksum."""
    start = 0
    while start < len(content):
        head = content[start : start + 12]
        if len(head) < 12 or not _matches(head[:8], head[8:]):
            return False
        end = start + 12 + struct.unpack("<Q", head[:8])[0]
        if not _matches(content[start + 12 : end], content[end : end + 4]):
            return False
        start = end + 4
    return bool(content)


def _matches(data: bytes, checksum: bytes) -> bool:
    return len(checksum) == 4 and struct.unpack("<I", checksum)[0] == _masked(_crc32c(data))


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _table()[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table
