"""Files of tar archives, read without writing anything to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from job.data.records import ONLY
from job.domain.disk import disk_errors
from job.domain.errors import InvalidData

BLOCK = 1 << 18  # bytes
LARGEST_MEMBER = 64 << 20  # bytes; twice what the largest expected file needs, so no archive fills memory


def read_archive(archive: Path, folder: str, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the files ``folder/<name>`` of a .tar or .tar.gz in its order.

    Raises:
        InvalidData: a member lies outside ``folder``, is a link or a device, or the archive is damaged.
    """
    with disk_errors("read", archive):
        try:
            with _uncompressed(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if _is_apples(path):
                        continue
                    _refuse_unsafe(archive, member, path, folder)
                    if len(path.parts) == 2 and path.name in names and (file := tar.extractfile(member)):
                        yield path.name, file.read()
                while stream.read(BLOCK):  # to its end, where the checksum of the whole is
                    pass
        # The last two: headers that hold no numbers, or that stand for each other without end.
        except (
            tarfile.TarError,
            EOFError,
            zlib.error,
            gzip.BadGzipFile,
            ValueError,
            RecursionError,
        ) as error:
            raise InvalidData(
                f"{archive}: must be a whole .tar.gz archive (or .tar), received: {error}"
            ) from error


def _uncompressed(archive: Path) -> BinaryIO:
    with archive.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(archive)) if compressed else archive.open("rb")


def _is_apples(path: PurePosixPath) -> bool:
    """Whether a Mac has added this file, which holds attributes of another."""
    return any(part.startswith("._") or part in (".DS_Store", "__MACOSX") for part in path.parts)


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo, path: PurePosixPath, folder: str) -> None:
    rule = None
    if not (member.isfile() or member.isdir()):
        rule = "every member must be a plain file or folder, no link and no device"
    elif ".." in path.parts or path.parts[:1] not in ((), (folder,)):
        rule = f"every member must lie inside {folder}/ ({ONLY})"
    elif member.size > LARGEST_MEMBER:
        rule = f"no member may be larger than {LARGEST_MEMBER:,} bytes"
    if rule:
        raise InvalidData(f"{archive}: {rule}; received {member.name!r} ({member.size:,} bytes)")
