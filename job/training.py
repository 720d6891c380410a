"""The story of an attempt: claim the run, build or restore, train epochs, evaluate, commit, finish."""

from __future__ import annotations

import json
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from job import cifar10, portable, storage
from job import cluster as hardware
from job.batches import EpochPlan, steps_per_epoch
from job.checkpoints import (
    Claim,
    Follower,
    Progress,
    Record,
    Run,
    read_config,
    read_record,
    superseded_error,
)
from job.cifar10 import Dataset, Split
from job.cluster import Cluster, Precision
from job.config import Identity, Settings, check_batches
from job.errors import (
    Diverged,
    IdentityConflict,
    Interrupted,
    InvalidData,
    MissingInput,
    ResourceUnavailable,
    StorageFailed,
    UsageError,
)
from job.interruption import Interruption
from job.publication import Publication
from job.reporting import Reporter, duration
from job.storage import NotFound, Store
from job.trainer import DeviceSplit, Predictions, Trainer

CALL_SECONDS = 0.5  # one call lasts about so long: it bounds the reaction to a signal
RESERVED_SECONDS = 3.5  # of the grace, for all that is no call of the store
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
# What no lost peer can cause.
OWN_FAILURES = (
    tf.errors.ResourceExhaustedError,
    tf.errors.InvalidArgumentError,
    tf.errors.UnimplementedError,
)


def train(settings: Settings, interruption: Interruption, reporter: Reporter) -> dict[str, Any]:
    """Train a run to its end, from wherever an earlier attempt left it.

    Returns:
        The content of result.json.

    Raises:
        JobError: with the exit code that says what a cluster should do about it.
    """
    with closing(storage.open_store(settings.output)) as runs:
        runs.check()
        dataset = cifar10.load(cifar10.locate(settings.data))
        identity = _identity_of(settings, dataset, runs, reporter)
    splits = Splits.of(dataset, settings.holdout)
    with _claim(settings, identity) as claim:
        if finished := _already_finished(claim, settings, splits, reporter):
            return finished
    cluster = hardware.connect(settings)
    check_batches(batch_size=settings.batch_size, images=len(splits.train.labels), replicas=cluster.replicas)
    xla = hardware.resolve_xla(settings.xla, cluster, sync_batch_norm=settings.sync_batch_norm)
    with _peers(cluster):
        identity = _agreed(identity, settings, cluster)
        with _claim(settings, identity) as claim, _run_of(claim, settings, cluster) as run:
            reporter.note(
                f"{run.store.location}: attempt {run.record.attempt} on {', '.join(cluster.devices)}"
            )
            # Several workers stop together, at the same step: none may leave at once by itself.
            interruption.unsaved(cluster.workers > 1)
            attempt = Attempt(settings, identity, cluster, splits, run, interruption, reporter, xla=xla)
            return attempt.run()


def _identity_of(settings: Settings, dataset: Dataset, runs: Store, reporter: Reporter) -> Identity:
    """What run these settings name; ``--precision auto`` stays with what the run began in, if it exists.

    Else a job that moves to other hardware would begin anew, under another name.
    """
    fastest = hardware.resolve_precision(settings.precision, filters=settings.network.filters)
    others = [precision for precision in PRECISIONS if precision != fastest]
    for precision in [fastest, *others] if settings.precision == "auto" else [fastest]:
        identity = settings.identity(precision=precision, data_sha256=dataset.sha256)
        name = settings.name or identity.default_name
        config = read_config(runs, name)
        if config and Identity.from_json(config["identity"]) == identity:
            if precision != fastest:
                reporter.note(f"{name} computes in {precision}, as it began; {fastest} would be faster here")
            return identity
    return settings.identity(precision=fastest, data_sha256=dataset.sha256)


@contextmanager
def _claim(settings: Settings, identity: Identity) -> Iterator[Claim]:
    """What this attempt may claim: the identity's run, in its place."""
    location = storage.join(settings.output, settings.name or identity.default_name)
    with closing(storage.open_store(location)) as store:
        yield Claim(store, identity, settings=asdict(settings))


def _agreed(identity: Identity, settings: Settings, cluster: Cluster) -> Identity:
    """The chief's identity, for all workers: they must have been asked for the same run.

    Raises:
        IdentityConflict: some worker was asked for another.
    """
    mine = {**identity.to_json(), "epochs": settings.epochs, "name": settings.name}
    chiefs: dict[str, Any] = json.loads(cluster.from_chief(json.dumps(mine).encode()))
    if settings.precision == "auto":  # the chief's hardware decides for all
        mine["precision"] = chiefs["precision"]
    differences = [
        f"{key}: {mine[key]!r}, not {chiefs.get(key)!r}" for key in mine if mine[key] != chiefs.get(key)
    ]
    if cluster.any_worker(bool(differences)):
        cluster.part()
        who = f"worker {cluster.index}" if differences else "another worker"
        how = "; ".join(differences) or "its log says how they differ"
        raise IdentityConflict(
            f"{who} was asked for another run than worker 0 ({how}); give all workers the same options"
        )
    return replace(identity, precision=chiefs["precision"])


@dataclass(frozen=True)
class Splits:
    """The images by their use."""

    train: Split
    validation: Split
    test: Split
    validates_on: str  # "test set", as in the article, or "hold-out"

    @classmethod
    def of(cls, dataset: Dataset, holdout: int) -> Splits:
        """Set ``holdout`` training images aside; without any, the test set validates."""
        if not holdout:
            return cls(dataset.train, dataset.test, dataset.test, "test set")
        return cls(*cifar10.split_holdout(dataset.train, holdout), dataset.test, "hold-out")


@contextmanager
def _peers(cluster: Cluster) -> Iterator[None]:
    """End together where all end; say that a peer was lost where a collective among several workers fails."""
    try:
        yield
        cluster.part()
    except (Interrupted, Diverged):
        cluster.part()
        raise
    except tf.errors.OpError as error:
        if cluster.workers == 1 or isinstance(error, OWN_FAILURES):
            raise
        raise ResourceUnavailable(
            f"worker {cluster.index} lost a peer: {error.message[:200]}; the last commit is intact, "
            "start all workers again to continue"
        ) from error


@contextmanager
def _run_of(claim: Claim, settings: Settings, cluster: Cluster) -> Iterator[Run]:
    """The run, claimed by the chief and followed by the other workers."""
    if not cluster.is_chief:
        yield Follower(claim.store, Record.from_bytes(cluster.from_chief(b""), claim.store.location))
        return
    lock = storage.acquire_host_lock(claim.store.location, take_over=settings.take_over)
    try:
        run = claim.claim(keep=settings.keep)
        run.on_poll = lock.acquire  # after a take-over it is free once the old owner has ended
        try:
            cluster.from_chief(run.record.to_bytes())
            yield run
        finally:
            run.close()
    finally:
        lock.release()


def _already_finished(
    claim: Claim, settings: Settings, splits: Splits, reporter: Reporter
) -> dict[str, Any] | None:
    """The result of a run that is complete at least as far as asked; its readable files are mended."""
    found = claim.look()
    if found is None:
        return None
    record, _ = found
    done = len(record.history)
    if record.state != "complete" or record.result is None or done < settings.epochs:
        if done > settings.epochs:
            raise UsageError(
                f"--epochs must not be below the {done} epochs that {claim.store.location} has trained, "
                f"not {settings.epochs}; example: --epochs {done}"
            )
        return None
    identity = claim.identity
    twin = portable.plain_twin(identity.network, identity.recipe, precision=identity.precision, seed=0)
    Publication(claim.store, read_config(claim.store) or {}, splits.train, twin).publish(record)
    reporter.note(f"{claim.store.location}: already complete after {done} epochs; nothing to do")
    return record.result


class Attempt:
    """One process's work on a claimed run."""

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        cluster: Cluster,
        splits: Splits,
        run: Run,
        interruption: Interruption,
        reporter: Reporter,
        *,
        xla: bool,
    ) -> None:
        self._settings, self._identity, self._cluster, self._splits = settings, identity, cluster, splits
        self._run, self._interruption, self._reporter = run, interruption, reporter
        deterministic = settings.deterministic
        if deterministic is None:
            deterministic = not cluster.on_gpu  # where it costs speed
        if deterministic:
            tf.config.experimental.enable_op_determinism()
        self._twin = portable.plain_twin(
            identity.network, identity.recipe, precision=identity.precision, seed=identity.seed
        )
        self._publication = Publication(run.store, run.config, splits.train, self._twin)
        self._trainer = Trainer(identity, cluster, train=splits.train, xla=xla)
        self._validation = DeviceSplit(splits.validation, cluster.strategy)
        self._steps_per_epoch = steps_per_epoch(len(splits.train.labels), identity.batch_size)
        self._progress = Progress()
        self._history: list[dict[str, Any]] = []
        self._confusion: list[list[int]] | None = None
        self._committed = (0, time.monotonic())  # step and time of the last commit
        self._step_seconds: float | None = None  # None until the traced call is over

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and finish."""
        self._restore()
        while self._progress.epoch < self._settings.epochs:
            self._train_epoch()
            self._validate()
            self._commit_if_due(epoch_ended=True)
            self._stop_if_asked()
        return self._finish()

    def _restore(self) -> None:
        """Continue from the newest whole commit, or start from fresh weights."""
        chief, before = self._cluster.is_chief, self._run.record.history
        restored = self._run.restore(portable.load) if chief else None
        # The chief names the commit that all restore: it may have passed over a damaged one.
        record = self._cluster.from_chief(self._run.record.to_bytes())
        if not chief:
            restored = self._restore_as(Record.from_bytes(record, self._run.store.location))
        state, self._progress = restored or (portable.state_of(self._twin), Progress())
        self._history, self._confusion = list(self._run.record.history), self._run.record.confusion
        if restored:
            state = replace(state, loss_scale=self._progress.loss_scale)
            self._reporter.note(f"continuing from step {self._progress.step}")
        self._trainer.state = state
        self._committed = (self._progress.step, time.monotonic())
        if chief:
            self._run.withdraw(Publication.names(before[len(self._history) :]))
            self._run.prune_lower_attempts()
            self._publication.publish(self._run.record)

    def _restore_as(self, chiefs: Record) -> tuple[portable.State, Progress] | None:
        """Restore the chief's commit and no other: workers of different steps would train nonsense."""
        self._run.record = replace(chiefs, commits=chiefs.commits[:1])
        try:
            return self._run.restore(portable.load)
        except InvalidData as error:
            raise StorageFailed(
                f"worker {self._cluster.index} cannot read the commit from which worker 0 continues: {error}"
            ) from error

    def _train_epoch(self) -> None:
        """Finish the epoch under way, call by call."""
        recipe = self._identity.recipe
        plan = EpochPlan.draw(
            images=len(self._splits.train.labels),
            seed=self._identity.seed,
            epoch=self._progress.epoch,
            crop_padding=recipe.crop_padding,
            flip=recipe.flip,
        )
        while self._progress.batch < self._steps_per_epoch:
            self._train_call(plan)
            self._commit_if_due(epoch_ended=False)
            self._stop_if_asked()

    def _train_call(self, plan: EpochPlan) -> None:
        progress = self._progress
        count = self._steps_of_next_call()
        batches = plan.batches(first=progress.batch, count=count, batch_size=self._identity.batch_size)
        rates = [self._learning_rate(progress.step + index) for index in range(count)]
        started = time.perf_counter()
        sums = self._trainer.train_steps(batches, np.array(rates, np.float32))
        seconds = time.perf_counter() - started
        self._interruption.unsaved(True)
        self._check_finite(sums.loss, "loss of", progress.step + 1)
        images, traced = batches.order.size, self._step_seconds is None
        self._step_seconds = seconds / images * self._identity.batch_size if not traced else 0.0
        self._progress = replace(
            progress,
            step=progress.step + count,
            batch=progress.batch + count,
            loss_sum=_added_one_by_one(progress.loss_sum, sums.loss),
            correct=progress.correct + int(sums.correct.sum()),
            images=progress.images + images,
            seconds=progress.seconds + seconds,
            timed_images=progress.timed_images + (0 if traced else images),
            timed_seconds=progress.timed_seconds + (0.0 if traced else seconds),
            total_seconds=progress.total_seconds + seconds,
        )
        self._report_progress()

    def _steps_of_next_call(self) -> int:
        """As many as fit in CALL_SECONDS, of one batch size, and not beyond the next commit."""
        batch, epoch_steps = self._progress.batch, self._steps_per_epoch
        whole = len(self._splits.train.labels) // self._identity.batch_size
        most = (whole if batch < whole else epoch_steps) - batch
        cadence = self._settings.commit_every
        if cadence.unit == "steps":
            most = min(most, int(cadence.count) - self._progress.step % int(cadence.count))
        # The first call traces, the second is timed.
        fitting = int(CALL_SECONDS / self._step_seconds) if self._step_seconds else 1
        return self._cluster.number_from_chief(max(1, min(most, fitting)))

    def _learning_rate(self, step: int) -> float:
        return self._identity.recipe.rate(step, self._settings.epochs * self._steps_per_epoch)

    def _check_finite(self, losses: Any, what: str, step: int) -> None:
        """Raise Diverged at the first loss that is not finite; they are of ``step`` and those after it."""
        if np.isfinite(losses).all():
            return
        self._run.wait()
        first = int(np.argmin(np.isfinite(losses)))
        kept = self._kept()
        if self._cluster.is_chief:
            self._run.swap(state="diverged")
        raise Diverged(
            f"the {what} step {step + first} is {losses[first]}, not a finite number; "
            f"{kept}; try a smaller --learning-rate"
        )

    def _kept(self) -> str:
        if not self._cluster.is_chief:
            return "worker 0 says what is committed"
        commits = self._run.record.commits
        return f"step {commits[0].progress.step} is committed" if commits else "nothing is committed yet"

    def _report_progress(self) -> None:
        progress = self._progress
        self._reporter.progress(
            f"epoch {progress.epoch + 1}/{self._settings.epochs}",
            progress.batch,
            self._steps_per_epoch,
            images_per_second=_per_second(progress.timed_images, progress.timed_seconds),
            loss=progress.loss_sum / progress.images,
        )

    def _validate(self) -> None:
        """Evaluate every validation image and close the epoch."""
        started = time.perf_counter()
        predictions = self._predict(self._validation)
        seconds = time.perf_counter() - started
        validation = predictions.summary(self._validation.labels_on_host)
        progress = self._progress
        self._check_finite(np.array([validation["loss"]]), "validation loss after", progress.step)
        self._confusion = predictions.confusion(self._validation.labels_on_host)
        entry = {
            "epoch": progress.epoch,
            "step": progress.step,
            "wall_time": time.time(),
            "train": {
                "loss": progress.loss_sum / progress.images,
                "accuracy": progress.correct / progress.images,
                "learning_rate": self._learning_rate(progress.step - 1),
                "images_per_second": _per_second(progress.timed_images, progress.timed_seconds),
                "seconds": progress.seconds,
            },
            "validation": {**validation, "seconds": seconds},
        }
        self._history.append(entry)
        self._progress = Progress(
            step=progress.step, epoch=progress.epoch + 1, total_seconds=progress.total_seconds + seconds
        )
        epochs_left = self._settings.epochs - self._progress.epoch
        self._reporter.epoch(
            entry, self._settings.epochs, seconds_left=epochs_left * (progress.seconds + seconds)
        )

    def _predict(self, split: DeviceSplit) -> Predictions:
        """Predict in calls of bounded length; a signal in between ends it, and the epoch's steps stay."""
        parts: list[Predictions] = []
        first, count = 0, self._trainer.evaluation_batch
        while first < split.count:
            count = min(count, split.count - first)
            started = time.perf_counter()
            parts.append(self._trainer.predict(split, first=first, count=count))
            seconds = time.perf_counter() - started
            first += count
            if len(parts) > 1 and seconds < CALL_SECONDS / 2:  # the first call traces
                count *= 2
            count = self._cluster.number_from_chief(count)
            self._stop_if_asked()
        return Predictions(
            np.concatenate([part.loss for part in parts]), np.concatenate([part.predicted for part in parts])
        )

    def _commit_if_due(self, *, epoch_ended: bool) -> None:
        cadence = self._settings.commit_every
        step, moment = self._committed
        epoch = self._progress.epoch
        due = {
            "epoch": epoch_ended and epoch % cadence.count == 0,
            "steps": self._progress.step - step >= cadence.count,
            "seconds": time.monotonic() - moment >= cadence.count,
        }
        last = epoch_ended and epoch == self._settings.epochs
        if due[cadence.unit] or last or self._run.commit_failed:
            self._commit()

    def _commit(self, state: str = "running") -> None:
        """Copy the state and commit it in the background: the chief alone, for all."""
        self._committed = (self._progress.step, time.monotonic())
        if not self._cluster.is_chief:
            return
        snapshot = self._trainer.state
        self._progress = replace(self._progress, loss_scale=snapshot.loss_scale)

        def write(path: Path) -> None:
            if not all(np.isfinite(array).all() for array in snapshot.weights):
                raise Diverged(
                    f"the weights of step {self._committed[0]} are not finite; nothing was committed"
                )
            portable.save(self._twin, snapshot, path)

        self._run.commit(
            write,
            self._progress,
            after=lambda: self._publication.publish(self._run.record),
            state=state,
            history=tuple(self._history),
            confusion=self._confusion,
        )

    def _stop_if_asked(self) -> None:
        if self._run.superseded:
            raise superseded_error(self._run.store.location)
        if not self._cluster.any_worker(self._interruption.requested):
            return
        seconds_left = self._interruption.seconds_left
        self._run.store.hurry(max(seconds_left - RESERVED_SECONDS, seconds_left / 2))
        lost = self._save_last_steps()
        self._wait_for_chief()
        raise Interrupted(
            f"a signal asked the job to stop; {self._kept()}{lost}, run the same command again to continue"
        )

    def _all_is_committed(self) -> bool:
        recorded = len(self._run.record.history)
        return self._committed[0] == self._progress.step and recorded == len(self._history)

    def _save_last_steps(self) -> str:
        """Commit what is not committed; storage that fails now costs these steps, not the exit code."""
        try:
            if self._run.settle() or not self._all_is_committed():
                self._commit(state="interrupted")
            self._run.wait()
        except StorageFailed as error:
            return f", what came after could not be saved ({error})"
        if self._cluster.is_chief and self._run.record.state == "running":
            return self._record_interruption()
        return ""

    def _record_interruption(self) -> str:
        """Say in the record what its last commit could not know yet; without it no step is lost."""
        try:
            self._run.swap(state="interrupted")
        except StorageFailed as error:
            return f", but its record still says that it runs ({error})"
        return ""

    def _finish(self) -> dict[str, Any]:
        """Wait for the last commit, evaluate on the test set, and complete the record."""
        if self._run.settle():
            self._commit()
            self._run.wait()
        result = self._result()
        if self._cluster.is_chief:
            self._run.swap(state="complete", result=result)
            self._publication.publish(self._run.record)
        self._wait_for_chief()
        self._reporter.note(
            f"{self._run.store.location}: complete, accuracy {result['validation']['accuracy']:.4f} on the "
            f"{self._splits.validates_on}, {duration(result['seconds'])} of training and evaluation"
        )
        return result

    def _wait_for_chief(self) -> None:
        """Hold the other workers until the chief's swap is done, or the chief is lost."""
        self._cluster.number_from_chief(0)

    def _result(self) -> dict[str, Any]:
        identity, last = self._identity, self._history[-1]
        highest = max(self._history, key=lambda entry: entry["validation"]["accuracy"])
        test, confusion = self._tested()
        timed = [entry["train"] for entry in self._history if entry["train"]["images_per_second"]]
        return {
            **{
                key: value
                for key, value in identity.to_json().items()
                if key not in ("recipe_values", "epochs")
            },
            "layers": identity.network.layers,
            "parameters": self._twin.count_params(),
            "epochs": self._progress.epoch,
            "steps": self._progress.step,
            "train": {key: last["train"][key] for key in ("loss", "accuracy")},
            "validation": {
                **{key: last["validation"][key] for key in ("loss", "accuracy")},
                "on": self._splits.validates_on,
                "highest_accuracy": highest["validation"]["accuracy"],
                "highest_epoch": highest["epoch"] + 1,
            },
            "test": test,
            "confusion": confusion,
            "images_per_second": float(np.median([entry["images_per_second"] for entry in timed] or [0.0])),
            "seconds": self._progress.total_seconds,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "devices": list(self._cluster.devices),
            "replicas": self._cluster.replicas,
            "workers": self._cluster.workers,
            "versions": versions(),
        }

    def _tested(self) -> tuple[dict[str, float] | None, list[list[int]]]:
        """The test set's loss, accuracy and confusion; with a hold-out it is evaluated here, once."""
        if self._splits.validates_on == "test set" and self._confusion is not None:
            return None, self._confusion
        predictions = self._predict(DeviceSplit(self._splits.test, self._cluster.strategy))
        labels = self._splits.test.labels
        summary = predictions.summary(labels) if self._settings.holdout else None
        return summary, predictions.confusion(labels)


def _added_one_by_one(total: float, losses: Any) -> float:
    """Losses of steps added such that no sum depends on how the steps were split into calls.

    Python's ``sum`` would: since 3.12 it carries what rounding lost along, within one call.
    """
    for loss in losses:
        total += float(loss)
    return total


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    packages = ("tensorflow", "keras", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def evaluate(location: str, *, data: str | None, replicas: int | None = None) -> dict[str, Any]:
    """Recompute the accuracy of a run's newest whole commit, on every image of its validation and test sets.

    Raises:
        MissingInput: no run, or no commit, is there.
        InvalidData: no commit can be read.
        IdentityConflict: the data is not the run's.
    """
    cluster = hardware.connect_alone(Settings(replicas=replicas))
    # Its own folder: who evaluates need not be allowed to write where the run is.
    with closing(storage.open_store(location)) as store, tempfile.TemporaryDirectory() as folder:
        identity, record = _identity_and_record(store)
        restored = Follower(store, record, staging=Path(folder)).restore(portable.load)
    assert restored, "a run with commits restores one, or raises"
    state, progress = restored
    dataset = cifar10.load(cifar10.locate(data))
    if dataset.sha256 != identity.data_sha256:
        raise IdentityConflict(
            f"{location} was trained on data of SHA-256 {identity.data_sha256}, not "
            f"{dataset.sha256}; name its data "
            "with --data"
        )
    tf.config.experimental.enable_op_determinism()
    splits = Splits.of(dataset, identity.holdout)
    trainer = Trainer(identity, cluster, train=splits.validation)
    trainer.state = state
    evaluated = {"validation": splits.validation} | ({"test": splits.test} if identity.holdout else {})
    results = {
        name: trainer.predict(DeviceSplit(split, cluster.strategy), first=0, count=len(split.labels)).summary(
            split.labels
        )
        for name, split in evaluated.items()
    }
    return {"run": location, "step": progress.step, "on": splits.validates_on, **results}


def _identity_and_record(store: Store) -> tuple[Identity, Record]:
    try:
        config, record = read_config(store), read_record(store)
    except NotFound:
        config, record = None, Record()
    if config is None or not record.commits:
        raise MissingInput(f"{store.location} must hold a run with at least one commit, but holds none")
    return Identity.from_json(config["identity"]), record
