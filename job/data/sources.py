"""Where a data set is read: the embedded sample, a folder, an archive or a bucket, all by one reader."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from job.data.archive import read_archive
from job.data.download import sha256_of
from job.data.records import (
    FETCH_HINT,
    FOLDER,
    OFFICIAL,
    RECORD,
    SAMPLE,
    SAMPLE_FOLDER,
    Dataset,
    Files,
    RecordFile,
    checked,
    decode,
    fault,
    fingerprint,
    join_splits,
)
from job.domain.disk import disk_errors, make_folders, require_temporary_folder, scratch_folder
from job.domain.errors import MissingInput
from job.domain.settings import checked_text
from job.store.contract import NotFound, Store
from job.store.location import open_store

ARCHIVE = "cifar-10-binary.tar.gz"  # the author's, also where it lies in the folder that a user names
Contents = Iterator[tuple[RecordFile, bytes | None]]


@dataclass(frozen=True)
class FileReport:
    """One line of `verify`."""

    name: str
    size: int | None  # bytes; None if the file is missing
    sha256: str | None
    problem: str | None  # None: the file is what it must be

    @classmethod
    def of(cls, file: RecordFile, data: bytes | None) -> FileReport:
        """What is to be said about a file with this content, or without any."""
        if data is None:
            return cls(file.name, None, None, "is missing")
        return cls(file.name, len(data), hashlib.sha256(data).hexdigest(), fault(file, data))

    def __str__(self) -> str:
        """Name, size, digest and verdict in one line."""
        size = "-" if self.size is None else f"{self.size:,}"
        return f"{self.name:<17} {size:>10} bytes  sha256 {self.sha256 or '-'}  {self.problem or 'OK'}"


def load(source: str, *, files: Files = OFFICIAL) -> Dataset:
    """Read and verify a data set.

    Args:
        source: "sample" (embedded); the binary folder, the folder around it or one that holds the official
            archive; an archive, .tar.gz or .tar; or gs://bucket/folder, of which a verified copy is kept in
            $JOB_CACHE.
        files: what must be there; anything else is refused.

    Raises:
        MissingInput: the source or one of its files does not exist.
        InvalidData: a file has another size or checksum, a label above 9, or the archive is unsafe.
        PermissionRefused: a file may not be read.
    """
    source, files = _resolve(source, files)
    return join_splits(
        files, {file.name: decode(checked(file, data, source)) for file, data in _contents(source, files)}
    )


def verify(source: str, *, files: Files = OFFICIAL) -> list[FileReport]:
    """Check every file of a source that `load` accepts; the source itself must exist."""
    source, files = _resolve(source, files)
    contents = dict(_contents(source, files, use_cache=False))
    return [FileReport.of(file, contents[file]) for file in files]


def digest_of(source: str) -> str:
    """The data SHA-256 of what `load` reads there, known before it does: it accepts nothing else."""
    return fingerprint(_resolve(source, OFFICIAL)[1])


def count_images(source: str) -> tuple[int, int]:
    """Training and test images of what `load` reads there, known before it does."""
    *train, test = (file.size // RECORD for file in _resolve(source, OFFICIAL)[1])
    return sum(train), test


def of_run(sha256: str, recorded: str | None) -> str | None:
    """The data of an earlier run, by its digest and what its settings name; None where that is gone."""
    if sha256 == digest_of("sample"):
        return "sample"
    if recorded is None or recorded.startswith("gs://"):
        return recorded
    try:
        return recorded if Path(recorded).exists() else None
    except OSError:  # another user's
        return None


def require(source: str) -> None:
    """Raise `MissingInput` for a local source that does not exist, before anything slow is done."""
    if source == "sample" or source.startswith("gs://"):
        return
    with disk_errors("read", source):
        if Path(source).exists():
            return
    meant = "did you mean 'sample', the embedded data? " if is_misspelt_sample(source) else ""
    raise MissingInput(
        f"{source} does not exist; {meant}give 'sample', an existing folder or archive, or gs://...; "
        f"{FETCH_HINT}"
    )


def is_misspelt_sample(source: str) -> bool:
    """Whether somebody who typed this seems to have meant "sample"."""
    return source != "sample" and bool(get_close_matches(source, ["sample"], cutoff=0.8))


def holds_all(folder: Path, *, files: Files = OFFICIAL) -> bool:
    """Whether a folder holds every file, or the archive; `load` verifies them."""
    with disk_errors("read", folder):
        place = _place_in(folder, files)
        return place.is_file() or all((place / file.name).exists() for file in files)


def _place_in(folder: Path, files: Files) -> Path:
    """Where in a folder the record files are, or the archive that holds them."""
    inner = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not any((inner / file.name).exists() for file in files):
        for archive in (folder / ARCHIVE, inner / ARCHIVE):
            if archive.is_file():
                return archive
    return inner


def _resolve(source: str, files: Files) -> tuple[str, Files]:
    return (str(SAMPLE_FOLDER), SAMPLE) if source == "sample" else (source, files)


def _contents(source: str, files: Files, *, use_cache: bool = True) -> Contents:
    """Yield every file with its bytes, unverified, or None where it is missing."""
    if source.startswith("gs://"):
        return _from_bucket(source, files, use_cache)
    require(source)
    with disk_errors("read", source):
        place = Path(source) if Path(source).is_file() else _place_in(Path(source), files)
        return from_archive(place, files) if place.is_file() else from_folder(place, files)


def from_folder(folder: Path, files: Files) -> Contents:
    """Yield the files of the binary folder itself."""
    for file in files:
        path = folder / file.name
        with disk_errors("read", path):
            data = path.read_bytes() if path.exists() else None
        yield file, data


def from_archive(archive: Path, files: Files) -> Contents:
    """Yield the files of an archive, in its order, and then those that it lacks."""
    missing = {file.name: file for file in files}
    for name, data in read_archive(archive, FOLDER, [file.name for file in files]):
        if file := missing.pop(name, None):
            yield file, data
    for file in missing.values():
        yield file, None


def _from_bucket(location: str, files: Files, use_cache: bool) -> Contents:
    cache = _cache()
    with contextlib.closing(open_store(location)) as store:
        store.check(write=False)
        for file in files:
            kept = cache / f"{file.sha256}.bin"
            with disk_errors("use", kept):
                known = use_cache and kept.exists() and sha256_of(kept) == file.sha256
                data = kept.read_bytes() if known else _downloaded(store, file, kept)
            yield file, data


def _downloaded(store: Store, file: RecordFile, kept: Path) -> bytes | None:
    """Return an object's bytes, and keep them if they are right."""
    with scratch_folder(kept.parent) as folder:
        fresh = folder / file.name
        for name in (file.name, f"{FOLDER}/{file.name}"):
            with contextlib.suppress(NotFound):
                store.download(name, fresh)
                data = fresh.read_bytes()
                if hashlib.sha256(data).hexdigest() == file.sha256:
                    fresh.replace(kept)
                return data
    return None


def _cache() -> Path:
    named = os.environ.get("JOB_CACHE")
    if not named:
        require_temporary_folder()
        named = str(Path(tempfile.gettempdir(), f"job-cache-{os.getuid()}"))
    folder = Path(checked_text("JOB_CACHE", named))
    with disk_errors("write in", folder):
        make_folders(folder)
    return folder.absolute()
