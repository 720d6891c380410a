"""The local store on every kind of file system, and what their faults become."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.domain.errors import JobError, MissingInput, PermissionRefused, StorageFailed
from job.store.contract import AlreadyExists, NotFound
from job.store.local import LocalStore
from tests.store.conftest import (
    Open,
    hidden,
    mounted,
    names,
    output,
    refuse,
    run_python,
    scratch_file,
)
from tests.store.test_contract import RACER

# -- links refused -------------------------------------------------------------------------------------

REFUSALS = [
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
    errno.EINVAL,
    errno.EIO,
    524,  # ENOTSUPP
]


def creates_exclusively(store: LocalStore) -> None:
    """Create, lose and race; the losers see the winner's content."""
    store.check()
    store.create("a", b"1")
    store.create("a", b"1")
    with pytest.raises(AlreadyExists):
        store.create("a", b"2")
    store.copy("a", "b")
    store.replace("b", b"22")
    store.upload("checkpoints/c", scratch_file(store, b"3"))
    assert [store.read(name) for name in ("a", "b", "checkpoints/c")] == [b"1", b"22", b"3"]
    others = [LocalStore(store.location) for _ in range(8)]

    def attempt(number: int) -> bool:
        try:
            others[number].create("d", b"%d" % number)
        except AlreadyExists:
            assert store.read("d") != b"%d" % number
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
    assert names(store) == ["a", "b", "checkpoints/c", "d"]
    store.delete("d")
    assert not store.exists("d")
    store.create("d", b"again")
    assert store.read("d") == b"again"
    assert hidden(store.root) == []


@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
def test_wherever_links_are_refused_create_is_still_exclusive(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse(monkeypatch, code)
    creates_exclusively(opened(tmp_path / "run"))


def test_a_fault_that_passes_does_not_make_a_file_system_one_without_links(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would use two ways of taking a name, which do not exclude each other."""
    real, faults = os.link, [errno.EIO, errno.EIO]

    def link(source: Any, target: Any) -> None:
        if faults:
            raise OSError(faults.pop(), "a fault that passes", str(source))
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    store = opened(tmp_path)
    store.create("a", b"1")
    assert faults == []
    assert store.read("a") == b"1"
    assert list(tmp_path.glob(".taken-*")) == []


def test_a_fault_of_link_itself_is_no_refusal(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.check()
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(StorageFailed, match="Input/output error"):
        store.create("a", b"1")
    assert names(store) == []
    assert hidden(tmp_path) == []


# -- folders without fsync -----------------------------------------------------------------------------


def refuse_folder_sync(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "code",
    [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EIO],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_system_whose_folders_cannot_be_synced(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, code: int, links: bool
) -> None:
    refuse_folder_sync(monkeypatch, code)
    if not links:
        refuse(monkeypatch, errno.EPERM)
    creates_exclusively(opened(tmp_path / "run"))


def test_a_folder_that_could_be_synced_before_fails_loudly(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.check()
    refuse_folder_sync(monkeypatch, errno.EIO)
    with pytest.raises(StorageFailed, match="Input/output error"):
        store.create("a", b"1")


def test_a_file_that_cannot_be_synced_has_no_name(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = opened(tmp_path)
    store.check()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageFailed, match="Input/output error"):
        store.create("a", b"1")
    assert names(store) == []


# -- other file systems --------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "overlay", "vfat", "ext4"])
def other_file_system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of each kind, really mounted; skipped where the machine cannot."""
    folder = tmp_path / "mount"
    if request.param == "tmpfs":
        yield from mounted(folder, "-t", "tmpfs", "tmpfs")
    elif request.param == "overlay":
        yield from mounted_overlay(tmp_path, folder)
    else:
        yield from mounted_image(tmp_path / "image", folder, request.param)


def mounted_overlay(tmp_path: Path, folder: Path) -> Iterator[Path]:
    layers = tmp_path / "layers"  # of a tmpfs: an overlay cannot lie on another overlay, as in a container
    for _ in mounted(layers, "-t", "tmpfs", "tmpfs"):
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        yield from mounted(folder, "-t", "overlay", "-o", options, "overlay")


def mounted_image(image: Path, folder: Path, kind: str) -> Iterator[Path]:
    maker = shutil.which(f"mkfs.{kind}")
    if maker is None:
        pytest.skip(f"this machine has no mkfs.{kind}")
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run([maker, str(image)], check=True, capture_output=True)
    yield from mounted(folder, "-o", "loop", "-t", kind, str(image))


@pytest.mark.parametrize("links", [True, False], ids=["as it is", "no links"])
def test_every_file_system_keeps_the_contract(
    other_file_system: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        refuse(monkeypatch, errno.EPERM)
    creates_exclusively(opened(other_file_system / "run"))


@pytest.fixture(params=[errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EIO], ids=errno.errorcode.get)
def fuse_mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real FUSE mount that refuses links with each error, and to sync folders with an EIO."""
    if os.getuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting a FUSE file system needs root and /dev/fuse")
    source, folder = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    folder.mkdir()
    arguments = [str(source), str(folder), str(request.param), str(errno.EIO)]
    command = [sys.executable, str(Path(__file__).with_name("fuse_server.py")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        if server.stdout.readline() != "mounted\n":
            pytest.skip(f"this machine cannot mount: {server.stderr.read()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    assert server.returncode == 0


def test_a_fuse_mount_without_links_keeps_the_contract(fuse_mount: Path, opened: Open) -> None:
    with pytest.raises(OSError, match=r"."):
        os.link(__file__, fuse_mount / "link")
    creates_exclusively(opened(fuse_mount / "run"))


@pytest.mark.parametrize("fuse_mount", [errno.EPERM], indirect=True)
def test_processes_race_on_a_fuse_mount_without_links(fuse_mount: Path, opened: Open) -> None:
    root = fuse_mount / "run"
    outputs = [output(process) for process in [run_python(RACER, str(root)) for _ in range(3)]]
    assert sorted(int(number) for text in outputs for number in text.split()) == list(range(10))
    store = opened(root)
    assert names(store, "record-") == [f"record-{revision:010d}.json" for revision in range(1, 16)]
    assert [len(store.read(name)) > 0 for name in names(store, "record-")] == [True] * 15
    assert (root / ".taken-record-0000000001.json" / "taken").exists(), "it was the way without links"


def test_checkpoints_on_another_mount(tmp_path: Path, opened: Open) -> None:
    root = tmp_path / "run"
    (root / "checkpoints").mkdir(parents=True)
    for _ in mounted(root / "checkpoints", "-t", "tmpfs", "tmpfs"):
        store = opened(root)
        store.check()
        store.upload("checkpoints/a", scratch_file(store, b"model"))
        store.copy("checkpoints/a", "model.keras")
        store.copy("model.keras", "checkpoints/b")
        assert [entry.name for entry in store.list()] == ["checkpoints/a", "checkpoints/b", "model.keras"]
        assert store.read("model.keras") == store.read("checkpoints/b") == b"model"


def test_check_looks_at_mounts_below_the_root(tmp_path: Path, opened: Open) -> None:
    root = tmp_path / "run"
    (root / "checkpoints").mkdir(parents=True)
    for _ in mounted(root / "checkpoints", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        with pytest.raises(PermissionRefused, match=r"create a file in .*/checkpoints.*: Read-only"):
            opened(root).check()


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path, opened: Open) -> None:
    store = opened(small_disk / "run")
    store.replace("result.json", b"1" * 300_000)
    too_large = tmp_path / "too large"
    too_large.write_bytes(bytes(2_000_000))
    attempts: list[Callable[[], object]] = [
        lambda: store.create("a", bytes(2_000_000)),
        lambda: store.upload("a", too_large),
        lambda: store.replace("result.json", b"2" * 900_000),
    ]
    for attempt in attempts:
        with pytest.raises(StorageFailed, match=r"No space left on device, [\d,.]+ MB are free") as caught:
            attempt()
        assert caught.value.exit_code == 74
        assert hidden(small_disk) == [], "half a file would keep the disk full"
    assert names(store) == ["result.json"]
    assert store.read("result.json") == b"1" * 300_000
    store.replace("result.json", b"3" * 300_000)


def test_check_finds_a_full_disk(small_disk: Path, opened: Open) -> None:
    store = opened(small_disk)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(StorageFailed, match="MB are free"):
        store.check()
    (small_disk / "filler").unlink()
    store.check()


def test_a_read_only_disk(small_disk: Path, opened: Open) -> None:
    opened(small_disk).create("record-0000000001.json", b"1")
    store = opened(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    attempts: list[Callable[[], object]] = [
        lambda: store.check(),
        lambda: store.create("a", b""),
        lambda: store.replace("record-0000000001.json", b"2"),
        lambda: store.delete("record-0000000001.json"),
        lambda: opened(small_disk / "new").check(),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionRefused, match="Read-only file system") as caught:
            attempt()
        assert caught.value.exit_code == 77
    store.check(write=False)
    assert store.exists("record-0000000001.json")
    assert store.read("record-0000000001.json") == b"1"
    with pytest.raises(NotFound):
        store.read("absent")
    store.begin_attempt(3)  # a sweep that cannot be is no failure
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_check_of_what_is_not_a_folder(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(MissingInput):
            opened(path).check()
    with pytest.raises(MissingInput, match="no folder"):
        opened(tmp_path / "absent").check(write=False)
    assert not (tmp_path / "absent").exists()


def failure_of_check(store: LocalStore) -> JobError:
    with pytest.raises(JobError) as caught:
        store.check()
    return caught.value


@pytest.mark.parametrize(("call", "act"), [("replace", "replace"), ("unlink", "delete")])
def test_check_names_the_act_that_is_refused(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, call: str, act: str
) -> None:
    def refuse(path: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, call, refuse)
    failure = failure_of_check(opened(tmp_path / "run"))
    assert failure.exit_code == 77
    assert f"annot {act} a file in {tmp_path / 'run'}" in str(failure)
    assert ": Operation not permitted." in str(failure)


def test_check_finds_a_file_system_that_gives_a_name_twice(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", os.replace)
    failure = failure_of_check(opened(tmp_path / "run"))
    assert failure.exit_code == 74
    assert "gave one name to two files" in str(failure)


def test_check_finds_a_file_system_that_loses_what_is_in_a_renamed_folder(
    tmp_path: Path, opened: Open
) -> None:
    """fusefat 0.1a does, and refuses links."""
    image, folder = tmp_path / "image", tmp_path / "mount"
    programs = [shutil.which(name) for name in ("mkfs.vfat", "fusefat", "umount")]
    if None in programs or os.getuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("needs root, /dev/fuse, mkfs.vfat and fusefat")
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.vfat", str(image)], check=True, capture_output=True)
    subprocess.run(["fusefat", "-o", "rw+", str(image), str(folder)], check=True, capture_output=True)
    try:
        failure = failure_of_check(opened(folder / "run"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert failure.exit_code == 74
    assert "lost the content of a file" in str(failure)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_check_finds_a_file_system_that_loses_content(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """The same fault on any machine: what gets its last name is empty."""
    real = os.rename if not links else os.link

    def losing(source: Any, target: Any, **options: Any) -> None:
        path = Path(source) / "content" if Path(source).is_dir() else Path(source)
        path.write_bytes(b"")
        real(source, target)

    if not links:
        refuse(monkeypatch, errno.EPERM)
    monkeypatch.setattr(os, "link" if links else "rename", losing)
    failure = failure_of_check(opened(tmp_path / "run"))
    assert failure.exit_code == 74
    assert "lost the content of a file" in str(failure)


def test_a_link_to_a_folder_hides_nothing_from_a_list(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path / "run")
    store.create("a/b/object", b"1")
    (store.root / "0").symlink_to(store.root / "a" / "b")
    assert names(store) == ["a/b/object"]
