"""The ``Store`` in a folder.

A new file is written beside its target under a hidden name with the attempt's number, made durable, and then
given its name (see ``job.store.exclusive``). What a killed attempt leaves is swept by the next one.
"""

from __future__ import annotations

import contextlib
import filecmp
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from job.domain.disk import disk_errors, make_folders, share, sync
from job.domain.errors import MissingInput, StorageFailed
from job.store import exclusive
from job.store.checksum import size_and_crc32c
from job.store.contract import AlreadyExists, Entry, NotFound, checked_name, is_visible
from job.store.scratch import Scratch

BLOCK_BYTES = 1 << 20
TRIES = 5  # a file that is swept away while its owner lives is written again

Fill = Callable[[BinaryIO], object]


class LocalStore:
    """A ``Store`` in a folder; nothing is touched before the first call."""

    def __init__(self, location: str) -> None:
        self.root = Path(location)
        self.location = str(self.root)
        self._attempt = 0
        self._in_use = False
        self._end = math.inf  # monotonic seconds
        self._names = exclusive.Names()
        self._scratch = Scratch()

    # -- the contract ----------------------------------------------------------------------------------

    def check(self, *, write: bool = True) -> None:
        """See ``Store``. A mount below the root, such as ``checkpoints/``, is checked like the root."""
        with disk_errors("use", self.root):
            if self.root.exists() and not self.root.is_dir():
                raise MissingInput(f"{self.location} must be a folder, but it is a file.")
            if write:
                self._make_folders(self.root)
            elif not self.root.is_dir():
                raise MissingInput(
                    f"There is no folder {self.location}. Check the path (in a container: the mount)."
                )
        with disk_errors("list", self.root):
            visible = [path for path in self.root.iterdir() if is_visible(path.name)]
            folders = [self.root, *(path for path in visible if path.is_mount())]
        for folder in folders if write else []:
            self._prove_again(folder)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with disk_errors("read", path), exclusive.opened(path) as file:
            return file.read()

    def checksum(self, name: str) -> tuple[int, int]:
        path = self._path(name)
        with disk_errors("read", path), exclusive.opened(path) as file:
            return size_and_crc32c(file)

    def exists(self, name: str) -> bool:
        path = self._path(name)
        with disk_errors("look for", path):
            return path.is_file() or exclusive.taken(path).is_dir()

    def create(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with disk_errors("write", path):
            self._create(path, lambda file: file.write(data))

    def upload(self, name: str, path: Path) -> None:
        target = self._path(name)
        with disk_errors("read", path), path.open("rb") as source, disk_errors("write", target):
            self._create(target, lambda file: self._copy(source, file))

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with disk_errors("write", path):
            self._replace(path, lambda file: file.write(data))

    def copy(self, source: str, target: str) -> None:
        origin, path = self._path(source), self._path(target)
        with disk_errors("read", origin), exclusive.opened(origin) as content, disk_errors("write", path):
            self._replace(path, lambda file: self._copy(content, file))

    def download(self, name: str, path: Path) -> None:
        origin, part = self._path(name), path.with_name(f".{secrets.token_hex(8)}")
        with disk_errors("read", origin), exclusive.opened(origin) as source, disk_errors("write", path):
            try:
                with part.open("xb") as file:
                    self._copy(source, file)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[Entry]:
        start = self.root / checked_name(prefix, prefix=True).rpartition("/")[0]
        for _ in range(TRIES):
            with disk_errors("list", start):
                sizes = {path.relative_to(self.root).as_posix(): _size(path) for path in visible_files(start)}
            if None not in sizes.values():
                break  # else a file is gone that was found, and its successor may be missing: list again
        return [
            Entry(name, size)
            for name, size in sorted(sizes.items())
            if size is not None and name.startswith(prefix)
        ]

    def delete(self, name: str) -> None:
        path = self._path(name)
        with disk_errors("delete", path):
            exclusive.delete(path)

    def begin_attempt(self, number: int) -> None:
        self._attempt = number
        for parent, folders, files in os.walk(self.root):
            for name in folders + files:
                match = re.match(r"\.a(\d+)-", name)
                if match is not None and int(match[1]) < number:
                    exclusive.remove(Path(parent, name))
            folders[:] = [name for name in folders if is_visible(name)]

    def scratch(self) -> Path:
        return self._scratch.path()

    def finish_within(self, seconds: float) -> None:
        self._end = min(self._end, time.monotonic() + seconds)

    def close(self) -> None:
        self._scratch.close()

    # -- files -----------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    def _create(self, target: Path, fill: Fill) -> None:
        def give_name(part: Path) -> None:
            if self._names.give(part, target):
                return
            if not _equal(part, target):
                raise AlreadyExists(f"{target} exists with other content.")
            sync(target)  # its writer may not have lived to do it

        self._write(target, fill, give_name)

    def _replace(self, target: Path, fill: Fill) -> None:
        def give_name(part: Path) -> None:
            exclusive.complete(target)  # else what is pending there would replace ours
            part.replace(target)

        self._write(target, fill, give_name)

    def _write(self, target: Path, fill: Fill, give_name: Callable[[Path], None]) -> None:
        """Write a complete file beside ``target`` and give it that name; nothing else is left of it."""
        for tried in range(1, TRIES + 1):
            part = self._part(target)
            try:
                with self._new_file(part) as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                give_name(part)
                self._names.make_durable(target.parent)
                return
            except FileNotFoundError:  # a later attempt swept it away, or deleted what it was compared with
                if tried == TRIES:
                    raise
            finally:
                exclusive.remove(part)

    def _part(self, target: Path) -> Path:
        return target.with_name(f".a{self._attempt:04d}-{secrets.token_hex(8)}-{target.name}")

    def _new_file(self, part: Path) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(part, flags, 0o666)
        except FileNotFoundError:
            self._make_folders(part.parent)
            descriptor = os.open(part, flags, 0o666)
        self._in_use = True
        share(descriptor, part.parent, stat.S_IRGRP)
        return open(descriptor, "wb")

    def _make_folders(self, folder: Path) -> None:
        if self._in_use and not self.root.is_dir():  # made again, it would hold a run without its past
            raise MissingInput(
                f"{self.location} was moved or deleted while the job used it. Move it back, then run the "
                "same command again."
            )
        make_folders(folder)
        self._in_use = True

    def _copy(self, source: BinaryIO, target: BinaryIO) -> None:
        source.seek(0)
        while block := _block(source):
            if time.monotonic() > self._end:
                raise StorageFailed("The time for storage was used up in mid-copy.")
            target.write(block)

    def _prove_again(self, folder: Path) -> None:
        """Prove a folder; again where that fails, since an attempt that begins meanwhile sweeps our file."""
        for _ in range(TRIES - 1):
            with contextlib.suppress(StorageFailed):
                return self._prove(folder)
        self._prove(folder)

    def _prove(self, folder: Path) -> None:
        """Do once what training does later; see ``Store.check``."""
        target = self._part(folder / "check")
        try:
            with disk_errors("create a file in", folder):
                self._create(target, lambda file: file.write(b"1"))
                self._prove_kept(target, b"1")
            with disk_errors("create a file a second time in", folder):
                self._prove_exclusive(target)
            with disk_errors("replace a file in", folder):
                self._replace(target, lambda file: file.write(b"3"))
                self._prove_kept(target, b"3")
            with disk_errors("delete a file in", folder):
                exclusive.delete(target)
        finally:
            exclusive.remove(target)

    def _prove_kept(self, target: Path, data: bytes) -> None:
        with contextlib.suppress(NotFound), exclusive.opened(target) as file:
            if file.read() == data:
                return
        raise StorageFailed(
            f"The file system of {target.parent} lost the content of a file when it or its folder was "
            "renamed. Use another file system, or gs://bucket/prefix."
        )

    def _prove_exclusive(self, target: Path) -> None:
        with contextlib.suppress(AlreadyExists):
            self._create(target, lambda file: file.write(b"2"))
            raise StorageFailed(
                f"The file system of {target.parent} gave one name to two files, so two attempts could both "
                "believe to own a run. Use another file system, or gs://bucket/prefix."
            )


def _block(source: BinaryIO) -> bytes:
    with disk_errors("read", source.name):
        return source.read(BLOCK_BYTES)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _equal(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def visible_files(
    folder: Path, unreadable: Callable[[OSError], None] | None = None, *, follow_links: bool = False
) -> Iterator[Path]:
    """Yield the files at any depth below a folder, without hidden ones.

    Args:
        folder: Where to begin; nothing is found if it does not exist.
        unreadable: Is told of each folder that cannot be read; by default the error is raised.
        follow_links: Look also where links to folders lead.
    """

    def note(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        if unreadable is None:
            raise error
        unreadable(error)

    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=note, followlinks=follow_links):
        folders[:] = [name for name in folders if is_visible(name)]
        if follow_links:  # they may lead to one place twice, or round in a circle
            places = {name: os.path.realpath(Path(parent, name)) for name in folders}
            folders[:] = [name for name, place in places.items() if place not in seen]
            seen.update(places.values())
        yield from (Path(parent, name) for name in files if is_visible(name))
