"""The scratch folder is private, and what a killed process left in one is removed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.domain.errors import JobError
from job.store import scratch
from job.store.scratch import Scratch
from tests.store.conftest import output, run_python


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    monkeypatch.setenv("JOB_SPOOL", str(folder))
    return folder


@pytest.fixture
def one(spool: Path) -> Iterator[Scratch]:
    folder = Scratch()
    yield folder
    folder.close()


def test_scratch_folders_are_private(one: Scratch, spool: Path) -> None:
    other = Scratch()
    assert one.path() == one.path() != other.path()
    assert one.path().parent == spool
    assert stat.S_IMODE(one.path().stat().st_mode) == 0o700
    shutil.rmtree(one.path())
    assert one.path().is_dir(), "somebody cleaned up"
    folder = one.path()
    (folder / "file").write_bytes(b"")
    one.close()
    one.close()
    assert not folder.exists()
    assert other.path().is_dir()
    other.close()
    assert list(spool.iterdir()) == []


def test_a_folder_that_another_user_put_there_is_not_used(one: Scratch, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("giving a folder to another user needs root")
    folder = one.path()
    os.chown(folder, 4001, 4001)
    assert one.path() != folder
    folder = one.path()
    folder.chmod(0o777)
    assert one.path() != folder
    folder = one.path()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert one.path() != folder
    assert tmp_path.is_dir()


def test_a_signal_that_ends_the_process_at_once_removes_it(spool: Path) -> None:
    code = """if True:
        import os
        from job.domain.cleanup import clean_up
        from job.store.scratch import Scratch
        scratch = Scratch()
        print(scratch.path(), flush=True)
        clean_up()
        os._exit(75)
    """
    process = run_python(code)
    leftover = Path(process.communicate(timeout=60)[0].strip())
    assert process.returncode == 75
    assert leftover.parent == spool
    assert not leftover.exists()


def test_what_a_killed_process_left_is_removed(one: Scratch) -> None:
    code = """if True:
        import time
        from job.store.scratch import Scratch
        scratch = Scratch()
        folder = scratch.path()
        (folder / "half a checkpoint").write_bytes(bytes(1000))
        print(folder, flush=True)
        time.sleep(60)
    """
    process = run_python(code)
    assert process.stdout is not None
    leftover = Path(process.stdout.readline().strip())
    assert one.path().is_dir()
    assert os.listdir(leftover) == ["half a checkpoint"], "its owner is alive"
    process.kill()
    process.communicate()
    Scratch().path()
    assert not leftover.exists()
    assert one.path().is_dir()


def test_of_another_host_only_what_is_old_is_removed(one: Scratch, spool: Path) -> None:
    spool.mkdir()
    young, old, foreign = (spool / f"{scratch.PREFIX}anotherhost0-1-{n}-x" for n in range(3))
    for folder in (young, old, foreign):
        folder.mkdir(mode=0o700)
        os.utime(folder, (time.time() - 8 * 86_400,) * 2)
    os.utime(young)
    foreign.chmod(0o777)  # not one that we have made
    one.path()
    assert young.is_dir()
    assert not old.exists()
    assert foreign.is_dir()


def test_another_process_with_the_same_number_does_not_keep_a_leftover(
    one: Scratch, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(
        tempfile.mkdtemp(prefix=f"{scratch.PREFIX}{scratch._host()}-{os.getpid()}-1-", dir=tmp(spool))
    )
    one.path()
    assert not folder.exists()


def tmp(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_no_writable_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """if True:
        import os, tempfile
        from job.domain.errors import JobError
        from job.store.scratch import Scratch
        tempfile._candidate_tempdir_list = lambda: ["/proc"]  # stubbed: nothing may be written to any of them
        try:
            Scratch().path()
        except JobError as error:
            print(error.exit_code, error)
    """
    printed = output(run_python(code))
    assert printed.startswith(
        "77 There is no folder for temporary files: No usable temporary directory found"
    )
    assert "JOB_SPOOL" in printed


def test_a_spool_folder_that_cannot_be(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_SPOOL", "/proc/spool")
    with pytest.raises(JobError, match="cannot write in /proc/spool"):
        Scratch().path()
