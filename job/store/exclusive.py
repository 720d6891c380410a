"""How a complete file gets its name, exclusively, by one operation of the file system that all hosts share.

- ``link`` fails if the name is taken, where a rename would overwrite.
- Where there are no links (vfat, many FUSE mounts), a folder that holds the file is renamed to
  ``.taken-<name>``. That fails if the folder exists, since a rename replaces no folder that is not empty.
  Whoever finds it, its owner or not, moves the file from there to the name: nobody waits for the owner.

Which of the two is possible is found out by trying, in the very folder, before its first use. They do not
exclude each other, so all hosts must reach a folder through the same kind of mount. There is no lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from job.domain.disk import NOT_OFFERED, make_folder, sync
from job.store.contract import NotFound


class Names:
    """Gives files their names; knows what the file system of each folder offers."""

    def __init__(self) -> None:
        self._links: dict[Path, bool] = {}
        self._syncs: dict[Path, bool] = {}

    def give(self, part: Path, target: Path) -> bool:
        """Give the durable file ``part`` the name ``target`` of its folder; False if that is taken."""
        folder = target.parent
        if folder not in self._links:
            self._links[folder] = _has_links(part)
        if not self._links[folder]:
            return self._take(part, target)
        try:
            os.link(part, target)
        except FileExistsError:
            return False
        return True

    def make_durable(self, folder: Path, *, like: Path | None = None) -> None:
        """Make a folder's names durable, where the file system does that to folders ``like`` it."""
        like = like or folder
        if like not in self._syncs:
            self._syncs[like] = is_offered(lambda: sync(like))
        if self._syncs[like]:
            sync(folder)

    def _take(self, part: Path, target: Path) -> bool:
        if target.exists():
            return False
        claim = part.with_name(f"{part.name}-claim")
        try:
            make_folder(claim)
            (claim / "taken").touch()  # stays when the content has left: only an empty folder is replaced
            part.rename(claim / "content")
            self.make_durable(claim, like=target.parent)
            won = _rename_folder(claim, taken(target))
            if not won:
                (claim / "content").rename(part)
        finally:
            remove(claim)
        self.make_durable(target.parent)
        complete(target)
        return won


def _has_links(part: Path) -> bool:
    second = part.with_name(f"{part.name}-link")
    try:
        return is_offered(lambda: os.link(part, second))
    finally:
        remove(second)


def is_offered(act: Callable[[], None]) -> bool:
    """Try an act of the file system. An EIO may pass; one that stays is how some of them say no."""
    for _ in range(3):
        try:
            act()
        except OSError as error:
            if error.errno in NOT_OFFERED:
                return False
            if error.errno != errno.EIO:
                raise
            time.sleep(0.1)
        else:
            return True
    return False


def _rename_folder(source: Path, target: Path) -> bool:
    """Rename a folder; False if another one that is not empty has the name."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not target.is_dir():
            raise
        return False
    return True


# -- what others find ----------------------------------------------------------------------------------


def taken(target: Path) -> Path:
    """Return the folder that takes a name where there are no links."""
    return target.with_name(f".taken-{target.name}")


def complete(target: Path) -> None:
    """Move the content of a name that is taken to this name, whoever took it."""
    content = taken(target) / "content"
    if content.exists():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            content.rename(target)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open an existing object. Raises ``NotFound``."""
    for place in (path, taken(path) / "content", path):  # it may be moved from the second to the first
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            file = place.open("rb")
            break
    else:
        raise NotFound(f"There is no {path}.")
    with file:
        yield file


def delete(path: Path) -> None:
    """Delete an object; one that is absent is no error."""
    with contextlib.suppress(FileNotFoundError):  # first: what is pending could be completed, and come back
        _remove_folder(taken(path))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


def remove(path: Path) -> None:
    """Remove an unfinished file or folder; one that cannot be removed does no harm."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            _remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def _remove_folder(path: Path) -> None:
    """Remove a folder at once: half of it, its owner could still move into place."""
    gone = path.with_name(f".a0000-{secrets.token_hex(8)}-removed")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
