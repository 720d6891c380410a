"""What the chief does for all workers: it holds the run, restores, commits, and publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np

from job.data.records import Split
from job.domain.account import Spent
from job.domain.errors import Diverged, JobError
from job.domain.identity import Identity
from job.domain.record import Record
from job.domain.settings import Settings
from job.model import keras_file
from job.model.keras_file import State
from job.publish.publication import Publication, withdraw
from job.run.committer import Committer
from job.run.owner import HeldRun, claim
from job.run.position import Position
from job.run.reader import read_config, read_record
from job.run.record_log import Change, superseded_error
from job.store.contract import Store

LAST_WORDS_SECONDS = 5.0  # a run that diverged says so in its record, if storage answers within them


class Chief:
    """The one process that writes to a run."""

    def __init__(self, run: HeldRun, *, keep: int, sample: Split, twin: keras.Model) -> None:
        self._run, self._twin = run, twin
        config = read_config(run.store) or {}
        self._publication = Publication(run.store, config, sample, twin, read=read_record)
        self._committer = Committer(run, keep=keep, save=self._save, publish=self._publication.publish)

    @classmethod
    @contextmanager
    def of(
        cls,
        store: Store,
        identity: Identity,
        settings: Settings,
        *,
        sample: Split,
        twin: keras.Model,
        spent: Spent,
    ) -> Iterator[Chief]:
        """Claim the run, and hold it. Raises as :func:`job.run.owner.claim`."""
        store.check()  # in the run's own folder, and in the mounts that it holds
        run = claim(store, identity, settings=asdict(settings), take_over=settings.take_over, spent=spent)
        try:
            chief = cls(run, keep=settings.keep, sample=sample, twin=twin)
            try:
                yield chief
            finally:
                chief._committer.close()
        finally:
            run.close()

    @property
    def record(self) -> Record:
        """The newest revision that is known to be ours."""
        return self._run.record

    @property
    def commits(self) -> Committer:
        """What commits, to ask how it fares."""
        return self._committer

    def check_fence(self) -> None:
        """Raise Superseded if a newer attempt was seen to own the run."""
        if self._run.superseded:
            raise superseded_error(self._run.store.location)

    def restore(self) -> State | None:
        """Read the newest commit that is whole; None for a run without commits. Raises as HeldRun's."""
        restored = self._run.restore(partial(keras_file.load, self._twin))
        return restored[0] if restored else None

    def tidy(self) -> None:
        """Remove what earlier attempts left or published too early, and publish what they did not get to."""
        store = self._run.store
        self._run.remove_leftovers()
        # Of the newest record, whoever wrote it: an attempt that was frozen in between may have withdrawn
        # what a newer one has published since.
        withdraw(store, read_record)
        self._publication.publish(read_record(store))

    def commit(self, state: State, position: Position, change: Change) -> None:
        """Commit in the background. Raises as :meth:`Committer.submit`."""
        self._committer.submit(state, position, change)

    def finish(
        self, position: Position, snapshot: Callable[[], tuple[State, Position]], change: Change
    ) -> None:
        """Commit what is not committed, with a last change. Raises as :meth:`Committer.finish`."""
        self._committer.finish(position, snapshot, change)

    def note_divergence(self, spent: Spent) -> None:
        """Say in the record that the run diverged, if storage lets us: that is true whatever storage says."""
        self._run.store.finish_within(LAST_WORDS_SECONDS)
        self._committer.wait(LAST_WORDS_SECONDS)
        with suppress(JobError):
            self._run.append(lambda record: replace(record.with_spent(spent), state="diverged"))

    def _save(self, state: State, path: Path) -> None:
        if not all(np.isfinite(array).all() for array in state.weights):
            raise Diverged("the weights are not finite, so they are not committed")
        keras_file.save(self._twin, state, path)


def what_is_kept(chief: Chief | None) -> str:
    """The newest commit in words, as far as this worker knows."""
    if chief is None:
        return "worker 0 says what is committed"
    commits = chief.record.commits
    return f"step {commits[0].progress.step} is committed" if commits else "nothing is committed yet"
