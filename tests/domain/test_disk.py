"""Errors of the disk become the job's, and what is open is undone even at a sudden end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from job.domain.cleanup import on_leaving
from job.domain.disk import disk_errors, make_folders, scratch_folder
from job.domain.errors import JobError, MissingInput, PermissionRefused, StorageFailed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOENT, MissingInput, "Name what exists"),
        (errno.ENOTDIR, MissingInput, "Name what exists"),
        (errno.EISDIR, MissingInput, "Name what exists"),
        (errno.EACCES, PermissionRefused, f"runs as user {os.getuid()}, group {os.getgid()}"),
        (errno.EROFS, PermissionRefused, "no readOnly mount"),
        (errno.ENOSPC, StorageFailed, " MB are free"),
        (errno.EDQUOT, StorageFailed, " MB are free"),
        (errno.EEXIST, MissingInput, "Name another place"),
        (errno.ELOOP, MissingInput, "Name another place"),
        (errno.ENAMETOOLONG, MissingInput, "Name another place"),
        (errno.EIO, StorageFailed, "Check the disk"),
    ],
)
def test_an_error_of_the_disk_says_what_failed_and_what_to_do(
    tmp_path: Path, number: int, kind: type[JobError], hint: str
) -> None:
    with pytest.raises(kind) as caught, disk_errors("write", tmp_path / "absent" / "file"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"cannot write {tmp_path}/absent/file: {os.strerror(number)}")
    assert hint in str(caught.value)
    with pytest.raises(kind, match="cannot write another:"), disk_errors("write", tmp_path):
        raise OSError(number, os.strerror(number), "another")


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), disk_errors("read", "x"):
        raise KeyError
    with pytest.raises(StorageFailed, match=r"cannot read x: OSError\(\)"), disk_errors("read", "x"):
        raise OSError  # an error without any words


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    make_folders(tmp_path / "a" / "b")
    make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_scratch_folder_is_gone_afterwards_whatever_happens(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), scratch_folder(tmp_path) as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_leaving_a_block_undoes_it_once() -> None:
    undone: list[str] = []
    with on_leaving(lambda: undone.append("outer")), on_leaving(lambda: undone.append("inner")):
        assert undone == []
    assert undone == ["inner", "outer"]


ENDED_AT_ONCE = """
import os, threading
from job.domain.cleanup import clean_up, on_leaving
left = threading.Event()

def fail():
    raise RuntimeError("and the others go on")

def end():
    clean_up()
    left.wait(0.5)
    print("ended", flush=True)
    os._exit(75)

def tell(word):
    if threading.current_thread() is not threading.main_thread():
        print(word, flush=True)
    undone.set()

undone = threading.Event()
with on_leaving(lambda: tell("outer")), on_leaving(fail), on_leaving(lambda: tell("inner")):
    threading.Thread(target=end).start()
    undone.wait()
print("this thread went on", flush=True)
left.set()
"""


def test_who_ends_the_process_undoes_all_and_other_threads_wait_for_the_end() -> None:
    """A failure because of what is gone is no error of its own: it must not be told, nor end the process."""
    ended = subprocess.run([sys.executable, "-c", ENDED_AT_ONCE], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (75, "")
    assert ended.stdout.split("\n") == ["inner", "outer", "ended", ""]
