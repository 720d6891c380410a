"""The local disk: its errors as the job's errors, and names that survive a crash."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from job.domain.cleanup import on_leaving
from job.domain.errors import JobError, MissingInput, PermissionRefused, StorageFailed

# What a file system answers that does not offer an operation at all; 524 is the Linux kernel's ENOTSUPP,
# which some network file systems let through.
NOT_OFFERED = {
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EINVAL,
    errno.EBADF,
    errno.EMLINK,
    errno.EXDEV,
    524,
}


@contextlib.contextmanager
def disk_errors(action: str, path: Path | str) -> Iterator[None]:
    """Turn an ``OSError`` into the ``JobError`` that says what to do about it.

    Args:
        action: what failed, as in "read" or "write in".
        path: what it was done to, unless the error names a file itself.
    """
    try:
        yield
    except OSError as error:
        raise _job_error(error, f"cannot {action} {error.filename or path}", Path(path)) from error


def _job_error(error: OSError, failure: str, path: Path) -> JobError:
    reason = f"{failure}: {error.strerror or repr(error)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFailed(
            f"{reason}, {_free_megabytes(path)} MB are free. What was committed before is intact. Make room, "
            "or name another place, then run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return PermissionRefused(
            f"{reason}. The job runs as user {os.getuid()}, group {os.getgid()}: let it do so there (in "
            "Kubernetes: fsGroup, and no readOnly mount), or name another place."
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return MissingInput(f"{reason}. Name what exists, and leave a run's files in place.")
    if error.errno in (errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
        return MissingInput(f"{reason}. Name another place.")
    return StorageFailed(f"{reason}. Check the disk, then run the same command again.")


def _free_megabytes(path: Path) -> str:
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(place).free // 1_000_000:,}"
    return "an unknown number of"


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder for the time of the block; a signal that ends the process removes it, too.

    It is in ``parent``, else where temporary files are; its path is absolute.
    """
    if parent is None:
        require_temporary_folder()
    with disk_errors("write in", parent or tempfile.gettempdir()):
        folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=parent)).absolute()
    with on_leaving(functools.partial(shutil.rmtree, folder, ignore_errors=True)):
        yield folder


def require_temporary_folder() -> None:
    """Raise `PermissionRefused` where no folder takes temporary files, which TensorFlow needs."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise PermissionRefused(
            f"a folder for temporary files is needed, but {error.strerror}; make one writable, or set TMPDIR"
        ) from error


def make_folders(folder: Path) -> None:
    """Create a folder and its parents, each of them durable, and shared as its parent is."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster, or a file: ENOTDIR on its use
        make_folder(folder)
    with contextlib.suppress(OSError):  # a disk that is broken is found by the first file
        sync(folder.parent)


def make_folder(folder: Path) -> None:
    """Create a folder that is shared as its parent is."""
    folder.mkdir()
    share(folder, folder.parent, stat.S_IRWXG)


def share(path: Path | int, parent: Path, bits: int) -> None:
    """Give the group the permissions that a umask withheld, where the group may write in the parent folder.

    Its members are then meant to work together. The group must be the same, and the parent not one like
    ``/tmp``, where everybody may write.
    """
    inherited, status = os.stat(parent), os.stat(path)
    shared = inherited.st_mode & stat.S_IWGRP and not inherited.st_mode & stat.S_ISVTX
    if shared and status.st_gid == inherited.st_gid and status.st_mode & bits != bits:
        with contextlib.suppress(PermissionError):  # some mounts fix all modes
            os.chmod(path, stat.S_IMODE(status.st_mode) | bits)


def sync(path: Path) -> None:
    """Make a file's content durable, or a folder's names where its file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
