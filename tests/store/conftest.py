"""The stores that the contract's tests run on."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.store.contract import Store
from job.store.local import LocalStore
from job.store.location import join, open_store

ROOT = Path(__file__).parents[2]

Open = Callable[..., LocalStore]


class Stopped(BaseException):
    """What a process that is killed, or frozen for ever, does next: nothing."""


def refuse_links(code: int) -> None:
    """Let this process's ``link`` fail, as on a file system that has none."""

    def link(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code), str(source))

    os.link = link  # type: ignore[assignment]


@pytest.fixture(params=["local", "local without links", "gcs"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "gcs":
        return join(request.getfixturevalue("gcs_bucket"), "runs", "x")
    if request.param == "local without links":
        monkeypatch.setattr(os, "link", os.link)  # is put back afterwards
        monkeypatch.setenv("TEST_WITHOUT_LINKS", "yes")  # for ``run_python``
        refuse_links(errno.EPERM)
    return str(tmp_path / "runs" / "x")


@pytest.fixture
def open_another(
    location: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[], Store]]:
    """Opens further stores on the same location, as other processes would."""
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("JOB_SPOOL", str(tmp_path / "spool"))
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(open_store(location)))


@pytest.fixture
def store(open_another: Callable[[], Store]) -> Store:
    return open_another()


def scratch_file(store: Store, data: bytes) -> Path:
    path = store.scratch() / "a file"
    path.write_bytes(data)
    return path


def names(store: Store, prefix: str = "") -> list[str]:
    return [entry.name for entry in store.list(prefix)]


def run_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    if "TEST_WITHOUT_LINKS" in os.environ:
        code = f"from tests.store.conftest import refuse_links; refuse_links({errno.EPERM})\n{code}"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def output(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return text


def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Mount something on a new folder for a test, or skip it."""
    folder.mkdir(exist_ok=True)
    result = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"this machine cannot mount {' '.join(arguments)}: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    yield from mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens stores on folders."""
    monkeypatch.setenv("JOB_SPOOL", str(tmp_path / "spool"))
    with contextlib.ExitStack() as stack:
        yield lambda path: stack.enter_context(contextlib.closing(LocalStore(str(path))))


def hidden(folder: Path) -> list[str]:
    """Return the names of all unfinished files at any depth."""
    return [path.name for path in folder.rglob(".a*")]


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code), str(source))

    monkeypatch.setattr(os, "link", link)
