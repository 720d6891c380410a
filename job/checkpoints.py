"""The checkpoint protocol: claim a run, commit, restore, prune. See the README's "What happens when ...".

Everything in a run is immutable and create-only, except one small record. An attempt writes a checkpoint
under a name of its own, then swaps the record to name it; readers trust only what the record names. A
starting attempt increments the attempt number by the same swap, so that the next swap of any older attempt
fails: the fence.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job.config import FORMAT, Identity
from job.errors import (
    IdentityConflict,
    InvalidData,
    JobError,
    MissingInput,
    StorageFailed,
    Superseded,
    UsageError,
)
from job.storage import CONFIG as CONFIG
from job.storage import RECORD as RECORD
from job.storage import AlreadyExists, Conflict, Entry, NotFound, Store, crc32c, disk_errors, open_store

MODEL, RESULT = "model.keras", "result.json"  # of a complete run
STATES = ("running", "interrupted", "diverged", "complete")
CHECKPOINT = re.compile(r"checkpoints/step-\d{10}-a(?P<attempt>\d{4,})-[0-9a-f]+\.keras")
CLAIM_TRIES = 5  # claims that race each other; each loser sees the winner's record
UPLOAD_TRIES = 3  # a name can be taken by an object that was corrupted on its way: each try has a new nonce
FENCE_POLL_SECONDS = 30.0

log = logging.getLogger("job")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a state has come, with the sums of the unfinished epoch, so that it can go on in mid-epoch."""

    step: int = 0  # optimizer steps in all
    epoch: int = 0  # epochs complete, and that many entries of the history
    batch: int = 0  # steps done in the epoch under way
    loss_sum: float = 0.0  # over the epoch's images so far; float64, added in step order
    correct: int = 0
    images: int = 0
    seconds: float = 0.0  # of training calls in this epoch
    timed_images: int = 0  # without the first call of each attempt, which traces and compiles
    timed_seconds: float = 0.0
    total_seconds: float = 0.0  # of training and evaluation since the run began
    loss_scale: tuple[float, int] = (0.0, 0)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A checkpoint that can be restored."""

    name: str
    size: int  # bytes
    crc32c: int
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Record:
    """The run's one mutable object."""

    attempt: int = 0
    nonce: str = ""  # of the attempt: two attempts never write equal records
    revision: int = 0
    state: str = "running"  # one of STATES
    epochs: int = 0  # that the newest attempt was asked for
    commits: tuple[Commit, ...] = ()  # newest first
    history: tuple[dict[str, Any], ...] = ()  # one entry an epoch
    confusion: list[list[int]] | None = None  # of the last validation
    result: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As record.json holds it."""
        return {"format": FORMAT, **asdict(self)}

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Record:
        """Read a record. Raises InvalidData for garbage and for newer formats."""
        values = parse(data, where)
        try:
            commits = tuple(
                Commit(**{**commit, "progress": _progress(commit["progress"])})
                for commit in values.pop("commits")
            )
            return cls(**{**values, "commits": commits, "history": tuple(values["history"])})
        except (KeyError, TypeError) as error:
            raise InvalidData(
                f"{where} is not a run's record: {error}; restore it or choose another --name"
            ) from error


def _progress(values: dict[str, Any]) -> Progress:
    return Progress(**{**values, "loss_scale": tuple(values["loss_scale"])})


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Decode a JSON object and check its format number. Raises InvalidData."""
    try:
        values: dict[str, Any] = json.loads(data)
        version = values.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidData(
            f"{where} must be a JSON object with a format number, but {error!r}; restore it or choose "
            "another --name"
        ) from error
    if version != FORMAT:
        raise InvalidData(
            f"{where} has format {version}, but this version reads format {FORMAT}; use the version that "
            "wrote it"
        )
    return values


class Run:
    """An attempt's hold on a run, from its claim to its last swap."""

    def __init__(
        self,
        store: Store,
        record: Record,
        version: str,
        *,
        keep: int,
        config: dict[str, Any],
        found: Sequence[Entry] = (),
    ) -> None:
        self.store = store
        self.record = record
        self.config = config
        self._version = version
        self._named = {commit.name for commit in record.commits}  # also those that a restore passed over
        self._found = found
        self._keep = keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._in_flight: Future[None] | None = None
        self._closed = threading.Event()
        self._superseded = threading.Event()
        self.on_poll: Callable[[], object] = lambda: None  # called as often as the fence is looked at
        threading.Thread(target=self._poll_fence, name="fence", daemon=True).start()

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt was seen to own the run."""
        return self._superseded.is_set()

    def restore(self, read: Callable[[Path], Any]) -> tuple[Any, Progress] | None:
        """Read the newest commit that is whole, or None for a run without commits.

        Raises:
            Superseded: a newer attempt owns the run.
            InvalidData: commits exist, but none can be read.
        """
        for index, commit in enumerate(self.record.commits):
            try:
                state = self._read_commit(commit, read)
            except (NotFound, InvalidData) as error:
                self._check_fence()  # a newer attempt may have pruned it
                log.warning("%s/%s: %s; trying the commit before it", self.store.location, commit.name, error)
                continue
            self.record = replace(
                self.record,
                commits=self.record.commits[index:],
                history=self.record.history[: commit.progress.epoch],
                confusion=self.record.confusion if index == 0 else None,
            )
            return state, commit.progress
        if self.record.commits:
            raise InvalidData(
                f"{self.store.location}: none of its {len(self.record.commits)} commits can be read "
                "(see the warnings above); nothing was deleted: restore the files or choose another --name"
            )
        return None

    def _staging(self) -> Path:
        return self.store.staging()

    def _read_commit(self, commit: Commit, read: Callable[[Path], Any]) -> Any:
        path = self._staging() / f"restore-{secrets.token_hex(4)}.keras"
        try:
            self.store.download(commit.name, path)
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

    def commit(
        self,
        write: Callable[[Path], None],
        progress: Progress,
        *,
        after: Callable[[], None],
        **changes: Any,
    ) -> None:
        """Commit in the background, once the commit before it is done.

        Where storage failed that one, this one takes its place and is waited for.

        Args:
            write: writes the checkpoint file.
            progress: of the state that is written.
            after: called once the record names the checkpoint.
            changes: other fields of the record.

        Raises:
            JobError: what the commit before it met, but a failure of storage; and that if it lasts.
        """
        failed = self.settle()
        self._in_flight = self._executor.submit(self._commit, write, progress, after, changes)
        if failed:
            self.wait()

    def wait(self) -> None:
        """Wait for the commit in flight, and raise what it met."""
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            future.result()

    @property
    def commit_failed(self) -> bool:
        """Whether storage has failed the commit in flight; to commit again, soon, loses the least."""
        future = self._in_flight
        return future is not None and future.done() and isinstance(future.exception(), StorageFailed)

    def settle(self) -> bool:
        """Wait for the commit in flight, and say whether storage failed it; raise all else that it met."""
        try:
            self.wait()
        except StorageFailed as error:
            log.warning("A commit failed, and what there is now is committed in its place: %s", error)
            return True
        return False

    def _commit(
        self,
        write: Callable[[Path], None],
        progress: Progress,
        after: Callable[[], None],
        changes: dict[str, Any],
    ) -> None:
        commit = self._upload(write, progress)
        kept = (commit, *self.record.commits)[: self._keep]
        self.swap(commits=kept, **changes)
        after()

    def _upload(self, write: Callable[[Path], None], progress: Progress) -> Commit:
        path = self.store.staging() / self._checkpoint_name(progress.step).replace("/", "-")
        try:
            with disk_errors("write", path):
                write(path)
            size, checksum = path.stat().st_size, crc32c(path)
            for _ in range(UPLOAD_TRIES):
                name = self._checkpoint_name(progress.step)
                try:
                    self.store.upload(name, path)
                except AlreadyExists:
                    continue
                return Commit(name=name, size=size, crc32c=checksum, progress=progress)
        finally:
            path.unlink(missing_ok=True)
        raise StorageFailed(
            f"{self.store.location}: a checkpoint arrived damaged {UPLOAD_TRIES} times; check the network"
        )

    def _checkpoint_name(self, step: int) -> str:
        return f"checkpoints/step-{step:010d}-a{self.record.attempt:04d}-{secrets.token_hex(4)}.keras"

    def swap(self, **changes: Any) -> None:
        """Change the record, then delete the checkpoints that this very swap dropped from it.

        Raises:
            Superseded: another attempt has changed it.
        """
        before = self.record
        after = replace(before, revision=before.revision + 1, **changes)
        try:
            self._version = self.store.swap(RECORD, after.to_bytes(), self._version)
        except Conflict as conflict:
            self._superseded.set()
            raise superseded_error(self.store.location, str(conflict)) from conflict
        self.record = after
        named = {commit.name for commit in after.commits}
        dropped, self._named = self._named - named, named
        if dropped:
            self._delete_checkpoints(lambda name: name in dropped)

    def prune_lower_attempts(self) -> None:
        """Delete checkpoints that the record does not name and that attempts below ours have left behind."""
        self._delete_checkpoints(lambda name: name not in self._named and self._is_of_lower_attempt(name))

    def _is_of_lower_attempt(self, name: str) -> bool:
        match = CHECKPOINT.fullmatch(name)
        return match is not None and int(match["attempt"]) < self.record.attempt

    def _delete_checkpoints(self, wanted: Callable[[str], bool]) -> None:
        """Delete what can be deleted; a failure costs space, never the run."""
        try:
            for entry in self.store.list("checkpoints/"):
                if wanted(entry.name):
                    self.store.delete(entry.name, entry.version)
        except JobError as error:
            log.warning("%s: an old checkpoint stays: %s", self.store.location, error)

    def withdraw(self, names: Collection[str]) -> None:
        """Delete what earlier attempts published and is true no more, where it was there before the claim.

        What a newer attempt has published since must survive us if it has fenced us.
        """
        for entry in self._found:
            if entry.name in names:
                self.store.delete(entry.name, entry.version)

    def _poll_fence(self) -> None:
        while not self._closed.wait(FENCE_POLL_SECONDS):
            with suppress(OSError):
                self.on_poll()
            with suppress(JobError, NotFound):
                self._check_fence()

    def _check_fence(self) -> None:
        try:
            record = read_record(self.store)
        except NotFound as error:
            raise MissingInput(
                f"{self.store.location} has no {RECORD}, or no more; it must stay while the run is trained, "
                "and several workers need the same --output"
            ) from error
        if record.nonce != self.record.nonce:
            self._superseded.set()
            raise superseded_error(self.store.location)

    def close(self) -> None:
        """Let the run go. A commit in flight is waited for; what it met was raised, or is by :meth:`wait`."""
        self._closed.set()
        self._executor.shutdown(wait=True)


class Follower(Run):
    """A run that another process owns, or that is finished: it can be read, and nothing more."""

    def __init__(self, store: Store, record: Record | None = None, *, staging: Path | None = None) -> None:
        self._own_staging = staging
        super().__init__(store, record or Record(), "", keep=0, config={})

    def _staging(self) -> Path:
        return self._own_staging or super()._staging()

    def _poll_fence(self) -> None:
        """Only an owner can be superseded."""


def superseded_error(location: str, seen: str = "") -> Superseded:
    """The fence's refusal, with what was seen of the record."""
    reason = f" ({seen.rstrip('.')})" if seen else ""
    return Superseded(
        f"{location}: a newer attempt owns this run{reason}, so this one stops; nothing of its was touched"
    )


@dataclass(frozen=True)
class Claim:
    """What a starting attempt finds before it claims."""

    store: Store
    identity: Identity
    settings: dict[str, Any] = field(default_factory=dict)

    def look(self) -> tuple[Record, str] | None:
        """The record as it stands, and its version; None for a new run. Checks the identity.

        Raises:
            IdentityConflict: the name belongs to another run.
            InvalidData: record or configuration is garbage or of a newer format.
        """
        stored = self._stored_record()  # read first, because it is created last
        config = read_config(self.store)
        if config is None:
            if stored is not None:
                raise InvalidData(
                    f"{self.store.location} has a {RECORD} but no {CONFIG}, which says what run it is; "
                    "restore it or choose another --name"
                )
            return None
        if differences := Identity.from_json(config["identity"]).differences(self.identity):
            raise IdentityConflict(
                f"{self.store.location} exists with another identity ({'; '.join(differences)}); "
                "choose another --name, or leave --name out to get one of its own"
            )
        if stored is None:
            return None
        data, version = stored
        return Record.from_bytes(data, f"{self.store.location}/{RECORD}"), version

    def _stored_record(self) -> tuple[bytes, str] | None:
        try:
            return self.store.read(RECORD)
        except NotFound:
            return None

    def claim(self, *, keep: int) -> Run:
        """Become the run's owner: write its configuration where it is new, increment the attempt number."""
        for _ in range(CLAIM_TRIES):
            found = self.look()
            if found is None:
                self._create_config()
                found = self.look()
            entries = list(self.store.list())
            before, version = found if found else (Record(), None)
            after = replace(
                before,
                attempt=before.attempt + 1,
                nonce=secrets.token_hex(8),
                revision=before.revision + 1,
                state="running",
                epochs=self.settings.get("epochs", 0),
                result=None,
            )
            try:
                version = self.store.swap(RECORD, after.to_bytes(), version)
            except Conflict:
                continue
            config = read_config(self.store) or {}
            return Run(self.store, after, version, keep=keep, config=config, found=entries)
        raise superseded_error(self.store.location)

    def _create_config(self) -> None:
        values = {
            "format": FORMAT,
            "identity": self.identity.to_json(),
            "settings": {**self.settings, "created": time.time()},
        }
        # Another attempt may create it at the same time; look() compares it with ours.
        with suppress(AlreadyExists):
            self.store.create(CONFIG, (json.dumps(values, indent=1) + "\n").encode())


def read_config(store: Store, folder: str = "") -> dict[str, Any] | None:
    """The config.json of the run in a store, or in a folder of it; None where there is no run."""
    name = f"{folder}/{CONFIG}".lstrip("/")
    try:
        data, _ = store.read(name)
    except NotFound:
        return None
    config = parse(data, f"{store.location}/{name}")
    try:
        Identity.from_json(config["identity"])
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise InvalidData(
            f"{store.location}/{name} is not a run's configuration: {error}; restore it or choose another "
            "--name"
        ) from error
    return config


def read_record(store: Store) -> Record:
    """A run's record. Raises NotFound where there is none."""
    return Record.from_bytes(store.read(RECORD)[0], f"{store.location}/{RECORD}")


def read_identity(location: str) -> Identity:
    """The identity of the run at ``location``. Raises MissingInput where there is none."""
    with closing(open_store(location)) as store:
        store.check(write=False)
        config = read_config(store)
    if config is None:
        raise MissingInput(f"{location} must hold a run, but has no {CONFIG}; name the folder of one run")
    return Identity.from_json(config["identity"])
