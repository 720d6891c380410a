"""A private folder for files that are about to be uploaded or were just downloaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

from job.domain.cleanup import on_leaving
from job.domain.disk import disk_errors
from job.domain.errors import PermissionRefused

PREFIX = "job-scratch-"
ABANDONED_SECONDS = 7 * 86_400.0  # when nothing else tells whether the owner is alive


class Scratch:
    """A folder of this process alone, below ``$JOB_SPOOL`` or the temporary folder, made at its first use.

    Its name says which process of which host owns it, so that the next one can remove what a killed process
    left behind.
    """

    def __init__(self) -> None:
        self._making = threading.Lock()
        self._folder: Path | None = None
        self._removal = contextlib.ExitStack()

    def path(self) -> Path:
        """Return the folder, which exists and is closed to other users."""
        with self._making:
            if self._folder is None or not _is_private(self._folder):
                self._folder = _make()
                remove = functools.partial(shutil.rmtree, self._folder, ignore_errors=True)
                self._removal.enter_context(on_leaving(remove))  # also when a signal ends the process at once
            return self._folder

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        with self._making:
            self._removal.close()
            self._folder = None


def _make() -> Path:
    parent = _parent()
    with disk_errors("write in", parent):
        parent.mkdir(parents=True, exist_ok=True)
        for folder in parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                if _is_abandoned(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        owner = f"{PREFIX}{_host()}-{os.getpid()}-{_start_time(os.getpid())}-"
        return Path(tempfile.mkdtemp(prefix=owner, dir=parent))


def _parent() -> Path:
    try:
        return Path(os.environ.get("JOB_SPOOL") or tempfile.gettempdir())
    except FileNotFoundError as error:  # what tempfile raises also where all of them are full or read-only
        raise PermissionRefused(
            f"There is no folder for temporary files: {error.strerror}. Let the job write to /tmp (in "
            "Kubernetes: an emptyDir), or name a folder in JOB_SPOOL."
        ) from error


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _is_abandoned(folder: Path) -> bool:
    if not _is_private(folder):  # another user's
        return False
    host, pid, start, _ = (folder.name.removeprefix(PREFIX).split("-") + [""] * 4)[:4]
    if host == _host():
        return not pid.isdigit() or start != _start_time(int(pid))
    return time.time() - folder.stat().st_mtime > ABANDONED_SECONDS


def _host() -> str:
    """Identify the processes among which a process number is unique: the host's boot, and its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"
    return hashlib.sha256(boot.encode()).hexdigest()[:12]


def _start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since the boot; nothing if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
