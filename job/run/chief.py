"""What the chief does for all workers: it holds the run, restores, commits, and publishes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from job.domain.account import Spent
from job.domain.errors import Diverged, JobError
from job.domain.record import Record
from job.model import keras_file
from job.model.keras_file import State
from job.publish.publication import Publication, withdraw
from job.run.cadence import CommitSchedule
from job.run.committer import Committer
from job.run.job import Job
from job.run.owner import HeldRun, claim
from job.run.reader import read_config, read_record
from job.run.record_log import superseded_error
from job.store.contract import Store

FIRST_STEP_SECONDS = 60.0  # from the claim to the first step, in the account of who is killed on the way
LAST_WORDS_SECONDS = 5.0  # a run that diverged says so in its record, if storage answers within them


@contextmanager
def claimed(store: Store, job: Job) -> Iterator[Chief | None]:
    """Claim the run and hold it, on the chief; the other workers get None, and commit nothing.

    Raises as :func:`job.run.owner.claim`.
    """
    with ExitStack() as stack:
        chief = None
        if job.cluster.is_chief:
            chief = stack.enter_context(_holding(store, job))
        attempt = job.cluster.number_from_chief(chief.record.attempt if chief else 0)
        job.reporter.note(f"{store.location}: attempt {attempt} on {', '.join(job.cluster.devices)}")
        yield chief


@contextmanager
def _holding(store: Store, job: Job) -> Iterator[Chief]:
    settings = job.settings
    spent = job.stopwatch.spent(due=CommitSchedule(settings.commit_every).due_seconds(FIRST_STEP_SECONDS))
    store.check()  # in the run's own folder, and in the mounts that it holds
    run = claim(store, job.identity, settings=asdict(settings), take_over=settings.take_over, spent=spent)
    with closing(run):
        chief = Chief(run, job)
        with closing(chief.committer):
            yield chief


class Chief:
    """The one process that writes to a run."""

    def __init__(self, run: HeldRun, job: Job) -> None:
        self._run, self._twin = run, job.twin
        config, sample = read_config(run.store) or {}, job.splits.train
        self._publication = Publication(run.store, config, sample, job.twin, read=read_record)
        keep, publish = job.settings.keep, self._publication.publish
        self.committer = Committer(run, keep=keep, save=self._save, publish=publish)

    @property
    def record(self) -> Record:
        """The newest revision that is known to be ours."""
        return self._run.record

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

    def note_divergence(self, spent: Spent) -> None:
        """Say in the record that the run diverged, if storage lets us: that is true whatever storage says."""
        self._run.store.finish_within(LAST_WORDS_SECONDS)
        self.committer.wait(LAST_WORDS_SECONDS)
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
