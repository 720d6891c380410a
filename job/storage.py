"""Where a run lives: one contract, ``Store``, for a local folder and a Google Cloud Storage prefix.

Everything in a run is create-only except one small record, which is replaced by compare-and-swap. Both
stores keep the same promises, and one test-suite holds them to it:

- what ``create``, ``upload``, ``copy`` or ``swap`` has returned from survives a crash of the machine;
- a name never shows half of its content, and create-only never overwrites;
- the same call made again after a lost answer succeeds: content that equals ours *is* ours.

``AlreadyExists``, ``Conflict`` and ``NotFound`` are signals of the protocol, which its callers handle.
Anything that goes wrong for good is a ``JobError`` with its exit code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import google_crc32c

from job.errors import (
    InvalidData,
    JobError,
    MissingInput,
    PermissionRefused,
    StorageFailed,
    Superseded,
    UsageError,
)

T = TypeVar("T")

CONFIG, RECORD = "config.json", "record.json"  # what makes a folder a run
DEADLINE_SECONDS = 60.0  # without progress; above a server's usual hiccup, far below a Job's patience
BLOCK_BYTES = 1 << 20
# What ``link`` answers where the file system, or the pair of file systems, has no hard links.
NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class AlreadyExists(Exception):
    """A create-only name is taken by other bytes: take another name (a new nonce)."""


class Conflict(Exception):
    """A swap found the object at another version than expected: somebody else owns the record now."""


class NotFound(Exception):
    """The object to read, download or copy does not exist."""


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    name: str  # relative to the store's root, "/" separated
    size: int  # bytes
    version: str  # for ``delete``; see ``Store``


Entries = list[Entry]


class Store(Protocol):
    """Create-only objects and one compare-and-swapped record below a root.

    A name is relative, "/" separated, and without empty, "." or ".." parts; parts that start with a dot
    belong to the store (locks, unfinished files), so such names are refused and never listed.

    A version is opaque and changes with the content. On GCS it is the object's generation. A local file
    has two, both accepted by ``delete``: ``sha256:`` of the content from ``read`` and ``swap``, where being
    wrong would break the fence, and a cheap ``stat:`` token from ``upload`` and ``list``, which need not
    read gigabytes.
    """

    location: str

    def check(self, *, write: bool = True) -> None:
        """Prove within seconds that the root can be read and, with ``write``, written to.

        Leaves nothing behind but, locally, the folder itself. Raises ``MissingInput`` (no such bucket; with
        ``write=False``, no such folder), ``PermissionRefused`` or ``StorageFailed``.
        """

    def read(self, name: str) -> tuple[bytes, str]:
        """Return the content, verified, and its version. Raises ``NotFound``."""

    def create(self, name: str, data: bytes) -> None:
        """Store ``data`` under a name that is free or holds equal bytes. Raises ``AlreadyExists``."""

    def upload(self, name: str, path: Path) -> Entry:
        """Like ``create``, from a file, which is consumed on success and kept on failure."""

    def download(self, name: str, path: Path) -> None:
        """Write the content, verified, to ``path``, which never holds half of it. Raises ``NotFound``."""

    def holds(self, name: str, size: int, checksum: int) -> bool:
        """Whether an object of this size and crc32c is there."""

    def copy(self, source: str, target: str) -> None:
        """Like ``create``, from another object of this store. Raises ``NotFound``, ``AlreadyExists``."""

    def swap(self, name: str, data: bytes, expected: str | None) -> str:
        """Replace the object if it is at version ``expected`` (None: absent); return its new version.

        Of several callers with one expected version exactly one succeeds, the others get ``Conflict``. An
        object that already holds ``data`` is a success: our earlier call was carried out, its answer lost.
        """

    def list(self, prefix: str = "") -> Entries:
        """Return all objects whose name starts with ``prefix``, sorted by name."""

    def delete(self, name: str, version: str) -> None:
        """Delete this version only; do nothing if the object is absent or at another version."""

    def staging(self) -> Path:
        """Return a private folder of this process to write files in before ``upload``."""

    def hurry(self, seconds: float) -> None:
        """Let every call, also one in progress, end within ``seconds`` from now (a signal's deadline)."""

    def close(self) -> None:
        """Release connections and the staging folder."""


def open_store(location: str) -> Store:
    """Open ``gs://bucket/prefix`` or a path, without touching it yet. Raises ``UsageError``."""
    if location.startswith("gs://"):
        from job.gcs import GcsStore  # imports google-cloud-storage, which local runs never need

        return GcsStore(location)
    if "://" in location or not location:
        raise UsageError(f"A location is a path or gs://bucket/prefix, not {location!r}.")
    return LocalStore(location)


def join(location: str, *parts: str) -> str:
    """Append path components to a path or a ``gs://`` location."""
    if location.startswith("gs://"):
        return "/".join([location.rstrip("/"), *(part.strip("/") for part in parts if part)])
    return str(Path(location, *parts))


def find_runs(location: str) -> tuple[list[str], list[OSError]]:
    """Find the runs at or below ``location``, of a folder also where links lead.

    Returns:
        Their locations, sorted, ``location`` itself first if it is one: wherever a record is, or a
        configuration, whose record may be lost. And for each folder below that cannot be read, which may
        hide more of them, the error.
    """
    unreadable: list[OSError] = []
    with contextlib.closing(open_store(location)) as store:
        if isinstance(store, LocalStore):
            paths = _visible_files(store.root, unreadable.append, follow_links=True)
            names = [path.relative_to(store.root).as_posix() for path in paths]
        else:
            store.check(write=False)  # within seconds, where listing would try for a minute
            names = [entry.name for entry in store.list()]
    parts = [name.rpartition("/") for name in names]
    found = {folder for folder, _, name in parts if name in (CONFIG, RECORD)}
    return [join(location, folder) for folder in sorted(found)], unreadable


def crc32c(source: Path | bytes) -> int:
    """Return the CRC32C (Castagnoli) of a file or of bytes, as GCS computes it."""
    if isinstance(source, bytes):
        return int(google_crc32c.value(source))
    value = 0
    with source.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = google_crc32c.extend(value, block)
    return value


def checked_name(name: str, *, prefix: bool = False) -> str:
    """Return ``name`` if it cannot leave the root. Raises ``InvalidData``: it came from a damaged record."""
    parts = name.split("/")
    if prefix:  # the last part of a prefix may be empty or unfinished, but "." or ".." only leads astray
        parts = parts[:-1] + [part for part in parts[-1:] if part]
    if "\0" in name or any(not part or part.startswith(".") for part in parts):
        raise InvalidData(
            "An object's name must be relative, without empty parts and without parts that start with a dot, "
            f"not {name!r}."
        )
    return name


class Limit:
    """When all calls of a store must have ended; far away until a signal makes it hurry."""

    def __init__(self) -> None:
        self.end = math.inf  # monotonic seconds

    def hurry(self, seconds: float) -> None:
        """Move the end to ``seconds`` from now; never later than it already is."""
        self.end = min(self.end, time.monotonic() + seconds)


class Budget:
    """The time of one call: ``seconds`` since its last progress, cut short by the store's ``Limit``."""

    def __init__(self, limit: Limit, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._since = time.monotonic()
        self._furthest = 0

    def reached(self, position: int) -> None:
        """Note that ``position`` bytes are through; only more than ever before is progress."""
        if position > self._furthest:
            self._furthest = position
            self._since = time.monotonic()

    def left(self) -> float:
        """Return the seconds left, at most zero when there are none."""
        return min(self._since + self._seconds, self._limit.end) - time.monotonic()

    def sleep(self, seconds: float) -> bool:
        """Sleep, in short pieces because ``hurry`` may come; False when the time is used up."""
        wake = time.monotonic() + seconds
        while (rest := min(wake - time.monotonic(), self.left())) > 0:
            time.sleep(min(rest, 0.1))
        return self.left() > 0


@contextlib.contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the local disk into the ``JobError`` that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise _disk_error(error, action, path) from error


def _disk_error(error: OSError, action: str, path: Path) -> JobError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFailed(
            f"Cannot {action} {path}: {reason}, {_free_megabytes(path)} MB are free. What was committed "
            "before is intact. Make room (or use another --output), then run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return PermissionRefused(
            f"Cannot {action} {path}: {reason}. The job runs as user {os.getuid()}, group {os.getgid()}: let "
            "it write there (in Kubernetes: fsGroup, and no readOnly mount), or use another --output."
        )
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENOENT):
        return MissingInput(
            f"Cannot {action} {path}: {reason}. Name a folder, and leave the run's files in place."
        )
    if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        return StorageFailed(f"Cannot {action} {path}: {reason}. The file system must support flock.")
    return StorageFailed(
        f"Cannot {action} {path}: {reason}. Check the disk, then run the same command again."
    )


def _free_megabytes(path: Path) -> str:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f}"


def make_folders(folder: Path) -> None:
    """Create a folder and its parents, each of them durable."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster, or a file: ENOTDIR on its use
        folder.mkdir()
    sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders: there a rename is as durable as it gets.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, budget: Budget) -> Iterator[None]:
    """Hold an flock on a lock file, which stays: it must not be replaced while others wait for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while not _try_flock(descriptor):
            if not budget.sleep(0.01):
                raise StorageFailed(
                    f"Another process holds {path} and does not let go. Is it frozen? End it."
                )
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child that inherited the descriptor
        os.close(descriptor)


class Spool:
    """A private folder of this process for unfinished files; those of dead processes are swept away.

    Each folder has an ``.owner`` file that its process holds locked for life, so a killed attempt's half
    a checkpoint is recognized whatever became of its pid.
    """

    def __init__(self, parent: Path, lock: Path, new_budget: Callable[[], Budget]) -> None:
        self.parent = parent
        self._lock = lock
        self._new_budget = new_budget
        self._opening = threading.Lock()
        self._folder: Path | None = None
        self._owner = -1

    def path(self) -> Path:
        """Return the folder, which exists."""
        with self._opening:
            if self._folder is None or not self._folder.is_dir():
                make_folders(self.parent)
                with locked(self._lock, self._new_budget()):
                    make_folders(self.parent)  # another process may just have removed it, being the last
                    self._sweep()
                    self._folder = self._open()
            return self._folder

    def close(self) -> None:
        """Remove the folder, and the parent if it was the last."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError, StorageFailed), locked(self._lock, Budget(Limit(), 1.0)):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.with_suffix(".owner").unlink(missing_ok=True)
            if self._lock.parent != self.parent:
                self.parent.rmdir()
        os.close(self._owner)
        self._folder, self._owner = None, -1

    def _open(self) -> Path:
        folder = self.parent / secrets.token_hex(8)
        if self._owner >= 0:  # of a folder that somebody removed
            os.close(self._owner)
        self._owner = os.open(folder.with_suffix(".owner"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _try_flock(self._owner)
        folder.mkdir()
        return folder

    def _sweep(self) -> None:
        for owner in self.parent.glob("*.owner"):
            with contextlib.suppress(OSError):  # another user's: not ours to sweep
                _remove_if_dead(owner)


def _remove_if_dead(owner: Path) -> None:
    descriptor = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
    try:
        if _try_flock(descriptor):
            shutil.rmtree(owner.with_suffix(""), ignore_errors=True)
            owner.unlink()
    finally:
        os.close(descriptor)


class LocalStore:
    """A ``Store`` in a folder.

    A new file is written in the hidden ``.staging``, synced, and given its name by ``link``, which fails
    if the name is taken, where a rename would overwrite; then the folder is synced. The record is replaced
    by a rename inside a short flock on ``.store-lock``.

    File systems without hard links (FAT, some network mounts): there a name is given by a rename inside
    the same flock, after a look that it is free. All writers of such a file system take this way, so it is
    exclusive, and a rename is atomic; opening the name with ``O_EXCL`` could leave half a file in a crash.
    """

    def __init__(self, location: str, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.root = Path(location)
        self.location = str(self.root)
        self._limit = Limit()
        self._deadline_seconds = deadline_seconds
        self._lock = self.root / ".store-lock"
        self._spool = Spool(self.root / ".staging", self._lock, self._budget)

    def check(self, *, write: bool = True) -> None:
        with disk_errors("use", self.root):
            if self.root.exists() and not self.root.is_dir():
                raise MissingInput(f"{self.location} must be a folder, but it is a file.")
            if write:
                make_folders(self.root)
                self._write(b"?").unlink()
            elif not self.root.is_dir():
                raise MissingInput(
                    f"There is no folder {self.location}. Check the path (in a container: the mount)."
                )
            os.listdir(self.root)

    def read(self, name: str) -> tuple[bytes, str]:
        path = self._path(name)
        with disk_errors("read", path):
            data = _existing(path, Path.read_bytes)
        return data, _content_version(data)

    def create(self, name: str, data: bytes) -> None:
        target = self._path(name)
        with disk_errors("write", target):
            source = self._write(data)
            try:
                self._publish(source, target)
            finally:
                source.unlink(missing_ok=True)

    def upload(self, name: str, path: Path) -> Entry:
        target = self._path(name)
        with disk_errors("write", target):
            sync(path)
            try:
                self._publish(path, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self._publish_copy(path, target)
            entries = self._entries(target)
            if not entries:  # a newer attempt has already pruned it: the fence will say so, not we
                status = path.stat()
                entries = [Entry(name, status.st_size, _stat_version(status))]
            path.unlink(missing_ok=True)
        return entries[0]

    def download(self, name: str, path: Path) -> None:
        source = self._path(name)
        part = path.with_name(f".{secrets.token_hex(8)}")
        with disk_errors("write", path):
            try:
                _existing(source, lambda existing: shutil.copyfile(existing, part))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def holds(self, name: str, size: int, checksum: int) -> bool:
        path = self._path(name)
        with disk_errors("read", path):
            return path.is_file() and path.stat().st_size == size and crc32c(path) == checksum

    def copy(self, source: str, target: str) -> None:
        origin, destination = self._path(source), self._path(target)
        with disk_errors("write", destination):
            _existing(origin, os.stat)
            try:
                self._publish(origin, destination, rename=False)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                self._publish_copy(origin, destination)

    def swap(self, name: str, data: bytes, expected: str | None) -> str:
        target = self._path(name)
        if expected is None:
            try:
                self.create(name, data)
            except AlreadyExists:
                raise Conflict(f"{target} exists, though it should not yet.") from None
            return _content_version(data)
        with disk_errors("replace", target):
            source = self._write(data)
            try:
                with locked(self._lock, self._budget()):
                    self._replace(source, target, expected, _content_version(data))
            finally:
                source.unlink(missing_ok=True)
        return _content_version(data)

    def list(self, prefix: str = "") -> Entries:
        start = self.root / checked_name(prefix, prefix=True).rpartition("/")[0]
        with disk_errors("list", start):
            entries = [entry for path in _visible_files(start) for entry in self._entries(path)]
        return sorted(
            (entry for entry in entries if entry.name.startswith(prefix)), key=lambda entry: entry.name
        )

    def delete(self, name: str, version: str) -> None:
        path = self._path(name)
        with disk_errors("delete", path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # nothing to delete: no lock file in a folder that may not exist
            with locked(self._lock, self._budget()):
                if version in (_stat_version(path.stat()), _version_if_asked(path, version)):
                    path.unlink()

    def staging(self) -> Path:
        with disk_errors("write in", self.root):
            return self._spool.path()

    def hurry(self, seconds: float) -> None:
        self._limit.hurry(seconds)

    def close(self) -> None:
        self._spool.close()

    def _budget(self) -> Budget:
        return Budget(self._limit, self._deadline_seconds)

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    def _entry(self, path: Path) -> Entry:
        status = path.stat()
        return Entry(path.relative_to(self.root).as_posix(), status.st_size, _stat_version(status))

    def _entries(self, path: Path) -> Entries:
        """Return the file's entry, or nothing if it was deleted since it was listed."""
        try:
            return [self._entry(path)]
        except FileNotFoundError:
            return []

    def _write(self, data: bytes) -> Path:
        """Write a durable temporary file; nothing is left of it if that fails."""
        path = self._spool.path() / secrets.token_hex(8)
        try:
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb"
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _publish(self, source: Path, target: Path, *, rename: bool = True) -> None:
        """Give the durable file ``source`` a second name if it is free; equal content there is ours."""
        make_folders(target.parent)
        try:
            self._link(source, target, rename=rename)
        except FileExistsError:
            if not target.is_file() or not _equal(source, target):
                raise AlreadyExists(f"{target} exists with other content.") from None
            sync(target)
        sync(target.parent)

    def _publish_copy(self, source: Path, target: Path) -> None:
        copy = self._spool.path() / secrets.token_hex(8)
        try:
            shutil.copyfile(source, copy)
            sync(copy)
            self._publish(copy, target)
        finally:
            copy.unlink(missing_ok=True)

    def _link(self, source: Path, target: Path, *, rename: bool) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            if not rename or error.errno not in NO_LINK - {errno.EXDEV}:
                raise
            with locked(self._lock, self._budget()):
                if os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
                os.rename(source, target)

    def _replace(self, source: Path, target: Path, expected: str, new: str) -> None:
        try:
            current = _content_version(target.read_bytes())
        except FileNotFoundError:
            raise Conflict(f"{target} is gone; expected version {expected}.") from None
        if current == expected:
            os.replace(source, target)
        elif current != new:
            raise Conflict(f"{target} is at version {current}, not at {expected}.")
        sync(target.parent)


def _existing(path: Path, action: Callable[[Path], T]) -> T:
    if not path.is_file():  # also where a part of the path is a file, which would be another error below
        raise NotFound(f"There is no {path}.")
    try:
        return action(path)
    except FileNotFoundError:
        if path.exists():  # it is not the source that is missing
            raise
        raise NotFound(f"There is no {path}.") from None


def _content_version(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _stat_version(status: os.stat_result) -> str:
    return f"stat:{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _version_if_asked(path: Path, version: str) -> str | None:
    return _content_version(path.read_bytes()) if version.startswith("sha256:") else None


def _equal(first: Path, second: Path) -> bool:
    with first.open("rb") as one, second.open("rb") as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return False
        while block := one.read(BLOCK_BYTES):
            if block != other.read(BLOCK_BYTES):
                return False
    return True


def _raise(error: OSError) -> None:
    raise error


def _visible_files(
    folder: Path, unreadable: Callable[[OSError], None] = _raise, *, follow_links: bool = False
) -> Iterator[Path]:
    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            unreadable(error)

    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=note, followlinks=follow_links):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if follow_links:  # they may lead to one place twice, or round in a circle
            places = {name: os.path.realpath(Path(parent, name)) for name in folders}
            folders[:] = [name for name, place in places.items() if place not in seen]
            seen.update(places.values())
        yield from (Path(parent, name) for name in files if not name.startswith("."))


class HostLock:
    """Says, for an attempt's life, that a live process of this host owns the run."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.held = False

    def acquire(self) -> bool:
        """Take the lock if it is free, and say whether it is ours; may be called again and again."""
        if not self.held and self._descriptor >= 0 and _try_flock(self._descriptor):
            self.held = True
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        return self.held

    def owner(self) -> str:
        """Describe the process that holds the lock."""
        pid, _, host = os.pread(self._descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
        return f"process {pid or 'unknown'} on host {host or 'unknown'}"

    def release(self) -> None:
        """Let go; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self.held = -1, False


def acquire_host_lock(location: str, *, take_over: bool = False) -> HostLock:
    """Become the run's owner on this host, until ``release`` or the process's end.

    Raises ``Superseded`` naming the owner if it is alive. With ``take_over`` it returns a lock that is
    not ``held`` instead; ``acquire`` gets it once the old owner, fenced by the record, has ended.
    """
    path = _host_lock_path(location)
    with disk_errors("lock", path):
        make_folders(path.parent)
        lock = HostLock(path)
        if lock.acquire() or take_over:
            return lock
        owner = lock.owner()
        lock.release()
    raise Superseded(
        f"{location} is owned by {owner}, which is alive. Wait for it, end it, or use --take-over: "
        "it will then be fenced and stop by itself."
    )


def _host_lock_path(location: str) -> Path:
    if not location.startswith("gs://"):
        return Path(location, ".lock")
    digest = hashlib.sha256(location.rstrip("/").encode()).hexdigest()
    return Path(tempfile.gettempdir(), f"job-locks-{os.getuid()}", digest)
