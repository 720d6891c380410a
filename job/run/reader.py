"""What a store says of a run: its configuration, its record, its checkpoints. Nothing of it is changed."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from job.domain.errors import InvalidData, MissingInput, StorageFailed, UsageError
from job.domain.identity import FORMAT, Identity
from job.domain.record import Commit, Record, parse
from job.run.names import CONFIG, RECORD, record_name
from job.store.checksum import crc32c
from job.store.contract import NotFound, Store
from job.store.local import LocalStore, visible_files
from job.store.location import join, open_store

READ_TRIES = 100  # of a record that is replaced while it is read

log = logging.getLogger("job")
State = TypeVar("State")


def read_revision(store: Store, revision: int) -> Record:
    """One revision of a run's record. Raises NotFound."""
    name = record_name(revision)
    return Record.from_bytes(store.read(name), f"{store.location}/{name}")


def read_record(store: Store) -> Record:
    """The newest revision of a run's record. Raises NotFound where there is none."""
    for _ in range(READ_TRIES):
        revisions = [
            int(match[1]) for entry in store.list("record-") if (match := RECORD.fullmatch(entry.name))
        ]
        if not revisions:
            raise NotFound(f"There is no record in {store.location}.")
        try:
            return read_revision(store, max(revisions))
        except NotFound:
            continue  # its owner has replaced it since it was listed
    raise StorageFailed(f"{store.location}: its record changes faster than it can be read; try again")


def read_config(store: Store, folder: str = "") -> dict[str, Any] | None:
    """The config.json of the run in a store, or in a folder of it; None where there is no run."""
    name = f"{folder}/{CONFIG}".lstrip("/")
    try:
        data = store.read(name)
    except NotFound:
        return None
    config = parse(data, f"{store.location}/{name}", FORMAT)
    try:
        Identity.from_json(config["identity"])
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise InvalidData(
            f"{store.location}/{name} is not a run's configuration: {error}; restore it or choose another "
            "--name"
        ) from error
    return config


def config_of(store: Store) -> tuple[Identity, dict[str, Any]]:
    """The identity and the settings of the run in a store. Raises MissingInput where there is none."""
    config = read_config(store)
    if config is None:
        raise MissingInput(
            f"{store.location} must hold a run, but has no {CONFIG}; name the folder of one run"
        )
    return Identity.from_json(config["identity"]), config.get("settings", {})


def read_identity(location: str) -> Identity:
    """The identity of the run at ``location``. Raises MissingInput where there is none."""
    with closing(open_store(location)) as store:
        store.check(write=False)
        return config_of(store)[0]


def find_runs(location: str) -> tuple[list[str], list[OSError]]:
    """Find the runs at or below ``location``, of a folder also where links lead.

    Returns:
        Their locations, sorted, ``location`` itself first if it is one: wherever a record is, or a
        configuration, whose record may be lost. And for each folder below that cannot be read, which may
        hide more of them, the error.
    """
    unreadable: list[OSError] = []
    with closing(open_store(location)) as store:
        if isinstance(store, LocalStore):
            paths = visible_files(store.root, unreadable.append, follow_links=True)
            names = [path.relative_to(store.root).as_posix() for path in paths]
        else:
            store.check(write=False)  # within seconds, where listing would try for a minute
            names = [entry.name for entry in store.list()]
    parts = [name.rpartition("/") for name in names]
    found = {folder for folder, _, name in parts if name == CONFIG or RECORD.fullmatch(name)}
    return [join(location, folder) for folder in sorted(found)], unreadable


def read_commit(store: Store, commit: Commit, read: Callable[[Path], State]) -> State:
    """Restore one checkpoint. Raises NotFound, or InvalidData where it is not what was committed."""
    path = store.scratch() / f"restore-{secrets.token_hex(4)}.keras"
    try:
        store.download(commit.name, path)
        size, checksum = path.stat().st_size, crc32c(path)
        if (size, checksum) != (commit.size, commit.crc32c):
            raise InvalidData(
                f"the checkpoint must have {commit.size} bytes and crc32c {commit.crc32c:08x}, "
                f"but has {size} and {checksum:08x}"
            )
        try:
            return read(path)
        except (OSError, ValueError) as error:
            raise InvalidData(f"the checkpoint cannot be read: {error}") from error
    finally:
        path.unlink(missing_ok=True)


def read_newest_commit(
    store: Store, record: Record, read: Callable[[Path], State]
) -> tuple[State, Commit] | None:
    """Restore the newest commit of a record that is whole; None where it has none.

    Raises:
        NotFound: a commit is gone, and the record is no longer the newest: its owner has pruned it.
        InvalidData: there are commits, but none can be read.
    """
    for commit in record.restorable:
        try:
            return read_commit(store, commit, read), commit
        except (NotFound, InvalidData) as error:
            if isinstance(error, NotFound) and read_record(store).revision != record.revision:
                raise
            log.warning("%s/%s: %s; trying the commit before it", store.location, commit.name, error)
    if record.restorable:
        raise InvalidData(
            f"{store.location}: none of its {len(record.restorable)} commits can be read (see the warnings "
            "above); nothing was deleted: restore the files, or train under another --name"
        )
    return None


def read_newest_whole(store: Store, load: Callable[[Path], State]) -> tuple[State, Commit]:
    """Restore the newest commit that is whole, also while the run's owner commits and prunes.

    Raises:
        MissingInput: there is no commit.
        InvalidData: there are commits, but none can be read.
        StorageFailed: the owner prunes faster than we can read.
    """
    for _ in range(READ_TRIES):
        try:
            restored = read_newest_commit(store, _record_or_none(store), load)
        except NotFound:
            continue  # a newer commit has replaced it
        if restored is None:
            raise MissingInput(f"{store.location} must hold a run with at least one commit, but holds none")
        return restored
    raise StorageFailed(f"{store.location}: its commits change faster than they can be read; try again")


def _record_or_none(store: Store) -> Record:
    """The newest revision, or a record without commits where there is none."""
    try:
        return read_record(store)
    except NotFound:
        return Record()
