"""A hostile network between google-cloud-storage and a real server: every call ends in the right state.

Each test counts the faults that were injected: one that was not proves nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.domain.errors import JobError, MissingInput, PermissionRefused, StorageFailed
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists
from job.store.gcs import GcsStore
from tests.gcs_server import Gateway, GcsServer

LARGE = os.urandom((8 << 20) + 100_000)  # bytes; above 8 MiB the client uploads in chunks
CHUNK = 4 << 20
CHUNKS = 3
LATER = b"a later attempt's record"

Open = Callable[..., GcsStore]


@pytest.fixture
def proxy(gcs_process: GcsServer) -> Iterator[Gateway]:
    with Gateway(gcs_process) as gateway:
        yield gateway


@pytest.fixture
def careless(gcs_process: GcsServer) -> Iterator[Gateway]:
    """A server that stores whatever arrives, without comparing checksums."""
    with Gateway(gcs_process, verify_checksums=False) as gateway:
        yield gateway


@pytest.fixture
def open_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Open]:
    """Opens stores whose requests pass through the proxy, with quick retries."""
    monkeypatch.setenv("JOB_SPOOL", str(tmp_path / "spool"))
    with contextlib.ExitStack() as stack:

        def opened(gateway: Gateway, bucket: str | None = None, **options: Any) -> GcsStore:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", gateway.url)
            quick = {"first_delay_seconds": 0.01, "timeout_seconds": 0.4, "chunk_bytes": CHUNK} | options
            store = GcsStore(f"{bucket or gateway.new_bucket()}/run", **quick)
            return stack.enter_context(contextlib.closing(store))

        yield opened


@pytest.fixture
def store(open_on: Open, proxy: Gateway) -> GcsStore:
    return open_on(proxy)


def scratch_file(store: GcsStore, data: bytes) -> Path:
    path = store.scratch() / "file"
    path.write_bytes(data)
    return path


# Each operation: what must be there before, the call, the kind of its decisive request, the name it leaves.


def create(store: GcsStore) -> None:
    store.create("new", b"content")


def upload_small(store: GcsStore) -> None:
    store.upload("new", scratch_file(store, b"content"))


def upload_large(store: GcsStore) -> None:
    store.upload("new", scratch_file(store, LARGE))


def replace(store: GcsStore) -> None:
    store.replace("record", b"content")


def replace_first(store: GcsStore) -> None:
    store.replace("new", b"content")


def copy(store: GcsStore) -> None:
    store.copy("record", "new")


def delete(store: GcsStore) -> None:
    store.delete("record")


def read(store: GcsStore) -> None:
    assert store.read("record") == b"old"


def download(store: GcsStore) -> None:
    path = store.scratch() / "download"
    store.download("record", path)
    assert path.read_bytes() == b"old"


def exists(store: GcsStore) -> None:
    assert store.exists("record")
    assert not store.exists("absent")


def list_all(store: GcsStore) -> None:
    assert [entry.name for entry in store.list()] == ["record"]


def check(store: GcsStore) -> None:
    store.check()


Operation = tuple[Callable[[GcsStore], None], str, dict[str, bytes]]
OLD = {"record": b"old"}
WRITES: list[Operation] = [
    (create, "upload", OLD | {"new": b"content"}),
    (upload_small, "upload", OLD | {"new": b"content"}),
    (upload_large, "chunk", OLD | {"new": LARGE}),
    (replace, "upload", {"record": b"content"}),
    (replace_first, "upload", OLD | {"new": b"content"}),
    (copy, "rewrite", OLD | {"new": b"old"}),
    (delete, "delete", {}),
]
OTHERS: list[Operation] = [
    (upload_large, "session", OLD | {"new": LARGE}),
    (read, "download", OLD),
    (exists, "look", OLD),
    (download, "look", OLD),
    (download, "download", OLD),
    (list_all, "list", OLD),
    (check, "list", OLD),
    (check, "upload", OLD),
    (check, "look", OLD),
    (check, "delete", OLD),
]
on_every_operation = pytest.mark.parametrize(
    ("operation", "kind", "expected"), WRITES + OTHERS, ids=lambda value: getattr(value, "__name__", None)
)
on_every_write = pytest.mark.parametrize(
    ("operation", "kind", "expected"), WRITES, ids=lambda value: getattr(value, "__name__", None)
)


def contents(store: GcsStore) -> dict[str, bytes]:
    return {entry.name: store.read(entry.name) for entry in store.list()}


def run(store: GcsStore, operation: Callable[[GcsStore], None]) -> dict[str, bytes]:
    """Run the operation beside an old record, and return all that is stored afterwards."""
    operation(store)
    assert {path.name for path in store.scratch().iterdir()} <= {"download", "file"}, "no half a file"
    return contents(store)


# -- bursts, resets, lost answers, stalls --------------------------------------------------------------


@on_every_operation
def test_a_burst_of_refusals(
    store: GcsStore,
    proxy: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
) -> None:
    store.create("record", b"old")
    for status in (429, 503, 429):
        proxy.inject("status", kind, status=status)
    assert run(store, operation) == expected
    assert proxy.injected == {"status": 3}


@on_every_operation
def test_a_reset_in_the_middle_of_a_request(
    store: GcsStore,
    proxy: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
) -> None:
    store.create("record", b"old")
    proxy.inject("reset", kind, times=2)
    assert run(store, operation) == expected
    assert proxy.injected == {"reset": 2}


@on_every_operation
def test_a_reset_after_the_server_has_done_it(
    store: GcsStore,
    proxy: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
) -> None:
    store.create("record", b"old")
    proxy.inject("lose", kind)
    assert run(store, operation) == expected
    assert proxy.injected == {"lose": 1}


@on_every_write
def test_a_stalled_answer(
    store: GcsStore,
    proxy: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "job.store.gcs_call.SLOWEST_BYTES_PER_SECOND", 1e9
    )  # it grants a chunk more time than we have
    store.create("record", b"old")
    proxy.inject("stall", kind)
    start = time.monotonic()
    assert run(store, operation) == expected
    assert 0.3 < time.monotonic() - start < 15.0, "our own time-out, not the client's 60 s"
    assert proxy.injected == {"stall": 1}


def test_a_stalled_read(store: GcsStore, proxy: Gateway) -> None:
    store.create("record", b"old")
    for kind, operation in (("download", read), ("look", download), ("list", list_all)):
        proxy.inject("stall", kind)
        operation(store)
    assert proxy.injected == {"stall": 3}


@pytest.mark.parametrize(
    ("fault", "chunk"), [("status", 1), ("reset", 1), *(("lose", chunk) for chunk in range(CHUNKS))]
)
def test_a_fault_at_each_chunk_repeats_this_chunk_only(
    store: GcsStore, proxy: Gateway, fault: str, chunk: int
) -> None:
    proxy.inject(fault, "chunk", skip=chunk)
    upload_large(store)
    assert store.read("new") == LARGE
    assert proxy.injected == {fault: 1}
    repeated = 0 if fault == "reset" else 1  # a reset request does not reach the proxy's list
    assert proxy.kinds().count("chunk") == CHUNKS + repeated
    assert proxy.kinds().count("session") == 1


def test_a_forgotten_session_begins_the_upload_again(store: GcsStore, proxy: Gateway) -> None:
    proxy.inject("status", "chunk", status=410, skip=1)
    upload_large(store)
    assert store.read("new") == LARGE
    assert proxy.injected == {"status": 1}
    assert proxy.kinds().count("session") == 2


@pytest.mark.parametrize("fault", ["lose", "stall"])
def test_a_create_whose_answer_was_lost_is_ours_whatever_follows(
    store: GcsStore, open_on: Open, proxy: Gateway, fault: str
) -> None:
    """Ours was created, then a later attempt created the next revision: both are there."""
    later = open_on(proxy, f"gs://{store.bucket}")

    def claim() -> None:
        assert later.read("record-1") == b"ours"
        later.create("record-2", LATER)

    proxy.inject(fault, "upload", meanwhile=claim)
    store.create("record-1", b"ours")
    assert contents(store) == {"record-1": b"ours", "record-2": LATER}
    assert proxy.injected == {fault: 1}


def test_a_create_whose_answer_was_lost_is_not_mistaken_for_anothers(
    store: GcsStore, open_on: Open, proxy: Gateway
) -> None:
    """The first try never arrived, and meanwhile another attempt took the name."""
    other = open_on(proxy, f"gs://{store.bucket}")
    proxy.inject("status", "upload", status=503)
    taken = threading.Event()

    def take() -> None:
        while proxy.injected["status"] == 0:
            time.sleep(0.002)
        other.create("new", b"another")
        taken.set()

    slow = open_on(proxy, f"gs://{store.bucket}", first_delay_seconds=1.0)
    thread = threading.Thread(target=take)
    thread.start()
    with pytest.raises(AlreadyExists):
        slow.create("new", b"content")
    thread.join()
    assert taken.is_set()
    assert store.read("new") == b"another"
    assert proxy.injected == {"status": 1}


# -- corruption ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (create, OLD | {"new": b"content"}),
        (upload_small, OLD | {"new": b"content"}),
        (replace, {"record": b"content"}),
        (replace_first, OLD | {"new": b"content"}),
    ],
)
def test_flipped_bits_are_refused_by_the_server(
    store: GcsStore, proxy: Gateway, operation: Callable[[GcsStore], None], expected: dict[str, bytes]
) -> None:
    store.create("record", b"old")
    observed: list[bytes] = []
    with contextlib.closing(GcsStore(store.location)) as observer:
        proxy.inject(
            "flip", "upload", times=2, meanwhile=lambda: observed.extend(contents(observer).values())
        )
        assert run(store, operation) == expected
    assert observed == [b"old", b"old"], "the garbage was never stored"
    assert proxy.injected == {"flip": 2}


@pytest.mark.parametrize(
    ("operation", "kind", "expected"),
    [
        (create, "upload", OLD | {"new": b"content"}),
        (upload_large, "chunk", OLD | {"new": LARGE}),
        (replace, "upload", {"record": b"content"}),
        (replace_first, "upload", OLD | {"new": b"content"}),
    ],
)
def test_flipped_bits_that_a_careless_server_stored_are_replaced(
    open_on: Open,
    careless: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
) -> None:
    store = open_on(careless)
    store.create("record", b"old")
    careless.inject("flip", kind, times=2)
    assert run(store, operation) == expected
    assert careless.injected == {"flip": 2}
    deletions = [request.query for request in careless.requests if request.kind == "delete"]
    assert len(deletions) == (1 if operation is upload_large else 2)
    assert all("ifGenerationMatch" in query for query in deletions), "by name alone, it could be another's"


def test_the_service_is_told_the_checksum_before_the_first_chunk(store: GcsStore, proxy: Gateway) -> None:
    """So that it refuses a corrupt object instead of storing it, which our server does not."""
    upload_large(store)
    (session,) = [request for request in proxy.requests if request.kind == "session"]
    stated = base64.b64decode(json.loads(session.body)["crc32c"])
    assert int.from_bytes(stated, "big") == crc32c(LARGE)


def test_a_corrupt_upload_whose_answer_was_lost_needs_another_name(store: GcsStore, proxy: Gateway) -> None:
    """Nobody can tell it from another attempt's object: it stays, and the caller takes a new nonce."""
    proxy.inject("flip and lose", "chunk", skip=CHUNKS - 1)
    proxy.inject("status", "chunk", status=410)  # the chunk is sent again, but its session is forgotten
    path = scratch_file(store, LARGE)
    with pytest.raises(AlreadyExists):
        store.upload("new", path)
    assert path.exists()
    store.upload("new-2", path)
    assert store.read("new-2") == LARGE
    assert proxy.injected == {"flip and lose": 1, "status": 1}


def test_a_corrupt_upload_whose_answer_came_late_is_replaced(store: GcsStore, proxy: Gateway) -> None:
    proxy.inject("flip and lose", "chunk", skip=CHUNKS - 1)
    upload_large(store)
    assert contents(store) == {"new": LARGE}
    assert proxy.injected == {"flip and lose": 1}


def test_a_truncated_download_goes_on_where_it_stopped(open_on: Open, proxy: Gateway) -> None:
    store = open_on(proxy, timeout_seconds=5.0)  # the proxy reads all of it before it answers
    store.upload("large", scratch_file(store, LARGE))
    proxy.inject("truncate", "download", times=3)
    path = store.scratch() / "download"
    store.download("large", path)
    assert path.read_bytes() == LARGE
    assert set(os.listdir(store.scratch())) == {"download", "file"}
    assert proxy.injected == {"truncate": 3}
    ranges = [request.headers.get("range") for request in proxy.requests if request.kind == "download"]
    assert ranges[0] is None
    assert len(ranges) == 4
    assert all(span is not None and int(span[6:].rstrip("-")) > 0 for span in ranges[1:])


def test_a_truncated_read_is_read_again(store: GcsStore, proxy: Gateway) -> None:
    store.create("record", b"0123456789")
    proxy.inject("truncate", "download", times=2)
    assert store.read("record") == b"0123456789"
    assert proxy.injected == {"truncate": 2}


def test_flipped_bits_in_a_download_are_noticed(store: GcsStore, proxy: Gateway) -> None:
    store.upload("large", scratch_file(store, LARGE))
    store.create("record", b"0123456789")
    proxy.inject("flip_answer", "download", times=2)
    path = store.scratch() / "download"
    store.download("large", path)
    assert path.read_bytes() == LARGE
    proxy.inject("flip_answer", "download", times=2)
    assert store.read("record") == b"0123456789"
    assert proxy.injected == {"flip_answer": 4}


@pytest.mark.parametrize("fault", ["truncate", "flip_answer"])
def test_a_download_that_never_comes_through(open_on: Open, proxy: Gateway, fault: str) -> None:
    store = open_on(proxy, deadline_seconds=2.0)
    store.create("record", b"0123456789")
    proxy.inject(fault, "download", times=10**6)
    path = store.scratch() / "download"
    with pytest.raises(StorageFailed, match=r"Could not read record in gs://"):
        store.download("record", path)
    with pytest.raises(StorageFailed):
        store.read("record")
    assert os.listdir(store.scratch()) == [], "half a file is no file"
    assert proxy.injected[fault] >= 4  # two at least of each


# -- the end of patience -------------------------------------------------------------------------------


@on_every_operation
def test_a_service_that_stays_broken(
    open_on: Open,
    proxy: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
) -> None:
    store = open_on(proxy, timeout_seconds=5.0, deadline_seconds=3.0, check_seconds=5.0)
    store.create("record", b"old")
    fault = proxy.inject("status", kind, status=503, times=10**6)
    with pytest.raises(StorageFailed, match="503") as caught:
        operation(store)
    assert caught.value.exit_code == 74
    assert proxy.injected["status"] >= 2, "tried again"
    fault.times = 0
    assert contents(store) == OLD, "nothing happened"
    if operation in (upload_small, upload_large):
        assert (store.scratch() / "file").exists()


@on_every_operation
def test_a_refused_permission_is_final(
    store: GcsStore,
    proxy: Gateway,
    operation: Callable[[GcsStore], None],
    kind: str,
    expected: dict[str, bytes],
) -> None:
    store.create("record", b"old")
    proxy.inject("status", kind, status=403)
    with pytest.raises(PermissionRefused, match=r"roles/storage\.objectUser"):
        operation(store)
    assert contents(store) == OLD
    assert proxy.injected == {"status": 1}


def test_a_bucket_that_is_deleted_meanwhile(store: GcsStore, proxy: Gateway) -> None:
    store.create("record", b"1")
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("upload", lambda: store.create("new", b"")),
        ("upload", lambda: store.replace("record", b"2")),
        ("session", lambda: upload_large(store)),
        ("list", lambda: store.list()),
        ("list", lambda: store.check()),
    ]
    for kind, attempt in attempts:
        proxy.inject("status", kind, status=404)
        with pytest.raises(MissingInput, match="There is no bucket gs://"):
            attempt()
    assert proxy.injected == {"status": len(attempts)}


def test_progress_keeps_a_slow_upload_alive(open_on: Open, proxy: Gateway) -> None:
    """Three chunks of 1 s each pass a deadline of 1.8 s: it counts from the last progress."""
    store = open_on(proxy, deadline_seconds=1.8, timeout_seconds=5.0)
    for _ in range(CHUNKS):
        proxy.inject("slow", "chunk", meanwhile=lambda: time.sleep(1.0))
    start = time.monotonic()
    upload_large(store)
    assert time.monotonic() - start > 3.0
    assert proxy.injected == {"slow": CHUNKS}


def test_finish_within_shortens_a_call_in_progress(store: GcsStore, proxy: Gateway) -> None:
    store.create("record", b"old")
    proxy.inject("status", "download", times=10**6)
    failures: list[JobError] = []

    def wait() -> None:
        try:
            store.read("record")
        except JobError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)  # it would try for 60 s
    thread.start()
    while thread.is_alive() and proxy.injected["status"] < 2:
        time.sleep(0.01)
    start = time.monotonic()
    store.finish_within(0.3)
    thread.join(5)
    assert time.monotonic() - start < 3.0
    assert [failure.exit_code for failure in failures] == [74]
    assert proxy.injected["status"] >= 2
    with pytest.raises(StorageFailed, match="time for storage was used up"):
        store.create("late", b"")


def test_finish_within_ends_an_upload_between_chunks(open_on: Open, proxy: Gateway) -> None:
    store = open_on(proxy, timeout_seconds=2.0)

    def signalled() -> None:
        store.finish_within(0.1)
        time.sleep(0.2)

    proxy.inject("slow", "chunk", meanwhile=signalled)
    path = scratch_file(store, LARGE)
    with pytest.raises(StorageFailed, match="used up"):
        store.upload("new", path)
    assert path.exists()
    assert proxy.injected == {"slow": 1}
    assert proxy.kinds().count("chunk") == 1


def test_a_stalled_service_is_found_by_check(open_on: Open, proxy: Gateway) -> None:
    store = open_on(proxy, check_seconds=0.6)
    store.list("")  # the client and its connection are ready
    proxy.inject("stall", "list", times=10**6)
    start = time.monotonic()
    with pytest.raises(StorageFailed):
        store.check()
    assert time.monotonic() - start < 3.0
    assert proxy.injected["stall"] >= 1
    store.finish_within(0.0)
    for thread in threading.enumerate():
        if thread.name == "storage check":  # else it would try on in the next test's surroundings
            thread.join(10)
