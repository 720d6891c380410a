"""The fence: a run's record as a sequence of revisions, each created once and by one attempt only.

The newest revision is the record. Its owner appends the next one under a name that only one caller can
create; a newer attempt claims the run by appending one with a higher attempt number. So an older attempt,
however long it was frozen, finds its next name taken and stops: **a claim's own revision is never deleted**.
A name that is taken by a revision with our nonce is ours: an earlier answer was lost.

A free name proves less, because revisions other than claims are pruned. An owner never meets such a name,
since only a claim ends its sequence. A claimer can, so it looks whether its revision is the newest
(``job.run.owner``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from job.domain.errors import JobError, Superseded
from job.domain.record import Record
from job.run.names import record_name
from job.run.reader import read_revision
from job.store.contract import AlreadyExists, NotFound, Store

log = logging.getLogger("job")

Change = Callable[[Record], Record]


class RecordLog:
    """The record of a run that this attempt has claimed, and its right to change it."""

    def __init__(self, store: Store, claimed: Record) -> None:
        self.store = store
        self._record = claimed
        self._nonce = claimed.nonce
        self._claim = claimed.revision
        self._garbage: set[str] = set()  # objects that no revision of ours names any more
        self._appending = threading.Lock()
        self._superseded = threading.Event()

    @property
    def record(self) -> Record:
        """The newest revision that is known to be ours."""
        return self._record

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt was seen to own the run."""
        return self._superseded.is_set()

    def append(self, change: Change) -> Record:
        """Make the next revision of the record, changed as said.

        Where the next name is taken by a revision of our own, whose answer was lost, that one is adopted and
        ``change`` is applied to it.

        Raises:
            Superseded: a newer attempt owns the run.
            StorageFailed: the store did not answer; the next call finds out what has become of this one.
        """
        with self._appending:
            while True:
                before = self._record
                after = replace(change(before), revision=before.revision + 1, written=time.time())
                try:
                    self.store.create(record_name(after.revision), after.to_bytes())
                except AlreadyExists:
                    self._advance(self._own(after.revision))
                    continue
                self._advance(after)
                return after

    def check_fence(self) -> None:
        """Raise Superseded if a newer attempt has claimed the run."""
        with self._appending:  # else a revision of ours could come and go between the two questions
            # A revision of our own is here where its answer was lost; the newer attempt's is behind it.
            while self.store.exists(record_name(following := self._record.revision + 1)):
                self._advance(self._own(following))

    def forget(self, names: set[str]) -> None:
        """Delete these objects with the next revision: nothing of ours names them."""
        self._garbage |= names

    def prune(self) -> None:
        """Delete what our own revisions have replaced; what cannot be deleted now is tried again later."""
        for name in sorted(self._garbage):
            try:
                self.store.delete(name)
            except JobError as error:
                log.warning("%s: what is not needed any more stays: %s", self.store.location, error)
                return
            self._garbage.discard(name)

    def _own(self, revision: int) -> Record:
        """The revision that took a name of ours. Raises Superseded if it is another attempt's."""
        try:
            theirs = read_revision(self.store, revision)
        except NotFound:
            self._superseded.set()
            raise superseded_error(self.store.location) from None
        if theirs.nonce != self._nonce:
            self._superseded.set()
            raise superseded_error(self.store.location, f"its attempt {theirs.attempt} began")
        return theirs

    def _advance(self, after: Record) -> None:
        before, self._record = self._record, after
        dropped = {commit.name for commit in before.restorable} - {commit.name for commit in after.restorable}
        # One old revision stays: a listing that takes its time finds it or the new one.
        if before.revision - 1 > self._claim:
            dropped.add(record_name(before.revision - 1))
        self._garbage |= dropped


def superseded_error(location: str, seen: str = "") -> Superseded:
    """The fence's refusal, with what was seen of the record."""
    reason = f" ({seen})" if seen else ""
    return Superseded(
        f"{location}: a newer attempt owns this run{reason}, so this one stops; nothing of its was touched"
    )
