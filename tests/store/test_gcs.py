"""What the store in a bucket promises beyond the contract: what is wrong is found, and said, at the start."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError

from job.domain.errors import JobError, StorageFailed
from job.store.gcs import GcsStore
from tests.gcs_server import Gateway
from tests.store.conftest import names

Quick = Callable[..., GcsStore]


@pytest.fixture
def bucket(gcs_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("JOB_SPOOL", str(tmp_path))
    return gcs_bucket


@pytest.fixture
def quick() -> Iterator[Quick]:
    """Opens stores of little patience."""
    with contextlib.ExitStack() as stack:

        def opened(location: str, **options: Any) -> GcsStore:
            usual = {"first_delay_seconds": 0.02, "check_seconds": 5.0, "deadline_seconds": 0.6} | options
            return stack.enter_context(contextlib.closing(GcsStore(location, **usual)))

        yield opened


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    monkeypatch.setattr(logging.getLogger("job"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "job"]


def failure_of(attempt: Callable[[], object]) -> JobError:
    with pytest.raises(JobError) as caught:
        attempt()
    return caught.value


@pytest.mark.usefixtures("bucket")
def test_an_absent_bucket(tmp_path: Path, quick: Quick) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = quick("gs://bucket-that-nobody-has/x")
    attempts: list[Callable[[], object]] = [
        store.check,
        store.list,
        lambda: store.create("a", b""),
        lambda: store.replace("a", b""),
        lambda: store.upload("a", tmp_path / "file"),
    ]
    for attempt in attempts:
        failure = failure_of(attempt)
        assert failure.exit_code == 66
        assert "no bucket gs://bucket-that-nobody-has." in str(failure)
        assert "gcloud storage buckets create gs://bucket-that-nobody-has" in str(failure)


# -- check does what training does ---------------------------------------------------------------------


def test_check_makes_each_request_once(bucket: str, gcs_server: Gateway, quick: Quick) -> None:
    store = quick(bucket)
    before = len(gcs_server.requests)
    store.check(write=False)
    assert gcs_server.kinds()[before:] == ["list"], "reading needs no permission to write"
    store.check()
    acts = ["list", "upload", "upload", "look", "upload", "delete"]
    assert gcs_server.kinds()[before + 1 :] == acts
    seen = gcs_server.requests[before:]
    assert not any(request.path.endswith(f"/b/{store.bucket}") for request in seen), "no storage.buckets.get"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("kind", "skip", "act", "advice"),
    [
        ("list", 0, "list", "objectViewer"),
        ("upload", 0, "create", "objectUser"),
        ("look", 0, "look for", "objectUser"),
        ("upload", 2, "replace", "retention policy"),
        ("delete", 0, "delete", "retention policy"),
    ],
)
def test_check_names_the_act_that_is_forbidden(
    bucket: str,
    gcs_server: Gateway,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    kind: str,
    skip: int,
    act: str,
    advice: str,
) -> None:
    monkeypatch.setattr(AnonymousCredentials, "refresh", lambda *_: None)
    store = quick(f"{bucket}/x")
    requests = 3 if status == 401 else 1  # the client renews its token twice
    before = gcs_server.injected["status"]
    gcs_server.inject("status", kind, status=status, times=requests, skip=skip)
    failure = failure_of(store.check)
    assert failure.exit_code == 77
    assert str(failure).startswith(f"Not allowed to {act} ")
    assert f"Grant roles/storage.objectUser on gs://{store.bucket}" in str(failure)
    assert advice in str(failure)
    assert gcs_server.injected["status"] == before + requests, "not tried again"
    store.check()


def test_check_finds_a_service_that_ignores_preconditions(
    bucket: str, gcs_server: Gateway, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some emulators and gateways do: two attempts would both believe to own a run."""
    forward = gcs_server.forward

    def careless(request: Any) -> Any:
        request.target = request.target.replace("ifGenerationMatch=0", "")
        return forward(request)

    monkeypatch.setattr(gcs_server, "forward", careless)
    failure = failure_of(quick(bucket).check)
    assert failure.exit_code == 74
    assert "gave one name to two objects" in str(failure)


def test_a_bucket_whose_requests_are_paid_by_who_makes_them(
    bucket: str, gcs_server: Gateway, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(
        {"error": {"message": "Bucket is a requester pays bucket but no user project provided."}}
    )
    gcs_server.inject("status", "list", status=400, body=body.encode())
    failure = failure_of(quick(bucket).check)
    assert failure.exit_code == 77
    assert "JOB_GCS_PROJECT" in str(failure)
    monkeypatch.setenv("JOB_GCS_PROJECT", "who-pays")
    store = quick(bucket)
    before = len(gcs_server.requests)
    store.check()
    store.create("a", b"1")
    store.copy("a", "b")
    assert store.read("b") == b"1"
    assert {request.query.get("userProject") for request in gcs_server.requests[before:]} == {"who-pays"}


# -- what may heal -------------------------------------------------------------------------------------


def test_what_may_heal_is_waited_for_and_said_once(
    bucket: str, gcs_server: Gateway, quick: Quick, messages: Callable[[], list[str]]
) -> None:
    store = quick(bucket, deadline_seconds=30.0)
    before = gcs_server.injected.total()
    for status in (429, 500, 502, 503, 504, 408):
        gcs_server.inject("status", "list", status=status)
    gcs_server.inject("reset", "list", times=3)
    store.check()
    assert gcs_server.injected.total() == before + 9
    (message,) = messages()
    assert message.startswith(f"Could not list {bucket} yet: 429 ")
    assert "Trying again for up to 30 s." in message
    store.check()
    assert len(messages()) == 1


def test_a_call_that_is_soon_repaired_says_nothing(
    bucket: str, gcs_server: Gateway, quick: Quick, messages: Callable[[], list[str]]
) -> None:
    gcs_server.inject("status", "upload", status=503)
    quick(bucket).create("a", b"1")
    assert messages() == []


def test_an_unreachable_service(monkeypatch: pytest.MonkeyPatch, quick: Quick) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # refuses connections: nobody listens
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        store = quick("gs://bucket/x")
        for attempt in (store.check, lambda: store.read("a"), lambda: store.create("a", b"")):
            failure = failure_of(attempt)
            assert failure.exit_code == 74
            assert "Connection refused" in str(failure)


def test_a_service_that_never_answers(monkeypatch: pytest.MonkeyPatch, quick: Quick) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = quick("gs://bucket/x", timeout_seconds=0.3, check_seconds=1.0)
        assert failure_of(store.check).exit_code == 74
        assert failure_of(lambda: store.read("a")).exit_code == 74
        join_check()


def join_check() -> None:
    for thread in threading.enumerate():
        if thread.name == "storage check":
            thread.join(10)


def test_check_does_not_wait_for_a_hanging_name_service(
    bucket: str, monkeypatch: pytest.MonkeyPatch, quick: Quick
) -> None:
    real, released = socket.getaddrinfo, threading.Event()

    def hang(*arguments: Any, **options: Any) -> Any:
        released.wait(30)
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    failure = failure_of(quick(bucket, check_seconds=0.5).check)
    assert time.monotonic() - start < 20.0
    released.set()
    join_check()
    assert failure.exit_code == 74
    assert "did not answer within 0.5 s" in str(failure)


def test_check_does_not_wait_for_a_hanging_metadata_server(
    no_emulator: str, monkeypatch: pytest.MonkeyPatch, quick: Quick
) -> None:
    released = threading.Event()

    def hang(scopes: list[str]) -> None:
        released.wait(30)
        raise DefaultCredentialsError("gone")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(google.auth, "default", hang)
    start, store = time.monotonic(), quick(no_emulator, check_seconds=0.5)
    failure = failure_of(store.check)
    store.close()  # as every caller does before the failure is told
    assert time.monotonic() - start < 20.0
    released.set()
    join_check()
    assert failure.exit_code == 74
    assert "metadata server" in str(failure)


# -- credentials ---------------------------------------------------------------------------------------


@pytest.fixture
def no_emulator(bucket: str, gcs_server: Gateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same server, reached as the real service is: with credentials."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", gcs_server.url)
    return bucket


def credentials_after(refusals: int) -> Callable[..., tuple[AnonymousCredentials, None]]:
    left = [refusals]

    def default(scopes: list[str]) -> tuple[AnonymousCredentials, None]:
        assert scopes == ["https://www.googleapis.com/auth/devstorage.read_write"]
        if left[0] > 0:
            left[0] -= 1
            raise DefaultCredentialsError("no metadata server yet")  # type: ignore[no-untyped-call]
        return AnonymousCredentials(), None  # type: ignore[no-untyped-call]

    return default


def test_in_a_pod_a_late_metadata_server_is_waited_for(
    no_emulator: str, monkeypatch: pytest.MonkeyPatch, quick: Quick, messages: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(google.auth, "default", credentials_after(refusals=3))
    store = quick(no_emulator, deadline_seconds=30.0)
    store.check()
    store.create("a", b"1")
    assert store.read("a") == b"1"
    assert ["no metadata server yet" in message for message in messages()] == [True]


def test_in_a_pod_the_metadata_server_may_still_come(
    no_emulator: str, monkeypatch: pytest.MonkeyPatch, quick: Quick
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(google.auth, "default", credentials_after(refusals=10**6))
    failure = failure_of(quick(no_emulator).check)
    assert failure.exit_code == 74, "a Job tries again: it may be the metadata server's fault"
    assert "no metadata server yet" in str(failure)
    assert "Workload Identity" in str(failure)


def test_no_credentials_at_all(no_emulator: str, monkeypatch: pytest.MonkeyPatch, quick: Quick) -> None:
    refusing = credentials_after(refusals=1)
    monkeypatch.setattr(google.auth, "default", refusing)
    failure = failure_of(quick(no_emulator, deadline_seconds=30.0).check)
    assert failure.exit_code == 77, "said at once, not tried again: the second try would succeed"
    assert "gcloud auth application-default login" in str(failure)
    assert "network" not in str(failure)


@pytest.mark.parametrize("fault", ["absent", "a folder", "not JSON", "unreadable"])
def test_credentials_that_cannot_be_used(
    no_emulator: str, monkeypatch: pytest.MonkeyPatch, quick: Quick, tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "key.json"
    if fault == "a folder":
        path.mkdir()
    elif fault == "unreadable":
        path = Path("/proc/self/mem")  # which even root is refused to read at its beginning
    elif fault != "absent":
        path.write_text("this is not JSON")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    failure = failure_of(quick(no_emulator, deadline_seconds=30.0).check)
    assert failure.exit_code == 77
    assert f"GOOGLE_APPLICATION_CREDENTIALS names {path}, which " in str(failure)
    assert (", which is a folder." in str(failure)) == (fault == "a folder")


def test_an_emulator_may_be_named_without_a_scheme(
    bucket: str, gcs_server: Gateway, monkeypatch: pytest.MonkeyPatch, quick: Quick, tmp_path: Path
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url.removeprefix("http://"))
    store = quick(bucket)
    store.check()
    (tmp_path / "large").write_bytes(os.urandom(9 << 20))
    store.upload("large", tmp_path / "large")
    store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "large").read_bytes()


# -- names ---------------------------------------------------------------------------------------------


def test_placeholders_of_folders_are_not_objects(bucket: str, quick: Quick) -> None:
    store = quick(bucket)
    store.create("folder/object", b"")
    store._bucket().blob("folder/").upload_from_string(b"", retry=None)
    assert names(store) == ["folder/object"]


def test_a_bucket_without_prefix_and_its_folders(bucket: str, quick: Quick) -> None:
    whole, part = quick(bucket), quick(f"{bucket}/a/")
    assert (whole.location, part.location) == (bucket, f"{bucket}/a")
    whole.create("a/b", b"1")
    whole.create("ab", b"2")
    assert names(part) == ["b"]
    assert part.read("b") == b"1"


def test_the_disk_s_errors_are_not_the_network_s(bucket: str, quick: Quick, tmp_path: Path) -> None:
    store = quick(bucket)
    store.create("a", b"1")
    failure = failure_of(lambda: store.download("a", tmp_path / "absent" / "file"))
    assert failure.exit_code == 66
    failure = failure_of(lambda: store.upload("b", tmp_path / "absent"))
    assert failure.exit_code == 66
    assert not isinstance(failure, StorageFailed)
