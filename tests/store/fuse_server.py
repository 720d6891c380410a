"""A folder seen through FUSE, without links, as many cluster mounts are; needs no library.

    python fuse_server.py SOURCE MOUNTPOINT ERRNO_OF_LINK ERRNO_OF_FSYNCDIR

It answers one request at a time, so what it does is atomic. It prints a line once it is mounted. Numbers and
layouts are those of Linux's ``include/uapi/linux/fuse.h``, version 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME, LINK = 1, 2, 3, 4, 9, 10, 11, 12, 13
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT = 14, 15, 16, 17, 18, 20, 25, 26
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT, BATCH_FORGET = 27, 28, 29, 30, 35, 36, 42
NO_ANSWER = {FORGET, INTERRUPT, BATCH_FORGET}
SET_MODE, SET_SIZE = 1, 8


class Mirror:
    """Answers the kernel's requests from a folder."""

    def __init__(self, source: Path, link_error: int, fsyncdir_error: int) -> None:
        self.paths = {1: str(source)}
        self.listings: dict[int, list[os.DirEntry[str]]] = {}
        self.refused = {LINK: link_error, FSYNCDIR: fsyncdir_error}
        self.answers: dict[int, Callable[[int, bytes], bytes]] = {
            INIT: lambda node, body: struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 0, 0, 65536, 1, 0, 0, 0),
            LOOKUP: lambda node, body: self.entry(self.below(node, body)),
            GETATTR: lambda node, body: self.attributes(self.paths[node]),
            SETATTR: self.change,
            MKDIR: self.make_folder,
            UNLINK: lambda node, body: done(os.unlink, self.below(node, body)),
            RMDIR: lambda node, body: done(os.rmdir, self.below(node, body)),
            RENAME: self.rename,
            OPEN: self.open,
            CREATE: self.create,
            READ: self.read,
            WRITE: self.write,
            RELEASE: lambda node, body: done(os.close, handle(body)),
            FSYNC: lambda node, body: done(os.fsync, handle(body)),
            FLUSH: lambda node, body: b"",
            STATFS: lambda node, body: struct.pack("=5Q3I28x", *[1 << 20] * 5, 4096, 255, 4096),
            OPENDIR: lambda node, body: struct.pack("=QII", node, 0, 0),
            READDIR: self.list,
            RELEASEDIR: lambda node, body: b"",
        }

    def answer(self, operation: int, node: int, body: bytes) -> tuple[int, bytes]:
        """Return an error number, 0 for none, and the answer's body."""
        if operation in self.refused:
            return self.refused[operation], b""
        if operation not in self.answers:
            return errno.ENOSYS, b""
        try:
            return 0, self.answers[operation](node, body)
        except OSError as error:
            return error.errno or errno.EIO, b""

    def below(self, node: int, name: bytes) -> str:
        return os.path.join(self.paths[node], name.split(b"\0")[0].decode())

    def entry(self, path: str) -> bytes:
        status = os.lstat(path)
        node = next((node for node, known in self.paths.items() if known == path), 0) or max(self.paths) + 1
        self.paths[node] = path
        return struct.pack("=QQQQII", node, 0, 0, 0, 0, 0) + attribute(status)

    def attributes(self, path: str) -> bytes:
        return struct.pack("=QII", 0, 0, 0) + attribute(os.lstat(path))

    def change(self, node: int, body: bytes) -> bytes:
        (valid,), (size,), (mode,) = (
            struct.unpack_from(form, body, offset) for form, offset in (("=I", 0), ("=Q", 16), ("=I", 68))
        )
        if valid & SET_SIZE:
            os.truncate(self.paths[node], size)
        if valid & SET_MODE:
            os.chmod(self.paths[node], stat.S_IMODE(mode))
        return self.attributes(self.paths[node])

    def make_folder(self, node: int, body: bytes) -> bytes:
        path = self.below(node, body[8:])
        os.mkdir(path, struct.unpack_from("=I", body)[0] & 0o7777)
        return self.entry(path)

    def rename(self, node: int, body: bytes) -> bytes:
        (folder,) = struct.unpack_from("=Q", body)
        old, new = body[8:].split(b"\0")[:2]
        source, target = self.below(node, old), self.below(folder, new)
        os.rename(source, target)
        for other, path in list(self.paths.items()):
            if path == target:
                del self.paths[other]
            elif path == source or path.startswith(f"{source}/"):
                self.paths[other] = target + path[len(source) :]
        return b""

    def open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("=I", body)[0] & ~(os.O_CREAT | os.O_EXCL)
        return struct.pack("=QII", os.open(self.paths[node], flags), 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("=II", body)
        path = self.below(node, body[16:])
        descriptor = os.open(path, flags | os.O_CREAT, mode & 0o7777)
        return self.entry(path) + struct.pack("=QII", descriptor, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        descriptor, offset, size = struct.unpack_from("=QQI", body)
        return os.pread(descriptor, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        descriptor, offset, size = struct.unpack_from("=QQI", body)
        return struct.pack("=II", os.pwrite(descriptor, body[40 : 40 + size], offset), 0)

    def list(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        if offset == 0:
            self.listings[node] = list(os.scandir(self.paths[node]))
        packed = b""
        for number, entry in enumerate(self.listings[node][offset:], start=offset + 1):
            name = entry.name.encode()
            kind = stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG
            record = struct.pack("=QQII", entry.inode(), number, len(name), kind >> 12) + name
            record += bytes(-len(record) % 8)
            if len(packed) + len(record) > size:
                break
            packed += record
        return packed


def done(act: Callable[..., object], *arguments: object) -> bytes:
    act(*arguments)
    return b""


def handle(body: bytes) -> int:
    return int(struct.unpack_from("=Q", body)[0])


def attribute(status: os.stat_result) -> bytes:
    times = (int(status.st_atime), int(status.st_mtime), int(status.st_ctime))
    fractions = (status.st_atime_ns % 10**9, status.st_mtime_ns % 10**9, status.st_ctime_ns % 10**9)
    owner = (status.st_mode, status.st_nlink, status.st_uid, status.st_gid)
    return struct.pack(
        "=6Q10I", status.st_ino, status.st_size, status.st_blocks, *times, *fractions, *owner, 0, 4096, 0
    )


def serve(source: Path, folder: Path, link_error: int, fsyncdir_error: int) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"mirror", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount was refused")
    os.umask(0)  # the kernel has applied the caller's
    print("mounted", flush=True)
    mirror = Mirror(source, link_error, fsyncdir_error)
    while True:
        try:
            request = os.read(device, 1 << 20)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.EINTR, errno.ENOENT):  # interrupted before we read it
                continue
            raise
        _, operation, unique, node = struct.unpack_from("=IIQQ", request)
        if operation not in NO_ANSWER:
            code, body = mirror.answer(operation, node, request[40:])
            os.write(device, struct.pack("=IiQ", 16 + len(body), -code, unique) + body)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
