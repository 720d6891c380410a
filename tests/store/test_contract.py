"""The contract of ``Store``, held by a folder, by a folder without links, and by a bucket."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.domain.errors import InvalidData, UsageError
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists, Entry, NotFound, Store
from job.store.location import join, open_store
from tests.store.conftest import ROOT, names, output, run_python, scratch_file

LARGE = os.urandom(9 << 20)  # bytes; above 8 MiB the client uploads in chunks


# -- create, upload, replace, copy ---------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"content", bytes(range(256)) * 1000])
def test_what_was_created_can_be_read(store: Store, data: bytes) -> None:
    store.create("folder/object", data)
    assert store.read("folder/object") == data
    assert store.list() == [Entry("folder/object", len(data))]


def test_create_never_overwrites(store: Store) -> None:
    store.create("config.json", b"first")
    for other in (b"second", b"other", b""):  # also of equal length
        with pytest.raises(AlreadyExists):
            store.create("config.json", other)
    assert store.read("config.json") == b"first"


def test_create_with_equal_content_is_ours(store: Store, open_another: Callable[[], Store]) -> None:
    store.create("config.json", b"same")
    store.create("config.json", b"same")
    open_another().create("config.json", b"same")
    assert store.read("config.json") == b"same"
    assert names(store) == ["config.json"]


def test_an_absent_object_is_not_found(store: Store, tmp_path: Path) -> None:
    store.create("folder/object", b"")
    for name in ("absent", "folder", "folder/object/below"):
        assert not store.exists(name)
        with pytest.raises(NotFound):
            store.read(name)
        with pytest.raises(NotFound):
            store.checksum(name)
        with pytest.raises(NotFound):
            store.download(name, tmp_path / "file")
        with pytest.raises(NotFound):
            store.copy(name, "copy")
    assert not (tmp_path / "file").exists()
    assert names(store) == ["folder/object"]


def test_exists(store: Store) -> None:
    assert not store.exists("record-0000000001.json")
    store.create("record-0000000001.json", b"{}")
    assert store.exists("record-0000000001.json")
    store.delete("record-0000000001.json")
    assert not store.exists("record-0000000001.json")


@pytest.mark.parametrize("data", [b"", b"small", LARGE], ids=["empty", "small", "large"])
def test_upload_and_download(store: Store, tmp_path: Path, data: bytes) -> None:
    path = scratch_file(store, data)
    store.upload("checkpoints/a", path)
    assert path.read_bytes() == data, "it stays as it is"
    assert store.list() == [Entry("checkpoints/a", len(data))]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"what was there")
    assert store.checksum("checkpoints/a") == (len(data), crc32c(data))
    store.download("checkpoints/a", tmp_path / "folder" / "file")
    assert (tmp_path / "folder" / "file").read_bytes() == data
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("data", [b"ours", LARGE], ids=["small", "large"])
def test_upload_never_overwrites(store: Store, data: bytes) -> None:
    store.upload("a", scratch_file(store, data))
    with pytest.raises(AlreadyExists):
        store.upload("a", scratch_file(store, data[:-1] + b"?"))
    store.upload("a", scratch_file(store, data))  # equal content is ours
    assert store.read("a") == data


def test_an_uploaded_file_is_a_file_of_its_own(store: Store) -> None:
    path = scratch_file(store, b"checkpoint")
    store.upload("a", path)
    with path.open("r+b") as file:
        file.write(b"CHECK")
    assert store.read("a") == b"checkpoint"


def test_a_file_from_another_file_system_can_be_uploaded(store: Store) -> None:
    path = Path("/dev/shm") / f"storage-test-{os.getpid()}"
    path.write_bytes(b"from memory")
    store.upload("a", path)
    path.unlink()
    assert store.read("a") == b"from memory"


def test_replace(store: Store) -> None:
    store.replace("result.json", b"1")
    store.replace("result.json", b"2")
    store.replace("result.json", b"2")  # the answer was lost: again
    store.create("config.json", b"created")
    store.replace("config.json", b"replaced")
    assert [store.read(name) for name in ("result.json", "config.json")] == [b"2", b"replaced"]
    with pytest.raises(AlreadyExists):
        store.create("config.json", b"created")
    assert names(store) == ["config.json", "result.json"]


def test_copy(store: Store) -> None:
    store.create("checkpoints/a", b"model")
    store.create("checkpoints/b", b"other")
    store.copy("checkpoints/a", "model.keras")
    store.copy("checkpoints/a", "model.keras")  # the answer was lost: again
    assert store.read("model.keras") == b"model"
    store.copy("checkpoints/b", "model.keras")
    assert store.read("model.keras") == b"other"
    store.delete("checkpoints/b")
    assert store.read("model.keras") == b"other"


def test_a_copy_is_a_file_of_its_own(tmp_path: Path) -> None:
    """``load_model(p).save(p)`` opens the file to write: it must not reach the checkpoint."""
    store = open_store(str(tmp_path))
    store.create("checkpoints/a", b"model")
    store.copy("checkpoints/a", "model.keras")
    with (tmp_path / "model.keras").open("r+b") as file:
        file.write(b"MODEL")
    assert store.read("checkpoints/a") == b"model"


# -- list and delete -----------------------------------------------------------------------------------


def test_list_is_sorted_and_filtered(store: Store) -> None:
    assert store.list() == []
    for name in ("b/2", "b/10", "a", "b-c", "b/d/e"):
        store.create(name, b"")
    assert names(store) == ["a", "b-c", "b/10", "b/2", "b/d/e"]
    assert names(store, "b/") == ["b/10", "b/2", "b/d/e"]
    assert names(store, "b/1") == ["b/10"]
    assert names(store, "b") == ["b-c", "b/10", "b/2", "b/d/e"]
    assert names(store, "absent/") == names(store, "a/") == []


def test_list_shows_nothing_of_the_store_itself(store: Store) -> None:
    store.check()
    scratch_file(store, b"unfinished")
    store.begin_attempt(7)
    store.create("record-0000000001.json", b"1")
    store.replace("result.json", b"2")
    assert names(store) == ["record-0000000001.json", "result.json"]


def test_delete(store: Store) -> None:
    for name in ("a", "b/c"):
        store.create(name, b"first")
        store.delete(name)
        store.delete(name)  # again: no error
    store.delete("never/there")
    assert store.list() == []
    store.create("a", b"second")
    assert store.read("a") == b"second"


ESCAPES = [
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "./a",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a\0b",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leaves_the_root_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: store.read(name),
        lambda: store.exists(name),
        lambda: store.create(name, b""),
        lambda: store.upload(name, scratch_file(store, b"")),
        lambda: store.replace(name, b""),
        lambda: store.download(name, tmp_path / "file"),
        lambda: store.copy(name, "a"),
        lambda: store.delete(name),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidData):
            attempt()
    store.create("a", b"")
    with pytest.raises(InvalidData):
        store.copy("a", name)
    if name not in ("", "a/"):  # which are prefixes
        with pytest.raises(InvalidData):
            store.list(f"{name}/")


# -- races ---------------------------------------------------------------------------------------------


def test_of_racing_creates_one_wins(open_another: Callable[[], Store]) -> None:
    stores = [open_another() for _ in range(6)]

    def attempt(name: str, number: int) -> int | None:
        try:
            stores[number].create(name, b"%d" % number)
        except AlreadyExists:
            assert stores[number].read(name) != b"%d" % number, "who lost can read who won"
            return None
        return number

    with ThreadPoolExecutor(len(stores)) as pool:
        for name in (f"record-{revision:010d}.json" for revision in range(10)):
            tries = [pool.submit(attempt, name, number) for number in range(len(stores))]
            winners = [number for number in (each.result() for each in tries) if number is not None]
            assert len(winners) == 1
            assert stores[0].read(name) == b"%d" % winners[0]


def test_racing_creates_of_equal_content_all_succeed(open_another: Callable[[], Store]) -> None:
    stores = [open_another() for _ in range(6)]
    with ThreadPoolExecutor(len(stores)) as pool:
        for name in ("folder/a", "folder/b", "folder/c"):
            list(pool.map(lambda store, name=name: store.create(name, b"same"), stores))
    assert stores[0].read("folder/c") == b"same"


RACER = """
import os, sys
from job.store.contract import AlreadyExists
from job.store.location import open_store
store, wins, revision = open_store(sys.argv[1]), [], 0
for number in range(10):
    try:
        store.create(f"folder-{number}/a", b"%d" % os.getpid())
        wins.append(number)
    except AlreadyExists:
        pass
for _ in range(5):
    while True:
        revision += 1
        try:
            store.create(f"record-{revision:010d}.json", b"%d" % os.getpid())
            break
        except AlreadyExists:
            pass
store.close()
print(*wins)
"""


def test_racing_processes(store: Store, location: str) -> None:
    processes = [run_python(RACER, location) for _ in range(3)]
    outputs = [output(process) for process in processes]
    wins = [int(number) for text in outputs for number in text.split()]
    assert sorted(wins) == list(range(10)), "each name was created by exactly one process"
    assert names(store, "record-") == [f"record-{revision:010d}.json" for revision in range(1, 16)]
    authors = [int(store.read(name)) for name in names(store, "record-")]
    assert sorted(authors) == sorted(5 * [process.pid for process in processes]), "no revision was lost"


# -- check, attempts, time -----------------------------------------------------------------------------


def test_check_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    store.check()
    store.check(write=False)
    assert store.list() == []
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []


def test_begin_attempt_is_harmless_where_nothing_is(store: Store) -> None:
    store.begin_attempt(3)
    store.create("a", b"1")
    store.begin_attempt(4)
    assert store.read("a") == b"1"


def test_when_the_time_is_up_a_long_call_ends(store: Store) -> None:
    from job.domain.errors import StorageFailed

    path = scratch_file(store, LARGE)
    store.finish_within(0.0)
    store.finish_within(100.0)  # never later than promised
    start = time.monotonic()
    with pytest.raises(StorageFailed, match="time"):
        store.upload("a", path)
    assert time.monotonic() - start < 30.0
    assert path.exists()


# -- locations -----------------------------------------------------------------------------------------


def test_join() -> None:
    assert join("runs", "x") == "runs/x"
    assert join("/runs/", "a/b", "c") == "/runs/a/b/c"
    assert join("gs://bucket", "x", "") == "gs://bucket/x"
    assert join("gs://bucket/runs/", "/x/", "y") == "gs://bucket/runs/x/y"


@pytest.mark.parametrize(
    "location",
    ["", "s3://bucket/x", "gs:", "gs:/bucket/x", "gs://", "gs://a", "gs://Bucket", "gs://bucket/../x"],
)
def test_a_location_that_cannot_be_is_refused(location: str) -> None:
    with pytest.raises(UsageError, match="gs://bucket/prefix"):
        open_store(location)


def test_opening_a_store_touches_nothing(tmp_path: Path) -> None:
    open_store(str(tmp_path / "absent")).close()
    open_store("gs://bucket-that-nobody-has/x").close()
    assert list(tmp_path.iterdir()) == []


def test_a_local_store_needs_no_cloud_library() -> None:
    code = "import sys, job.store.location; print({'google.cloud.storage', 'tensorflow'} & set(sys.modules))"
    assert output(run_python(code)).strip() == "set()"


def test_crc32c(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    (tmp_path / "file").write_bytes(LARGE)
    assert crc32c(tmp_path / "file") == crc32c(LARGE)


def test_no_store_uses_a_lock() -> None:
    modules = list((ROOT / "job" / "store").glob("*.py"))
    assert len(modules) >= 5
    for module in modules:
        assert not re.search(r"\bfcntl\b|flock|lockf", module.read_text()), module
