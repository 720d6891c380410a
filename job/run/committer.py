"""Commit in the background: write a checkpoint, upload it, name it in the record, publish, prune.

At most one commit is in flight. What storage fails to take is made up for by the next commit, which holds
more; only if that fails, too, the attempt ends.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.domain.disk import disk_errors
from job.domain.errors import StorageFailed
from job.domain.record import Commit, Record
from job.run.names import checkpoint_name
from job.run.owner import HeldRun
from job.run.position import Position
from job.run.record_log import Change
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists

UPLOAD_TRIES = 3  # a name can be taken by an object that was corrupted on its way: each try has a new nonce

log = logging.getLogger("job")


class Committer:
    """Commits what an attempt has trained, one commit after the other."""

    def __init__(
        self,
        run: HeldRun,
        *,
        keep: int,
        save: Callable[[Any, Path], None],
        publish: Callable[[Record], None],
    ) -> None:
        """Commit to ``run``.

        Args:
            run: what this attempt owns.
            keep: commits that stay restorable.
            save: writes a state as a checkpoint file.
            publish: is called with each new record.
        """
        self._run, self._keep, self._save, self._publish = run, keep, save, publish
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._in_flight: Future[None] | None = None
        self.seconds = 0.0  # that the last commit took, from its file to what was pruned; 0 before the first

    @property
    def failed(self) -> bool:
        """Whether storage failed the last commit: to commit again, soon, loses the least."""
        future = self._in_flight
        return future is not None and future.done() and isinstance(future.exception(), StorageFailed)

    @property
    def busy(self) -> bool:
        """Whether a commit is in flight: the next one would wait for it."""
        return self._in_flight is not None and not self._in_flight.done()

    def submit(self, state: Any, position: Position, change: Change = lambda record: record) -> None:
        """Commit in the background, once the commit before it is over, and change the record that names it.

        Where storage failed that one, this one is waited for.

        Raises:
            JobError: what the commit before it met, but a failure of storage; and that if it lasts.
        """
        failed = self._wait()
        self._in_flight = self._executor.submit(self._commit, state, position, change)
        if failed:
            self._in_flight.result()

    def finish(
        self, position: Position, snapshot: Callable[[], tuple[Any, Position]], change: Change
    ) -> None:
        """Commit what is not committed yet, change the record, publish it, and wait for all of it.

        Args:
            position: how far training has come.
            snapshot: copies the state, if a checkpoint must be written.
            change: of the record that names it, for example to "complete".

        Raises:
            JobError: what it met.
        """
        if self._wait() or not self.has_committed(position):
            self._commit(*snapshot(), change)
        else:
            self._publish(self._run.append(change))
            self._run.prune()

    def wait(self, seconds: float) -> None:
        """Wait for the commit in flight, so long at most; what it met is raised by the next call."""
        if self._in_flight is not None:
            wait([self._in_flight], timeout=seconds)

    def close(self) -> None:
        """End the thread, once the commit in flight is over."""
        self._executor.shutdown(wait=True)

    def _wait(self) -> bool:
        """Wait for the commit in flight, and say whether storage failed it; raise all else that it met."""
        future, self._in_flight = self._in_flight, None
        try:
            if future is not None:
                future.result()
        except StorageFailed as error:
            log.warning("A commit failed, and what there is now is committed in its place: %s", error)
            return True
        return False

    def has_committed(self, position: Position) -> bool:
        """Whether the newest commit is of this position."""
        commits, reached = self._run.record.commits, position.progress
        newest = commits[0].progress if commits else None
        return newest is not None and (newest.step, newest.epoch) == (reached.step, reached.epoch)

    def _commit(self, state: Any, position: Position, change: Change) -> None:
        started = time.monotonic()
        commit = self._upload(state, position)

        def committed(before: Record) -> Record:
            others = [other for other in before.commits if other.progress.step < commit.progress.step]
            return change(
                replace(
                    before,
                    commits=(commit, *others)[: self._keep],
                    history=position.history,
                    confusion=position.confusion,
                )
            )

        self._publish(self._run.append(committed))
        self._run.prune()
        self.seconds = time.monotonic() - started

    def _upload(self, state: Any, position: Position) -> Commit:
        store, step = self._run.store, position.progress.step
        with disk_errors("write in", "the scratch folder"):
            path = store.scratch() / f"step-{step:010d}-{secrets.token_hex(4)}.keras"
        try:
            with disk_errors("write", path):
                self._save(state, path)
            size, checksum = path.stat().st_size, crc32c(path)
            for _ in range(UPLOAD_TRIES):
                name = checkpoint_name(step, self._run.record.attempt)
                try:
                    store.upload(name, path)
                except AlreadyExists:  # by what arrived damaged
                    self._run.forget({name})
                    continue
                except StorageFailed:  # it may have arrived, its answer lost
                    self._run.forget({name})
                    raise
                return Commit(
                    name=name,
                    size=size,
                    crc32c=checksum,
                    progress=position.progress,
                    timing=position.timing,
                )
        finally:
            path.unlink(missing_ok=True)
        raise StorageFailed(
            f"{store.location}: a checkpoint arrived damaged {UPLOAD_TRIES} times; check the network"
        )
