"""The contract of ``Store``, held by both stores, and what each of them promises beyond it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError

from job.errors import (
    InvalidData,
    JobError,
    MissingInput,
    PermissionRefused,
    StorageFailed,
    Superseded,
    UsageError,
)
from job.gcs import GcsStore
from job.storage import (
    AlreadyExists,
    Conflict,
    LocalStore,
    NotFound,
    Store,
    acquire_host_lock,
    crc32c,
    find_runs,
    join,
    open_store,
)
from tests.gcs_server import Gateway

ROOT = Path(__file__).parent.parent
LARGE = os.urandom(9 << 20)  # bytes; above 8 MiB the client uploads in chunks


@pytest.fixture(params=["local", "gcs"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "gcs":
        return join(request.getfixturevalue("gcs_bucket"), "runs", "x")
    return str(tmp_path / "runs" / "x")


@pytest.fixture
def open_another(
    location: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[], Store]]:
    """Opens further stores on the same location, as other processes would."""
    monkeypatch.setenv("JOB_SPOOL", str(tmp_path / "spool"))
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(open_store(location)))


@pytest.fixture
def store(open_another: Callable[[], Store]) -> Store:
    return open_another()


def staged(store: Store, data: bytes) -> Path:
    path = store.staging() / "a file"
    path.write_bytes(data)
    return path


def names(store: Store, prefix: str = "") -> list[str]:
    return [entry.name for entry in store.list(prefix)]


def run_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def output(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return text


# -- create, read, upload, download, copy --------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"content", bytes(range(256)) * 1000])
def test_what_was_created_can_be_read(store: Store, data: bytes) -> None:
    store.create("folder/object", data)
    assert store.read("folder/object")[0] == data
    assert [(entry.name, entry.size) for entry in store.list()] == [("folder/object", len(data))]


def test_create_never_overwrites(store: Store) -> None:
    store.create("config.json", b"first")
    with pytest.raises(AlreadyExists):
        store.create("config.json", b"second")
    with pytest.raises(AlreadyExists):
        store.create("config.json", b"other")  # of equal length
    assert store.read("config.json")[0] == b"first"


def test_create_with_equal_content_is_ours(store: Store, open_another: Callable[[], Store]) -> None:
    store.create("config.json", b"same")
    version = store.read("config.json")[1]
    open_another().create("config.json", b"same")
    assert store.read("config.json") == (b"same", version)


def test_an_absent_object_is_not_found(store: Store, tmp_path: Path) -> None:
    store.create("folder/object", b"")
    for name in ("absent", "folder", "folder/object/below"):
        with pytest.raises(NotFound):
            store.read(name)
        with pytest.raises(NotFound):
            store.download(name, tmp_path / "file")
        with pytest.raises(NotFound):
            store.copy(name, "copy")
    assert not (tmp_path / "file").exists()
    assert names(store) == ["folder/object"]


@pytest.mark.parametrize("data", [b"", b"small", LARGE], ids=["empty", "small", "large"])
def test_upload_and_download(store: Store, tmp_path: Path, data: bytes) -> None:
    path = staged(store, data)
    entry = store.upload("checkpoints/a", path)
    assert not path.exists()
    assert (entry.name, entry.size) == ("checkpoints/a", len(data))
    assert store.list() == [entry]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"what was there")
    store.download("checkpoints/a", tmp_path / "folder" / "file")
    assert (tmp_path / "folder" / "file").read_bytes() == data
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("data", [b"ours", LARGE], ids=["small", "large"])
def test_upload_never_overwrites(store: Store, data: bytes) -> None:
    entry = store.upload("a", staged(store, data))
    other = staged(store, data[:-1] + b"?")
    with pytest.raises(AlreadyExists):
        store.upload("a", other)
    assert other.exists(), "the caller uploads it again under a new nonce"
    assert store.read("a")[0] == data
    assert store.upload("a", staged(store, data)) == entry, "equal content is ours"
    assert not staged(store, b"").with_name("a file2").exists()


def test_a_file_from_another_file_system_can_be_uploaded(store: Store) -> None:
    path = Path("/dev/shm") / f"storage-test-{os.getpid()}"
    path.write_bytes(b"from memory")
    store.upload("a", path)
    assert store.read("a")[0] == b"from memory"
    assert not path.exists()


def test_what_it_holds_is_told_by_size_and_checksum(store: Store) -> None:
    store.create("model.keras", b"model")
    assert store.holds("model.keras", 5, crc32c(b"model"))
    assert not store.holds("model.keras", 5, crc32c(b"other"))
    assert not store.holds("model.keras", 4, crc32c(b"model"))
    assert not store.holds("absent", 5, crc32c(b"model"))


def test_copy(store: Store) -> None:
    store.create("checkpoints/a", b"model")
    store.create("checkpoints/b", b"other")
    store.copy("checkpoints/a", "model.keras")
    store.copy("checkpoints/a", "model.keras")  # the answer was lost: again
    assert store.read("model.keras")[0] == b"model"
    with pytest.raises(AlreadyExists):
        store.copy("checkpoints/b", "model.keras")
    store.delete("checkpoints/a", store.list("checkpoints/a")[0].version)
    assert store.read("model.keras")[0] == b"model"


# -- swap ----------------------------------------------------------------------------------------------


def test_swap_replaces_the_expected_version_only(store: Store) -> None:
    first = store.swap("record.json", b"1", None)
    second = store.swap("record.json", b"2", first)
    assert store.read("record.json") == (b"2", second)
    with pytest.raises(Conflict):
        store.swap("record.json", b"3", first)
    with pytest.raises(Conflict):
        store.swap("record.json", b"3", None)
    assert store.read("record.json") == (b"2", second)
    third = store.swap("record.json", b"3", second)
    assert len({first, second, third}) == 3


def test_swap_of_an_absent_object_is_a_conflict(store: Store) -> None:
    version = store.swap("record.json", b"1", None)
    with pytest.raises(Conflict):
        store.swap("other.json", b"2", version)
    assert names(store) == ["record.json"]


@pytest.mark.parametrize("expected_first", [True, False])
def test_a_swap_whose_answer_was_lost_succeeds_when_repeated(store: Store, expected_first: bool) -> None:
    first = None if expected_first else store.swap("record.json", b"1", None)
    second = store.swap("record.json", b"2", first)
    assert store.swap("record.json", b"2", first) == second
    assert store.read("record.json") == (b"2", second)


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


def test_list_shows_nothing_of_the_store_itself(store: Store, location: str) -> None:
    store.check()
    staged(store, b"unfinished")
    lock = acquire_host_lock(location)
    store.swap("record.json", b"2", store.swap("record.json", b"1", None))
    assert names(store) == ["record.json"]
    assert find_runs(location)[0] == [location]
    lock.release()


def test_delete_deletes_one_version_only(store: Store) -> None:
    store.create("a", b"first")
    old = store.list()[0].version
    store.delete("a", old)
    assert store.list() == []
    store.delete("a", old)  # again: no error
    store.delete("never/there", old)
    time.sleep(0.02)  # a clock tick of the file system
    store.create("a", b"third")
    store.delete("a", old)
    assert store.read("a")[0] == b"third"


def test_every_version_that_a_store_gave_can_be_deleted(store: Store) -> None:
    uploaded = store.upload("a", staged(store, b"a")).version
    store.create("b", b"b")
    swapped = store.swap("c", b"c", None)
    for name, version in (("a", uploaded), ("b", store.read("b")[1]), ("c", swapped)):
        store.delete(name, version)
    assert store.list() == []
    store.create("b", b"B")
    store.delete("b", swapped)
    assert names(store) == ["b"]


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
        lambda: store.create(name, b""),
        lambda: store.upload(name, staged(store, b"")),
        lambda: store.download(name, tmp_path / "file"),
        lambda: store.copy(name, "a"),
        lambda: store.swap(name, b"", None),
        lambda: store.delete(name, "1"),
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

    def attempt(number: int) -> int | None:
        try:
            stores[number].create("record", b"%d" % number)
        except AlreadyExists:
            return None
        return number

    with ThreadPoolExecutor(len(stores)) as pool:
        winners = [number for number in pool.map(attempt, range(len(stores))) if number is not None]
    assert len(winners) == 1
    assert stores[0].read("record")[0] == b"%d" % winners[0]


def test_racing_swaps_lose_no_update(open_another: Callable[[], Store]) -> None:
    """Each of four threads counts to ten; every version must have exactly one successor."""
    stores = [open_another() for _ in range(4)]
    stores[0].swap("record", b"0", None)
    successes: list[str] = []

    def count(store: Store) -> None:
        done = 0
        while done < 10:
            data, version = store.read("record")
            # Threads that write equal bytes would both win: an attempt's record holds its nonce.
            mine = b"%d %d" % (int(data.split()[0]) + 1, threading.get_ident())
            with contextlib.suppress(Conflict):
                store.swap("record", mine, version)
                successes.append(version)
                done += 1

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(count, stores))
    assert stores[0].read("record")[0].split()[0] == b"40"
    assert len(set(successes)) == len(successes) == 40


RACER = """
import os, sys
from job.storage import AlreadyExists, Conflict, open_store
store, wins = open_store(sys.argv[1]), []
for number in range(10):
    try:
        store.create(f"folder-{number}/a", b"%d" % os.getpid())
        wins.append(number)
    except AlreadyExists:
        pass
for _ in range(5):
    while True:
        data, version = store.read("record")
        try:
            store.swap("record", b"%d %d" % (int(data.split()[0]) + 1, os.getpid()), version)
            break
        except Conflict:
            pass
store.close()
print(*wins)
"""


def test_racing_processes(store: Store, location: str) -> None:
    store.swap("record", b"0", None)
    processes = [run_python(RACER, location) for _ in range(3)]
    wins = [int(number) for process in processes for number in output(process).split()]
    assert sorted(wins) == list(range(10)), "each name was created by exactly one process"
    assert store.read("record")[0].split()[0] == b"15"


# -- check, staging, hurry -----------------------------------------------------------------------------


def test_check_leaves_nothing_behind(store: Store) -> None:
    store.check()
    store.check(write=False)
    assert store.list() == []


def test_staging_folders_are_private(open_another: Callable[[], Store]) -> None:
    one, other = open_another(), open_another()
    assert one.staging() == one.staging() != other.staging()
    shutil.rmtree(one.staging())
    assert one.staging().is_dir(), "somebody cleaned up"
    folder = one.staging()
    one.close()
    assert not folder.exists()
    assert other.staging().is_dir()


def test_staging_of_killed_processes_is_swept(open_another: Callable[[], Store], location: str) -> None:
    code = """if True:
        import sys, time
        from job.storage import open_store
        folder = open_store(sys.argv[1]).staging()
        (folder / "half a checkpoint").write_bytes(bytes(1000))
        print(folder, flush=True)
        time.sleep(60)
    """
    process = run_python(code, location)
    assert process.stdout is not None
    leftover = Path(process.stdout.readline().strip())
    open_another().staging()
    assert os.listdir(leftover) == ["half a checkpoint"], "its owner is alive"
    process.kill()
    process.communicate()
    open_another().staging()
    assert not leftover.exists()


def test_hurry_ends_what_waits(open_another: Callable[[], Store]) -> None:
    store = open_another()
    store.create("a", b"")
    store.hurry(0.0)
    store.hurry(100.0)  # never later than promised
    start = time.monotonic()
    with blocked(store), pytest.raises(StorageFailed):
        store.swap("a", b"2", store.read("a")[1])
    assert time.monotonic() - start < 3.0


@contextlib.contextmanager
def blocked(store: Store) -> Iterator[None]:
    """Make a swap wait: locally for a lock; in the cloud nothing is needed once the time is up."""
    if not isinstance(store, LocalStore):
        yield
        return
    with (store.root / ".store-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_lock_that_is_never_let_go_is_reported(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path), deadline_seconds=0.2)
    version = store.swap("a", b"1", None)
    with blocked(store), pytest.raises(StorageFailed, match="does not let go"):
        store.swap("a", b"2", version)
    assert store.read("a")[0] == b"1"
    assert store.swap("a", b"2", version) != version
    store.close()


# -- locations -----------------------------------------------------------------------------------------


def test_join() -> None:
    assert join("runs", "x") == "runs/x"
    assert join("/runs/", "a/b", "c") == "/runs/a/b/c"
    assert join("gs://bucket", "x", "") == "gs://bucket/x"
    assert join("gs://bucket/runs/", "/x/", "y") == "gs://bucket/runs/x/y"


def test_find_runs(store: Store, location: str) -> None:
    assert find_runs(location)[0] == []
    for name in ("b/record.json", "a/b/record.json", "a/config.json", "c/old-record.json", "z.record.json"):
        store.create(name, b"{}")
    # A configuration alone is that of a run which has lost its record.
    assert find_runs(location)[0] == [join(location, folder) for folder in ("a", "a/b", "b")]
    assert find_runs(join(location, "b"))[0] == [join(location, "b")]
    store.create("record.json", b"{}")
    assert find_runs(location)[0] == [location, *(join(location, folder) for folder in ("a", "a/b", "b"))]


def test_a_link_hides_nothing_from_a_list(tmp_path: Path) -> None:
    with contextlib.closing(LocalStore(str(tmp_path / "run"))) as store:
        store.create("a/b/object", b"1")
        (store.root / "0").symlink_to(store.root / "a" / "b")
        assert names(store) == ["a/b/object"]


@pytest.mark.parametrize(
    "location", ["", "s3://bucket/x", "gs://", "gs://a", "gs://Bucket", "gs://bucket/../x"]
)
def test_a_location_that_cannot_be_is_refused(location: str) -> None:
    with pytest.raises(UsageError, match="gs://bucket/prefix"):
        open_store(location)


def test_opening_a_store_touches_nothing(tmp_path: Path) -> None:
    open_store(str(tmp_path / "absent")).close()
    open_store("gs://bucket-that-nobody-has/x").close()
    assert list(tmp_path.iterdir()) == []


def test_a_local_store_needs_no_cloud_library() -> None:
    code = (
        "import sys, job.storage; print('google.cloud.storage' in sys.modules, 'tensorflow' in sys.modules)"
    )
    assert output(run_python(code)).split() == ["False", "False"]


def test_crc32c(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    (tmp_path / "file").write_bytes(LARGE)
    assert crc32c(tmp_path / "file") == crc32c(LARGE)


# -- the local store: durability -----------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Records, in order, what is made durable and what is given a name."""
    seen: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "replace", "mkdir")}

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def give_name(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            real[name](source, target, **options)
            seen.append((f"{name} from", str(source)))
            seen.append((name, str(target)))

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", give_name("link"))
    monkeypatch.setattr(os, "replace", give_name("replace"))
    return seen


def assert_durable(events: list[tuple[str, str]], step: str, target: Path) -> None:
    """The content before the name, the name before the call's end: else a crash could show half a file."""
    named = events.index((step, str(target)))
    source = events[named - 1][1]
    assert ("fsync", source) in events[:named], "content is durable before it has a name"
    assert ("fsync", str(target.parent)) in events[named:], "the name is durable when the call returns"


def test_create_is_durable(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with contextlib.closing(LocalStore(str(tmp_path / "runs" / "x"))) as store:
        store.create("checkpoints/a", b"data")
        assert_durable(events, "link", tmp_path / "runs" / "x" / "checkpoints" / "a")
    named = events.index(("link", str(tmp_path / "runs" / "x" / "checkpoints" / "a")))
    for parent in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "x"):
        assert ("fsync", str(parent)) in events[:named], "new folders are durable too"


def test_upload_is_durable(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with contextlib.closing(LocalStore(str(tmp_path))) as store:
        store.upload("a", staged(store, b"data"))
        assert_durable(events, "link", tmp_path / "a")


def test_swap_is_durable(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with contextlib.closing(LocalStore(str(tmp_path))) as store:
        version = store.swap("record.json", b"1", None)
        assert_durable(events, "link", tmp_path / "record.json")
        store.swap("record.json", b"2", version)
        assert_durable(events, "replace", tmp_path / "record.json")


def test_what_counts_as_ours_is_durable(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    """An earlier attempt may have died between link and fsync: we finish its work."""
    (tmp_path / "a").write_bytes(b"data")
    with contextlib.closing(LocalStore(str(tmp_path))) as store:
        store.create("a", b"data")
    assert events.index(("fsync", str(tmp_path / "a"))) < len(events) - 1
    assert ("fsync", str(tmp_path)) in events[events.index(("fsync", str(tmp_path / "a"))) :]


SWAPPER = """
import sys
from job.storage import open_store
store = open_store(sys.argv[1])
data, version = store.read("record.json")
for number in range(int(data[:8]) + 1, 10**6):
    version = store.swap("record.json", (b"%08d" % number) * 5000, version)
    store.create(f"segments/{number}", b"%08d" % number * 100)
    print(number, flush=True)
"""


def test_a_kill_shows_no_half_of_anything(tmp_path: Path) -> None:
    with contextlib.closing(LocalStore(str(tmp_path))) as store:
        store.swap("record.json", b"00000000" * 5000, None)
        for delay in (0.0, 0.003, 0.011):
            process = run_python(SWAPPER, str(tmp_path))
            assert process.stdout is not None
            seen = [int(process.stdout.readline()) for _ in range(20)]
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            seen += [int(line) for line in process.communicate()[0].splitlines() if len(line) > 0]
            data, _ = store.read("record.json")
            assert data == data[:8] * 5000
            assert int(data[:8]) >= seen[-1], "what was reported is there"
        for entry in store.list("segments/"):
            number = int(entry.name.rpartition("/")[2])
            assert store.read(entry.name)[0] == b"%08d" % number * 100
    with contextlib.closing(LocalStore(str(tmp_path))) as store:
        store.staging()
        assert len(list((tmp_path / ".staging").iterdir())) == 2, "what the dead left is swept"


# -- the local store: file systems and their faults ----------------------------------------------------


@pytest.fixture(params=[errno.EPERM, errno.ENOTSUP])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Any, target: Any) -> None:
        raise OSError(request.param, os.strerror(request.param), str(source))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_create_is_still_exclusive(tmp_path: Path) -> None:
    with contextlib.closing(LocalStore(str(tmp_path))) as store:
        store.create("a", b"1")
        with pytest.raises(AlreadyExists):
            store.create("a", b"2")
        store.copy("a", "b")
        assert store.upload("c", staged(store, b"3")).size == 1
        assert [store.read(name)[0] for name in ("a", "b", "c")] == [b"1", b"1", b"3"]

        def attempt(number: int) -> bool:
            try:
                store.create("d", b"%d" % number)
            except AlreadyExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(8))) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"mounting a tmpfs was refused: {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    with contextlib.closing(LocalStore(str(small_disk / "run"))) as store:
        version = store.swap("record.json", b"1" * 300_000, None)
        too_large = tmp_path / "too large"
        too_large.write_bytes(bytes(2_000_000))
        attempts: list[Callable[[], object]] = [
            lambda: store.create("a", bytes(2_000_000)),
            lambda: store.upload("a", too_large),
            lambda: store.swap("record.json", b"2" * 900_000, version),
        ]
        for attempt in attempts:
            with pytest.raises(StorageFailed, match=r"No space left on device, 0\.\d MB are free") as caught:
                attempt()
            assert caught.value.exit_code == 74
            assert list(store.staging().iterdir()) == [], "half a file would keep the disk full"
        assert too_large.exists()
        assert names(store) == ["record.json"]
        assert store.read("record.json") == (b"1" * 300_000, version)
        assert store.swap("record.json", b"3" * 300_000, version) != version


def test_check_finds_a_full_disk(small_disk: Path) -> None:
    with contextlib.closing(LocalStore(str(small_disk))) as store:
        store.staging()
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(StorageFailed, match="MB are free"):
            store.check()
        (small_disk / "filler").unlink()
        store.check()


def test_a_read_only_disk(small_disk: Path) -> None:
    with contextlib.closing(LocalStore(str(small_disk))) as store:
        version = store.swap("record.json", b"1", None)
    with contextlib.closing(LocalStore(str(small_disk))) as store:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        attempts: list[Callable[[], object]] = [
            lambda: store.check(),
            lambda: store.create("a", b""),
            lambda: store.swap("record.json", b"2", version),
            lambda: store.delete("record.json", version),
            lambda: acquire_host_lock(str(small_disk)),
            lambda: LocalStore(str(small_disk / "new")).check(),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionRefused, match="Read-only file system") as caught:
                attempt()
            assert caught.value.exit_code == 77
        store.check(write=False)
        assert store.read("record.json") == (b"1", version)
        assert find_runs(str(small_disk))[0] == [str(small_disk)]
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Root may do anything, so the attempt is made as another user."""
    code = """if True:
        import os, sys
        from job.errors import JobError
        from job.storage import LocalStore
        if os.getuid() == 0:
            os.setgid(65534); os.setuid(65534)
        try:
            LocalStore(sys.argv[1]).check()
        except JobError as error:
            print(error.exit_code, error)
    """
    tmp_path.chmod(0o555)
    printed = output(run_python(code, str(tmp_path)))
    assert printed.startswith(f"77 Cannot use {tmp_path}: Permission denied. The job runs as user ")


def test_check_of_what_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(MissingInput):
            LocalStore(str(path)).check()
    with pytest.raises(MissingInput, match="no folder"):
        LocalStore(str(tmp_path / "absent")).check(write=False)
    assert not (tmp_path / "absent").exists()


# -- the host's lock -----------------------------------------------------------------------------------

OWNER = """
import sys, time
from job.errors import Superseded
from job.storage import acquire_host_lock
try:
    lock = acquire_host_lock(sys.argv[1])
except Superseded as error:
    sys.exit(error.exit_code)
print("mine", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["local", "gcs"])
def owned(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return str(tmp_path / "run") if request.param == "local" else "gs://some-bucket/run"


def test_a_living_owner_is_named_and_a_dead_one_is_not_missed(owned: str) -> None:
    process = run_python(OWNER, owned)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    expected = f"process {process.pid} on host {socket.gethostname()}, which is alive"
    with pytest.raises(Superseded, match=expected) as caught:
        acquire_host_lock(owned)
    assert caught.value.exit_code == 79
    taken = acquire_host_lock(owned, take_over=True)
    assert not taken.held
    assert not taken.acquire()
    process.kill()
    process.communicate()
    assert taken.acquire()
    assert taken.owner() == f"process {os.getpid()} on host {socket.gethostname()}"
    rival = run_python(OWNER, owned)
    assert rival.wait(timeout=30) == 79
    rival.communicate()
    taken.release()
    taken.release()
    acquire_host_lock(owned).release()


def test_runs_do_not_share_a_lock(owned: str) -> None:
    locks = [acquire_host_lock(owned), acquire_host_lock(join(owned, "other"))]
    assert [lock.held for lock in locks] == [True, True]
    for lock in locks:
        lock.release()


# -- the bucket: what is wrong is found in the first seconds -------------------------------------------


@pytest.fixture
def bucket(gcs_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("JOB_SPOOL", str(tmp_path))
    return gcs_bucket


def failure_of(attempt: Callable[[], object]) -> JobError:
    start = time.monotonic()
    with pytest.raises(JobError) as caught:
        attempt()
    assert time.monotonic() - start < 3.0, "found in the first seconds"
    return caught.value


def quick(location: str, **options: Any) -> GcsStore:
    return GcsStore(
        location, **{"first_delay_seconds": 0.02, "check_seconds": 0.6, "deadline_seconds": 0.6} | options
    )


@pytest.mark.usefixtures("bucket")
def test_an_absent_bucket(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with contextlib.closing(quick("gs://bucket-that-nobody-has/x")) as store:
        attempts: list[Callable[[], object]] = [
            store.check,
            store.list,
            lambda: store.create("a", b""),
            lambda: store.swap("a", b"", None),
            lambda: store.upload("a", tmp_path / "file"),
        ]
        for attempt in attempts:
            failure = failure_of(attempt)
            assert failure.exit_code == 66
            assert "no bucket gs://bucket-that-nobody-has." in str(failure)
            assert "gcloud storage buckets create gs://bucket-that-nobody-has" in str(failure)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", ["list", "upload"])
def test_a_forbidden_bucket(
    bucket: str, gcs_server: Gateway, monkeypatch: pytest.MonkeyPatch, status: int, kind: str
) -> None:
    monkeypatch.setattr(AnonymousCredentials, "refresh", lambda *_: None)
    with contextlib.closing(quick(f"{bucket}/x")) as store:
        requests = 3 if status == 401 else 1  # the client renews its token twice
        before = gcs_server.injected["status"]
        gcs_server.inject("status", kind, status=status, times=requests)
        failure = failure_of(store.check)
        assert failure.exit_code == 77
        assert "Grant roles/storage.objectUser on gs://" in str(failure)
        assert gcs_server.injected["status"] == before + requests, "not tried again"
        store.check()


def test_reading_needs_no_permission_to_write(bucket: str, gcs_server: Gateway) -> None:
    with contextlib.closing(quick(bucket)) as store:
        before = len(gcs_server.requests)
        store.check(write=False)
        assert gcs_server.kinds()[before:] == ["list"]
        store.check()
        assert gcs_server.kinds()[before:] == ["list", "list", "upload"]
        assert not any(
            request.path.endswith(f"/b/{store.bucket}") for request in gcs_server.requests[before:]
        )


def test_an_unreachable_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # refuses connections: nobody listens
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with contextlib.closing(quick("gs://bucket/x")) as store:
            for attempt in (store.check, lambda: store.read("a"), lambda: store.create("a", b"")):
                failure = failure_of(attempt)
                assert failure.exit_code == 74
                assert "Connection refused" in str(failure)


def test_a_service_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with contextlib.closing(quick("gs://bucket/x", timeout_seconds=0.3)) as store:
            assert failure_of(store.check).exit_code == 74
            assert failure_of(lambda: store.read("a")).exit_code == 74


def test_check_does_not_wait_for_a_hanging_name_service(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, released = socket.getaddrinfo, threading.Event()

    def hang(*arguments: Any, **options: Any) -> Any:
        released.wait(10)
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with contextlib.closing(quick(bucket, check_seconds=0.5)) as store:
        failure = failure_of(store.check)
        assert failure.exit_code == 74
        assert "did not answer within 0.5 s" in str(failure)
        released.set()
        for thread in threading.enumerate():
            if thread.name == "storage check":
                thread.join(5)


def credentials_after(refusals: int) -> Callable[..., tuple[AnonymousCredentials, None]]:
    left = [refusals]

    def default(scopes: list[str]) -> tuple[AnonymousCredentials, None]:
        assert scopes == ["https://www.googleapis.com/auth/devstorage.read_write"]
        if left[0] > 0:
            left[0] -= 1
            raise DefaultCredentialsError("no metadata server yet")  # type: ignore[no-untyped-call]
        return AnonymousCredentials(), None  # type: ignore[no-untyped-call]

    return default


@pytest.fixture
def no_emulator(bucket: str, gcs_server: Gateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same server, reached as the real service is: with credentials."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", gcs_server.url)
    return bucket


def test_a_late_metadata_server_is_waited_for(no_emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(google.auth, "default", credentials_after(refusals=3))
    with contextlib.closing(quick(no_emulator)) as store:
        store.check()
        store.create("a", b"1")
        assert store.read("a")[0] == b"1"


def test_no_credentials_at_all(no_emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(google.auth, "default", credentials_after(refusals=10**6))
    with contextlib.closing(quick(no_emulator)) as store:
        failure = failure_of(store.check)
    assert failure.exit_code == 74, "a Job tries again: it may be the metadata server's fault"
    assert "no metadata server yet" in str(failure)


def test_credentials_that_do_not_exist(
    no_emulator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with contextlib.closing(quick(no_emulator)) as store:
        failure = failure_of(store.check)
    assert failure.exit_code == 77
    assert "GOOGLE_APPLICATION_CREDENTIALS" in str(failure)


def test_placeholders_of_folders_are_not_objects(bucket: str, gcs_server: Gateway) -> None:
    with contextlib.closing(quick(bucket)) as store:
        store.create("folder/object", b"")
        blob = store._connected().bucket(store.bucket).blob("folder/")
        blob.upload_from_string(b"", retry=None)
        assert names(store) == ["folder/object"]


def test_a_bucket_without_prefix_and_its_folders(bucket: str) -> None:
    with contextlib.closing(quick(bucket)) as whole, contextlib.closing(quick(f"{bucket}/a/")) as part:
        assert (whole.location, part.location) == (bucket, f"{bucket}/a")
        whole.create("a/b", b"1")
        whole.create("ab", b"2")
        assert names(part) == ["b"]
        assert part.read("b")[0] == b"1"
