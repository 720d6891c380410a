"""The checksum of everything that is stored."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import google_crc32c

BLOCK_BYTES = 1 << 20


def crc32c(source: Path | bytes) -> int:
    """Return the CRC32C (Castagnoli) of a file or of bytes, as GCS computes it."""
    if isinstance(source, bytes):
        return int(google_crc32c.value(source))
    with source.open("rb") as file:
        return size_and_crc32c(file)[1]


def size_and_crc32c(file: BinaryIO) -> tuple[int, int]:
    """Return the bytes that are left to read in an open file, and their CRC32C."""
    size = value = 0
    while block := file.read(BLOCK_BYTES):
        size, value = size + len(block), google_crc32c.extend(value, block)
    return size, value
