"""Downloads over HTTP that are whole, verified and resumable."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
import urllib3
from urllib3.util import Retry

from job.console import Reporter
from job.domain.disk import disk_errors
from job.domain.errors import InvalidData, StorageFailed

CHUNK = 1 << 18  # bytes per read: small enough for a smooth progress line and a quick reaction to signals
PASSING = {408, 425, 429, *range(500, 600)}  # HTTP status codes that may be gone at the next attempt
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Archive:
    """A file on a web server that is known before it is fetched."""

    url: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Patience:
    """How long a download may take and how often it may fail."""

    timeout: float = 30.0  # seconds without one byte before a connection counts as dead
    attempts: int = 6  # failures in a row that brought nothing new
    pause: float = 1.0  # seconds before a retry; doubles with each in a row, up to 60
    deadline: float = 7200.0  # seconds in all; users of the author's server report up to 40 minutes

    @property
    def retries(self) -> Retry:
        """A fresh count of retries; it raises when they are used up, and knows the pauses between them."""
        return Retry(
            self.attempts - 1, backoff_factor=self.pause, backoff_max=60, backoff_jitter=self.pause / 2
        )


def download(archive: Archive, path: Path, *, patience: Patience, reporter: Reporter) -> None:
    """Bring ``archive`` to ``path``, where it appears only after its checksum is right.

    Until then the bytes are in ``<path>.partial``, which an interruption leaves and the next call continues.

    Raises:
        StorageFailed: the server cannot be reached or answers with errors, also after all retries.
        InvalidData: it answers with another size or checksum; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors("write", partial):
        if path.exists() and sha256_of(path) == archive.sha256:
            return
        resumed = 0 < _size(partial) <= archive.size
        if not resumed:
            partial.unlink(missing_ok=True)
    _Download(archive, partial, patience, reporter).complete()
    with disk_errors("read", partial):
        received = sha256_of(partial)
        if received == archive.sha256:
            shutil.move(partial, path)  # copies where the file system has no rename
            return
        partial.unlink()
    if not resumed:
        raise InvalidData(
            f"{archive.url}: SHA-256 must be {archive.sha256}, received {received}; nothing was kept"
        )
    reporter.note("the download that was continued is not the archive; starting over")
    download(archive, path, patience=patience, reporter=reporter)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Download:
    """Appends to a partial file over as many connections as it takes."""

    def __init__(self, archive: Archive, partial: Path, patience: Patience, reporter: Reporter) -> None:
        self._archive, self._partial = archive, partial
        self._patience, self._reporter = patience, reporter
        self._end = time.monotonic() + patience.deadline

    def complete(self) -> None:
        """Connect until all is here, or raise what `download` documents."""
        retries = self._patience.retries
        with requests.Session() as session:
            while (have := _size(self._partial)) < self._archive.size:
                try:
                    self._append(session, have)
                except NETWORK_ERRORS as error:
                    if _size(self._partial) > have:  # which is no failure
                        retries = retries.new(total=self._patience.attempts, history=())
                    retries = self._wait(error, retries)

    def _wait(self, error: Exception, retries: Retry) -> Retry:
        """Wait before the next attempt, or raise `StorageFailed` where none would help."""
        archive, here, cause = self._archive, _size(self._partial), str(error) or repr(error)
        try:
            if isinstance(error, requests.HTTPError) and error.response.status_code not in PASSING:
                raise error
            retries = retries.increment(method="GET", url=archive.url, error=error)
            pause = max(self._patience.pause, retries.get_backoff_time())
            if time.monotonic() + pause > self._end:
                raise error
        except NETWORK_ERRORS:
            raise StorageFailed(
                f"{archive.url}: {cause} ({here:,} of {archive.size:,} bytes are here); check the network "
                "and run again: the download continues where it stopped"
            ) from error
        self._reporter.note(f"{archive.url}: {cause}; trying again in {pause:.1f} s")
        time.sleep(pause)
        return retries

    def _append(self, session: requests.Session, have: int) -> None:
        """Read one connection to its end."""
        archive, partial = self._archive, self._partial
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with session.get(
            archive.url, headers=headers, stream=True, timeout=self._patience.timeout
        ) as response:
            response.raise_for_status()
            have, total = _announced(response, have)
            if total is not None and total != archive.size:
                raise InvalidData(f"{archive.url}: must be {archive.size:,} bytes, the server says {total:,}")
            for chunk in _chunks(response):
                _write_at(partial, have, chunk)
                have += len(chunk)
                if have > archive.size:
                    partial.unlink()
                    raise InvalidData(f"{archive.url}: must be {archive.size:,} bytes, received more")
                self._reporter.transfer(PurePosixPath(archive.url).name, have, archive.size)
                if time.monotonic() > self._end:
                    raise TimeoutError("the download takes too long")
        if have < archive.size:
            raise ConnectionError("the connection ended early")


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes; requests' own iterator would wait for a whole chunk, and lose it with a stall."""
    while chunk := response.raw.read1(CHUNK):
        yield chunk


def _announced(response: requests.Response, have: int) -> tuple[int, int | None]:
    """Where the body starts in the file and how long the file is, by the response's headers."""
    if response.status_code == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != have:
            raise ConnectionError(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        return have, int(span[2])
    length = response.headers.get("Content-Length")  # the server ignores ranges: this is all of it again
    return 0, int(length) if length else None


def _write_at(partial: Path, offset: int, chunk: bytes) -> None:
    with disk_errors("write", partial), partial.open("ab") as file:
        file.truncate(offset)
        file.write(chunk)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
