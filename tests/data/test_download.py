"""Downloads against a real server on loopback."""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from job.console import Reporter
from job.data import download as http
from job.data.download import Archive, Patience
from job.domain.errors import InvalidData, StorageFailed
from tests.data.server import QUICK, Server, listing

BODY = np.random.Philox(key=1).random_raw(40_000).tobytes()  # 320,000 bytes that do not compress


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(BODY)
    yield server
    server.close()


def download(
    server: Server, path: Path, *, archive: Archive | None = None, patience: Patience = QUICK
) -> None:
    http.download(archive or server.archive(), path, patience=patience, reporter=Reporter())


def test_download_is_whole_and_reported(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert listing(tmp_path) == ["file"]
    assert server.requests == [(None, 200, len(BODY))]
    assert "cifar-10-binary.tar.gz: 0.3 of 0.3 MB" in capsys.readouterr().err
    download(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_a_cut_connection_is_continued_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.steps = [{"cut": 100_000}, {"cut": 50_000}, {}]
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.requests == [
        (None, 200, 100_000),
        ("bytes=100000-", 206, 50_000),
        ("bytes=150000-", 206, len(BODY) - 150_000),
    ]


def test_many_cuts_that_bring_something_are_no_failure(server: Server, tmp_path: Path) -> None:
    server.steps = [{"cut": 40_000}]
    download(server, tmp_path / "file")
    assert len(server.requests) == len(BODY) // 40_000 > QUICK.attempts
    assert (tmp_path / "file").read_bytes() == BODY


def test_an_interrupted_download_is_continued_by_the_next_process(server: Server, tmp_path: Path) -> None:
    class Interrupting(Reporter):
        def transfer(self, label: str, done: int, total: int) -> None:
            if done > 100_000:
                raise KeyboardInterrupt

    server.steps = [{"cut": 150_000}, {}]
    with pytest.raises(KeyboardInterrupt):
        http.download(server.archive(), tmp_path / "file", patience=QUICK, reporter=Interrupting())
    assert listing(tmp_path) == ["file.partial"]
    have = (tmp_path / "file.partial").stat().st_size
    assert 100_000 < have <= 150_000
    download(server, tmp_path / "file")
    assert server.requests[1] == (f"bytes={have}-", 206, len(BODY) - have)
    assert (tmp_path / "file").read_bytes() == BODY
    assert listing(tmp_path) == ["file"]


def test_altered_bytes_are_refused_and_nothing_is_kept(server: Server, tmp_path: Path) -> None:
    archive = server.archive()
    server.body = b"!" + BODY[1:]
    with pytest.raises(InvalidData) as caught:
        download(server, tmp_path / "file", archive=archive)
    received = hashlib.sha256(server.body).hexdigest()
    assert f"{server.url}: SHA-256 must be {archive.sha256}, received {received}" in str(caught.value)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("size", [1000, len(BODY), len(BODY) + 1])
def test_a_spoilt_partial_file_costs_only_time(server: Server, tmp_path: Path, size: int) -> None:
    (tmp_path / "file.partial").write_bytes(bytes(size))
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.requests[-1] == (None, 200, len(BODY))
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize("length", [len(BODY) - 1, len(BODY) + 1])
def test_another_announced_size_is_refused(server: Server, tmp_path: Path, length: int) -> None:
    archive = server.archive()
    server.body = bytes(length)
    with pytest.raises(InvalidData, match=f"must be 320,000 bytes, the server says {length:,}"):
        download(server, tmp_path / "file", archive=archive)
    assert listing(tmp_path) == []


def test_more_bytes_than_expected_are_refused(server: Server, tmp_path: Path) -> None:
    archive = server.archive()
    server.body += b"!"
    server.steps = [{"no_length": True}]
    with pytest.raises(InvalidData, match="must be 320,000 bytes, received more"):
        download(server, tmp_path / "file", archive=archive)
    assert listing(tmp_path) == []


def test_a_truncated_file_fails_and_stays_resumable(server: Server, tmp_path: Path) -> None:
    archive = server.archive()
    server.steps = [{"no_length": True, "cut": 1000, "ignore_range": True}]
    with pytest.raises(StorageFailed, match=r"ended early \(1,000 of 320,000 bytes are here\).*run again"):
        download(server, tmp_path / "file", archive=archive)
    assert len(server.requests) == 1 + QUICK.attempts
    assert listing(tmp_path) == ["file.partial"]


def test_a_server_without_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.steps = [{"cut": 100_000}, {"ignore_range": True}]
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.requests[1] == ("bytes=100000-", 200, len(BODY))


def test_an_answer_with_another_range_is_not_used(server: Server, tmp_path: Path) -> None:
    server.steps = [{"cut": 100_000}, {"shift": 7}, {}]
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert [request[0] for request in server.requests] == [None, "bytes=100000-", "bytes=100000-"]


def test_a_stalled_connection_is_left(server: Server, tmp_path: Path) -> None:
    server.steps = [{"cut": 100_000, "stall": True}, {}]
    download(server, tmp_path / "file", patience=Patience(timeout=0.5, attempts=100, pause=0.01))
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_busy_server_is_asked_again(
    server: Server, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.steps = [{"status": status}, {"status": status}, {}]
    download(server, tmp_path / "file")
    assert [request[1] for request in server.requests] == [status, status, 200]
    assert capsys.readouterr().err.count(f": {status} ") == 2


def test_a_server_that_stays_busy_fails_after_all_attempts(server: Server, tmp_path: Path) -> None:
    server.steps = [{"status": 503}]
    with pytest.raises(StorageFailed, match="503 Server Error"):
        download(server, tmp_path / "file")
    assert len(server.requests) == QUICK.attempts


def test_a_refusal_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.steps = [{"status": 404}]
    with pytest.raises(StorageFailed, match="404 Client Error"):
        download(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_the_deadline_ends_all(server: Server, tmp_path: Path) -> None:
    server.steps = [{"status": 503}]
    started = time.monotonic()
    patience = Patience(timeout=5.0, attempts=10**6, pause=0.01, deadline=0.5)
    with pytest.raises(StorageFailed, match="503 Server Error"):
        download(server, tmp_path / "file", patience=patience)
    assert time.monotonic() - started > 0.2
    server.steps = [{"slowly": 0.05}]
    with pytest.raises(StorageFailed, match="takes too long"):
        download(server, tmp_path / "file", patience=Patience(deadline=0.2))


def test_an_absent_server_fails(tmp_path: Path) -> None:
    server = Server(BODY)
    server.close()
    with pytest.raises(StorageFailed, match="Connection refused"):
        download(server, tmp_path / "file")


def test_a_full_disk_is_no_network_error(server: Server, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            StorageFailed, match=r"cannot write .*file\.partial: File too large. Check the disk"
        ):
            download(server, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(server.requests) == 1
