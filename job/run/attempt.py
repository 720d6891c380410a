"""The story of an attempt: meet, agree, claim the run, restore, train epochs and commit, evaluate, finish."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from job.console import Reporter
from job.data.ahead import Read
from job.data.splits import Splits
from job.domain.errors import Diverged, Interrupted, StorageFailed
from job.domain.record import Finished, Record
from job.domain.settings import Settings, check_batch
from job.engine import cluster as hardware
from job.engine.rendezvous import WorkerGroup
from job.engine.training_step import Trainer
from job.model import keras_file
from job.model.keras_file import State
from job.run import agreement
from job.run.cadence import CommitSchedule
from job.run.chief import Chief, claimed, what_is_kept
from job.run.job import Job, fresh_twin, store_of
from job.run.loop import NotFinite, TrainingLoop
from job.run.position import Position
from job.run.record_log import Change
from job.run.resolve import already_finished, identity_of
from job.run.result import in_words, result_of
from job.run.signals import Interruption
from job.run.stopwatch import Stopwatch
from job.store.contract import Store
from job.store.location import open_store

RESERVED_SECONDS = 3.5  # of the grace, for all that is done outside the store


def train(settings: Settings, interruption: Interruption, read: Read, reporter: Reporter) -> dict[str, Any]:
    """Train a run to its end, from wherever an earlier attempt left it, on the data that ``read`` returns.

    Returns:
        The content of result.json.

    Raises:
        JobError: with the exit code that says what a cluster should do about it.
    """
    stopwatch = Stopwatch()
    with closing(open_store(settings.output)) as runs:
        runs.check()
        dataset = read()
        identity = identity_of(settings, dataset.sha256, runs, reporter)
    splits = Splits.of(dataset, settings.holdout)
    with closing(store_of(settings, identity)) as store:
        if finished := already_finished(store, identity, settings, splits, reporter):
            return finished
    alone = WorkerGroup.of(settings) is None
    with stopwatch.spending("starting" if alone else "waiting"):
        cluster = hardware.connect(settings)
    check_batch(batch_size=settings.batch_size, images=len(splits.train.labels), replicas=cluster.replicas)
    with agreement.leaving_together(cluster):
        identity = agreement.agreed_identity(identity, settings, cluster)
        hardware.use_determinism(settings.deterministic, cluster)
        twin = fresh_twin(identity)
        job = Job(settings, identity, cluster, splits, twin, reporter, stopwatch)
        with closing(store_of(settings, identity)) as store, claimed(store, job) as chief:
            return Attempt(job, store, chief, interruption).run()


class Attempt:
    """One process's work on a run."""

    def __init__(self, job: Job, store: Store, chief: Chief | None, interruption: Interruption) -> None:
        self._job, self._store, self._chief, self._interruption = job, store, chief, interruption
        settings, identity, cluster = job.settings, job.identity, job.cluster
        self._stopwatch = job.stopwatch
        # Several workers stop together, at the same step: none may leave at once by itself.
        interruption.note_unsaved_work(cluster.workers > 1)
        xla = hardware.resolve_xla(settings.xla, cluster, sync_batch_norm=settings.sync_batch_norm)
        self._trainer = Trainer(identity, cluster, train=job.splits.train, xla=xla)
        self._schedule = CommitSchedule(settings.commit_every)
        self._loop = TrainingLoop(job, self._trainer, commit_steps=self._schedule.steps)

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and finish."""
        try:
            with self._stopwatch.spending("restoring"):
                self._restore()
            while self._loop.position.progress.epoch < self._job.settings.epochs:
                self._loop.train_epoch(after_each=self._after_training_call)
                self._loop.validate(after_each=self._stop_if_asked)
                self._commit_if_due(epoch_ended=True)
                self._stop_if_asked()
            return self._finish()
        except (NotFinite, Diverged) as error:  # a loss is not finite, or weights that were to be committed
            if self._chief:
                self._chief.note_divergence(self._stopwatch.spent(ended=True))
            kept = what_is_kept(self._chief)
            raise Diverged(f"{error}; {kept}; try a smaller --learning-rate") from None

    def _restore(self) -> None:
        """Continue from the newest whole commit, or start from fresh weights."""
        fresh = keras_file.state_of(self._job.twin)
        restored = self._chief.restore() if self._chief else None
        # All restore what the chief restored: it may have passed over a damaged commit.
        chiefs = self._job.cluster.from_chief(self._chief.record.to_bytes() if self._chief else b"")
        record = Record.from_bytes(chiefs, self._store.location)
        if self._chief:
            self._chief.tidy()
        else:
            load = partial(keras_file.load, self._job.twin)
            restored = agreement.restored(self._store, record, self._job.cluster, load)
        if restored is not None:
            self._loop.position = Position.of(record)
            progress = self._loop.position.progress
            restored = replace(restored, loss_scale=(progress.loss_scale, progress.finite_steps))
            self._job.reporter.note(f"continuing from step {progress.step}")
        self._trainer.state = restored or fresh
        self._schedule.committed(self._loop.position.progress)

    def _after_training_call(self) -> None:
        self._interruption.note_unsaved_work(True)
        self._commit_if_due()
        self._stop_if_asked()

    def _commit_if_due(self, *, epoch_ended: bool = False) -> None:
        """Commit where it is time to: the chief alone, for all."""
        if self._chief is None:
            return
        progress, committer = self._loop.position.progress, self._chief.committer
        is_last = epoch_ended and progress.epoch == self._job.settings.epochs
        self._schedule.commit_seconds = committer.seconds
        if self._schedule.is_due(progress, busy=committer.busy) or is_last or committer.failed:
            self._schedule.committed(progress)
            self._commit(self._chief)

    def _commit(self, chief: Chief) -> None:
        """Copy the state, commit it in the background, and note when the next commit is due."""
        evaluation = self._loop.position.evaluation_seconds
        spent = self._stopwatch.spent(due=self._schedule.due_seconds(evaluation))
        with self._stopwatch.spending("committing"):
            try:
                chief.committer.submit(*self._snapshot(), lambda record: record.with_spent(spent))
            except StorageFailed:
                if not self._interruption.requested:  # else the signal's own commit is still to come
                    raise

    def _conclude(self, change: Change) -> None:
        """Commit what is not committed, and change the record for the last time: the chief alone."""

        def concluded(record: Record) -> Record:
            return change(record.with_spent(self._stopwatch.spent(ended=True)))

        if self._chief:
            with self._stopwatch.spending("committing"):
                self._chief.committer.finish(self._loop.position, self._snapshot, concluded)

    def _snapshot(self) -> tuple[State, Position]:
        state = self._trainer.state
        return state, self._loop.position.with_loss_scale(*state.loss_scale)

    def _stop_if_asked(self) -> None:
        """Stop where a newer attempt owns the run; commit and stop where any worker was signalled."""
        if self._chief:
            self._chief.check_fence()
        with self._stopwatch.spending("waiting"):
            asked = self._job.cluster.any_worker(self._interruption.requested)
        if not asked:
            return
        seconds_left = self._interruption.seconds_left
        self._store.finish_within(max(seconds_left - RESERVED_SECONDS, seconds_left / 2))
        lost = ""
        try:
            self._conclude(lambda record: replace(record, state="interrupted"))
        except StorageFailed as error:
            if self._chief and not self._chief.committer.has_committed(self._loop.position):
                lost = f", what came after could not be saved ({error})"
        self._wait_for_chief(or_leave=True)
        kept = what_is_kept(self._chief) + lost
        raise Interrupted(f"a signal asked the job to stop; {kept}, run the same command again to continue")

    def _wait_for_chief(self, *, or_leave: bool) -> None:
        """Wait, on all workers, until the chief has written its last revision."""
        with self._stopwatch.spending("waiting"):
            self._job.cluster.wait_for_chief(or_leave=or_leave)

    def _finish(self) -> dict[str, Any]:
        """Evaluate on the test set, and with batch statistics taken anew; mark the run complete."""
        evaluated = self._loop.evaluate_at_end(after_each=self._stop_if_asked)
        job, position = self._job, self._loop.position
        result = result_of(job.identity, job.cluster, position, job.splits, **evaluated)

        def complete(record: Record) -> Record:
            result["time"] = record.account(position.timing)
            finished = Finished(epochs=position.progress.epoch, result=result, commit=record.commits[0])
            return replace(record, state="complete", finished=finished)

        self._conclude(complete)
        self._wait_for_chief(or_leave=self._chief is not None)  # all is stored
        job.reporter.note(f"{self._store.location}: complete, {in_words(result)}")
        return result
