"""Claim a run, and hold it: see ``job.run.record_log`` for the fence."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from job import __version__
from job.domain.account import Spent
from job.domain.errors import IdentityConflict, InvalidData, JobError, Superseded
from job.domain.identity import FORMAT, Identity
from job.domain.network import CLASSES
from job.domain.record import Commit, Owner, Record
from job.run.names import CHECKPOINT, CONFIG, record_name
from job.run.processes import is_alive, this_process
from job.run.reader import read_config, read_newest_commit, read_record
from job.run.record_log import RecordLog, superseded_error
from job.run.versions import source_revision
from job.store.contract import AlreadyExists, NotFound, Store

OLD_RECORD = "record.json"  # of earlier versions
CLAIM_TRIES = 20  # claims that race each other; each loser sees the winner's record
FENCE_POLL_SECONDS = 30.0

log = logging.getLogger("job")
State = TypeVar("State")


def find_record(store: Store, identity: Identity) -> Record | None:
    """The record of a run as it stands; None for a new run.

    Raises:
        IdentityConflict: the name belongs to another run.
        InvalidData: record or configuration is garbage or of another format.
    """
    record = None
    with suppress(NotFound):
        record = read_record(store)  # read first, because it is created last
    config = read_config(store)
    if record is None and store.exists(OLD_RECORD):
        raise InvalidData(
            f"{store.location} holds a run of an older version ({OLD_RECORD}), which this one cannot "
            "continue; finish it with the version that began it, or choose another --name"
        )
    if config is None:
        if record is not None:
            raise InvalidData(
                f"{store.location} has a record but no {CONFIG}, which says what run it is; restore it or "
                "choose another --name"
            )
        return None
    if differences := Identity.from_json(config["identity"]).differences(identity):
        raise IdentityConflict(
            f"{store.location} exists with another identity ({'; '.join(differences)}); "
            "choose another --name, or leave --name out to get one of its own"
        )
    return record


def claim(
    store: Store,
    identity: Identity,
    *,
    settings: dict[str, Any],
    take_over: bool = False,
    spent: Spent | None = None,
) -> HeldRun:
    """Become the run's owner: write its configuration where it is new, and append a revision of ours.

    It notes ``spent``, the time of this attempt so far.

    Raises:
        Superseded: its owner is a living process of this host, and ``take_over`` is not wanted.
        IdentityConflict, InvalidData: as :func:`find_record`.
    """
    for _ in range(CLAIM_TRIES):
        found = find_record(store, identity)
        if found is None:
            _create_config(store, identity, settings)
        elif not take_over:
            refuse_living_owner(store, found)
        claimed = _claimed(found or Record(), epochs=settings.get("epochs", 0), spent=spent)
        try:
            store.create(record_name(claimed.revision), claimed.to_bytes())
        except AlreadyExists:
            continue
        if not _is_newest(store, claimed):
            continue
        store.begin_attempt(claimed.attempt)
        return HeldRun(store, claimed)
    raise superseded_error(store.location, "others claim it again and again")


def _is_newest(store: Store, claimed: Record) -> bool:
    """Whether a claim that could be created holds the run.

    That its name was free does not prove it: the owner may have made two revisions since we read the record,
    and pruned the first, whose name we then took. A process can be frozen in between, and a network file
    system can list an old state until we change it. The newest revision is never pruned, so we read again.

    Raises:
        Superseded: a newer attempt has claimed the run meanwhile.
    """
    newest = read_record(store)
    if newest.attempt > claimed.attempt:
        raise superseded_error(store.location, f"its attempt {newest.attempt} began")
    return newest.nonce == claimed.nonce


def refuse_living_owner(store: Store, found: Record) -> None:
    """Raise Superseded where a living process of this host trains the run."""
    owner = found.owners[-1] if found.owners else None
    if owner is not None and found.state == "running" and is_alive(owner):
        raise Superseded(
            f"{store.location} is being trained by process {owner.process.split('/')[1]} on this host, "
            f"{owner.host}. Wait for it, end it, or use --take-over: it will then be fenced and "
            "stop by itself."
        )


def _claimed(found: Record, *, epochs: int, spent: Spent | None) -> Record:
    owner = Owner(
        attempt=found.attempt + 1,
        began=time.time(),
        host=socket.gethostname(),
        process=this_process(),
        version=__version__,
        revision=source_revision(),
        spent=spent,
    )
    return replace(
        found,
        attempt=owner.attempt,
        nonce=secrets.token_hex(8),
        revision=found.revision + 1,
        written=owner.began,
        state="running",
        epochs=epochs,
        owners=(*found.owners, owner),
    )


def _create_config(store: Store, identity: Identity, settings: dict[str, Any]) -> None:
    values = {
        "format": FORMAT,
        "identity": identity.to_json(),
        "settings": {**settings, "created": time.time()},
        "classes": CLASSES,  # the names of labels 0 to 9
    }
    # Another attempt may create it at the same time; find_record() compares it with ours.
    with suppress(AlreadyExists):
        store.create(CONFIG, (json.dumps(values, indent=1) + "\n").encode())


def leftovers(store: Store, record: Record, *, below: int) -> set[str]:
    """Checkpoints that no commit of a record names, of attempts below a number: these are over."""
    unnamed = {entry.name for entry in store.list("checkpoints/")} - {
        commit.name for commit in record.restorable
    }
    matches = filter(None, map(CHECKPOINT.fullmatch, unnamed))
    return {match[0] for match in matches if int(match["attempt"]) < below}


def delete_leftovers(store: Store, record: Record) -> None:
    """Delete what the last attempt of a finished run has left, if it was killed after its last revision.

    Nobody claims such a run again. Where an attempt extends it, only what older attempts left is deleted.
    """
    over = record.attempt + (record.state == "complete")
    try:
        for name in leftovers(store, record, below=over):
            store.delete(name)
    except JobError as error:
        log.warning("%s: what is not needed any more stays: %s", store.location, error)


class HeldRun(RecordLog):
    """A run that this attempt owns, until a newer one claims it."""

    def __init__(self, store: Store, claimed: Record) -> None:
        super().__init__(store, claimed)
        self._closed = threading.Event()
        threading.Thread(target=self._poll_fence, name="fence", daemon=True).start()

    def restore(self, read: Callable[[Path], State]) -> tuple[State, Commit] | None:
        """Read the newest commit that is whole, or None for a run without commits.

        What came after it is given up: the record that follows begins there.

        Raises:
            Superseded: a newer attempt owns the run, and may have pruned what this one wanted to read.
            InvalidData: there are commits, but none can be read.
        """
        try:
            restored = read_newest_commit(self.store, self.record, read)
        except (NotFound, InvalidData) as error:
            self.check_fence()
            raise InvalidData(str(error)) from error
        if restored is not None and restored[1] != self.record.restorable[0]:
            self.check_fence()
            self._give_up_after(restored[1])
        return restored

    def _give_up_after(self, commit: Commit) -> None:
        """Continue from an older commit: later ones, and the epochs that they knew, are no more."""
        given_up = self.record.history[commit.progress.epoch :]
        commits = self.record.commits
        kept = commits[commits.index(commit) :] if commit in commits else (commit,)

        def change(record: Record) -> Record:
            finished = record.finished
            if finished is not None and finished.epochs > commit.progress.epoch:
                finished = None
            history = record.history[: commit.progress.epoch]
            return replace(record, commits=kept, history=history, confusion=None, finished=finished)

        self.append(change)
        log.warning("%s: %d epochs are trained again", self.store.location, len(given_up))

    def remove_leftovers(self) -> None:
        """Delete checkpoints that no commit names and that attempts below ours have left behind."""
        try:
            self.forget(leftovers(self.store, self.record, below=self.record.attempt))
        except JobError as error:
            log.warning("%s: %s", self.store.location, error)
            return
        self.prune()

    def _poll_fence(self) -> None:
        while not self._closed.wait(FENCE_POLL_SECONDS):
            # That we are superseded is noted; other trouble is met, and told, by the next commit.
            with suppress(JobError):
                self.check_fence()

    def close(self) -> None:
        """Stop looking at the fence."""
        self._closed.set()
