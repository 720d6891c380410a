"""The contract of a store: objects that are created once, below a root that is a folder or a bucket's prefix.

There is no lock and no compare-and-swap. One operation is exclusive: of several callers who ``create`` one
name with different bytes, exactly one succeeds. A run's record is built on it: each revision of the record is
an object of its own (see ``job.run.record_log``).

Every store keeps these promises, and one test-suite holds them to it:

- what ``create``, ``upload``, ``replace`` or ``copy`` has returned from survives a crash of the machine;
- a name never shows half of its content;
- the same call made again after a lost answer succeeds: equal content under the name *is* ours;
- a process that is frozen or killed in the middle of any call blocks nobody, and leaves no name that is taken
  but cannot be read: after ``AlreadyExists`` the object is there, until somebody deletes it.

What may heal (a busy service, a lost connection) is tried again for a minute, also by ``check``, with a line
in the log; what cannot heal (a permission, a wrong name) is said at once. On a network file system ``exists``
and ``list`` may lag behind by what the client caches, seconds to a minute; ``create`` does not.

``AlreadyExists`` and ``NotFound`` are signals of the protocol, which its callers handle. Anything that goes
wrong for good is a ``JobError`` with its exit code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from job.domain.errors import InvalidData


class AlreadyExists(Exception):
    """The name is taken by other bytes."""


class NotFound(Exception):
    """The object does not exist, or no longer."""


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    name: str  # relative to the store's root, "/" separated
    size: int  # bytes


class Store(Protocol):
    """Objects below a root.

    A name is relative, "/" separated, and without empty, "." or ".." parts. Parts that start with a dot are
    unfinished files of the store itself: such names are refused, and never listed.
    """

    location: str

    def check(self, *, write: bool = True) -> None:
        """Prove that the root can be listed and, with ``write``, used for training.

        With ``write`` it does once what training does later: it creates an object, is refused a second
        object of that name, replaces it, and deletes it. Leaves nothing behind but, locally, the folder.
        A service that is silent is given up within seconds.

        Raises:
            MissingInput: there is no such bucket or, with ``write=False``, no such folder.
            PermissionRefused: one of these acts is forbidden; the message names which, and what to do.
            StorageFailed: the file system or the service does not answer or does not keep the contract.
        """

    def read(self, name: str) -> bytes:
        """Return the content, verified. Raises ``NotFound``."""

    def checksum(self, name: str) -> tuple[int, int]:
        """Return size in bytes and crc32c of the content; a bucket is asked, a file is read.

        Raises ``NotFound``.
        """

    def exists(self, name: str) -> bool:
        """Whether the name is taken; the cheapest question a store can be asked."""

    def create(self, name: str, data: bytes) -> None:
        """Store ``data`` under a name that is free or holds equal bytes. Raises ``AlreadyExists``."""

    def upload(self, name: str, path: Path) -> None:
        """Like ``create``, from a file, which stays as it is."""

    def replace(self, name: str, data: bytes) -> None:
        """Store ``data`` under a name, whatever it holds; readers see the old or the new content."""

    def copy(self, source: str, target: str) -> None:
        """Like ``replace``, with the content of another object as a file of its own. Raises ``NotFound``."""

    def download(self, name: str, path: Path) -> None:
        """Write the content, verified, to ``path``, which never holds half of it. Raises ``NotFound``."""

    def list(self, prefix: str = "") -> list[Entry]:
        """Return all objects whose name starts with ``prefix``, sorted by name."""

    def delete(self, name: str) -> None:
        """Delete an object; one that is absent is no error."""

    def begin_attempt(self, number: int) -> None:
        """Mark unfinished files as those of attempt ``number``, and remove those of lower attempts."""

    def scratch(self) -> Path:
        """Return a private folder of this process for files before ``upload`` and after ``download``."""

    def finish_within(self, seconds: float) -> None:
        """Let every call, also one in progress, end within ``seconds`` from now (a signal's deadline)."""

    def close(self) -> None:
        """Release connections and the scratch folder."""


def checked_name(name: str, *, prefix: bool = False) -> str:
    """Return ``name`` if it cannot leave the root. Raises ``InvalidData``: it came from a damaged record."""
    parts = name.split("/")
    if prefix:  # the last part of a prefix may be empty or unfinished, but "." or ".." only leads astray
        parts = parts[:-1] + [part for part in parts[-1:] if part]
    if "\0" in name or not all(map(is_visible, parts)):
        raise InvalidData(
            "An object's name must be relative, without empty parts and without parts that start with a dot, "
            f"not {name!r}."
        )
    return name


def is_visible(part: str) -> bool:
    """Whether a part of a name is an object's, not the store's own and not a console's placeholder."""
    return bool(part) and not part.startswith(".")
