"""Several users in one folder."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.store.local import LocalStore
from tests.store.conftest import (
    Open,
    names,
    output,
    run_python,
)

# -- users ---------------------------------------------------------------------------------------------

COLLEAGUE = """
import os, sys
from job.domain.errors import JobError
from job.store.local import LocalStore
from job.store.contract import AlreadyExists
uid, umask, root, text, links = int(sys.argv[1]), int(sys.argv[2], 8), sys.argv[3], sys.argv[4], sys.argv[5]
if links == "no":
    from tests.store.conftest import refuse_links
    refuse_links(1)
os.setgroups([]); os.setgid(4242); os.setuid(uid); os.umask(umask)
store = LocalStore(root)
try:
    store.check()
    store.begin_attempt(int(text))
    store.create(f"record-{text}.json", text.encode())
    try:
        store.create("record-1.json", b"another")
    except AlreadyExists:
        pass
    store.create(f"checkpoints/{text}", text.encode())
    store.copy(f"checkpoints/{text}", "model.keras")
    if store.exists("checkpoints/1") and text != "1":
        assert store.read("checkpoints/1") == b"1"
        store.delete("checkpoints/1")
    print("done")
except JobError as error:
    print(error.exit_code, error)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users reach; pytest closes its own to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def shared_folder(open_folder: Path) -> Path:
    """A folder of one group, setgid, as a team's output folder on a cluster is."""
    if os.getuid() != 0:
        pytest.skip("becoming two users needs root")
    folder = open_folder / "runs"
    folder.mkdir()
    os.chown(folder, 0, 4242)
    folder.chmod(0o2775)
    return folder


@pytest.mark.parametrize("links", ["yes", "no"])
@pytest.mark.parametrize("umask", ["022", "002", "077"])
def test_two_users_of_one_group_share_a_folder_and_a_run(shared_folder: Path, umask: str, links: str) -> None:
    one = [str(4001), umask, str(shared_folder / "a"), "1", links]
    other = [str(4002), umask, str(shared_folder / "b"), "1", links]
    third = [str(4003), umask, str(shared_folder / "a"), "2", links]
    for arguments in (one, other, third):
        assert output(run_python(COLLEAGUE, *arguments)) == "done\n", arguments
    assert sorted(os.listdir(shared_folder)) == ["a", "b"], "nothing of ours lies in the output root"
    assert sorted(names(LocalStore(str(shared_folder / "a")))) == [
        "checkpoints/2",
        "model.keras",
        "record-1.json",
        "record-2.json",
    ]
    assert LocalStore(str(shared_folder / "a")).read("model.keras") == b"2"


def test_a_folder_that_is_not_shared_stays_closed(tmp_path: Path, opened: Open) -> None:
    tmp_path.chmod(0o755)
    sticky = tmp_path / "tmp"
    sticky.mkdir()
    sticky.chmod(0o1777)
    previous = os.umask(0o022)
    try:
        for root in (tmp_path / "run", sticky / "run"):
            opened(root).create("checkpoints/a", b"1")
            assert stat.S_IMODE(root.stat().st_mode) & 0o022 == 0
            assert stat.S_IMODE((root / "checkpoints" / "a").stat().st_mode) == 0o644
    finally:
        os.umask(previous)


def test_a_folder_without_permission(open_folder: Path) -> None:
    """Root may do anything, so the attempt is made as another user."""
    code = """if True:
        import os, sys
        from job.domain.errors import JobError
        from job.store.local import LocalStore
        if os.getuid() == 0:
            os.setgid(65534); os.setuid(65534)
        try:
            LocalStore(sys.argv[1]).check()
        except JobError as error:
            print(error.exit_code, error)
    """
    open_folder.chmod(0o555)
    printed = output(run_python(code, str(open_folder)))
    assert printed.startswith("77 ")
    assert f"annot create a file in {open_folder}" in printed
    assert ": Permission denied. The job runs as user " in printed
