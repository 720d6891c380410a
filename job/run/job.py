"""What all workers of an attempt know, where its run is, and the claim by which the chief holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import tensorflow as tf

from job.console import Reporter
from job.data.splits import Splits
from job.domain.identity import Identity
from job.domain.settings import Settings
from job.engine.cluster import Cluster
from job.model import keras_file
from job.run.cadence import CommitSchedule
from job.run.chief import Chief
from job.run.stopwatch import Stopwatch
from job.store.contract import Store
from job.store.location import join, open_store

FIRST_STEP_SECONDS = 60.0  # from the claim to the first step, in the account of who is killed on the way


@dataclass(frozen=True)
class Job:
    """What all workers of an attempt know."""

    settings: Settings
    identity: Identity
    cluster: Cluster
    splits: Splits
    twin: keras.Model  # the network as it is saved and restored
    reporter: Reporter
    stopwatch: Stopwatch


def store_of(settings: Settings, identity: Identity) -> Store:
    """The folder of a run."""
    return open_store(join(settings.output, settings.name or identity.default_name))


def fresh_twin(settings: Settings, identity: Identity, cluster: Cluster) -> keras.Model:
    """The run's plain network with its first weights; TensorFlow is deterministic from here on, if asked."""
    if settings.deterministic or (settings.deterministic is None and not cluster.on_gpu):
        tf.config.experimental.enable_op_determinism()
    return keras_file.plain_twin(
        identity.network, identity.recipe, precision=identity.precision, seed=identity.seed
    )


@contextmanager
def claimed(store: Store, job: Job) -> Iterator[Chief | None]:
    """Claim the run, on the chief; the other workers get None, and commit nothing."""
    if not job.cluster.is_chief:
        _tell_attempt(store, job, 0)
        yield None
        return
    sample = job.splits.train
    spent = job.stopwatch.spent(due=CommitSchedule(job.settings.commit_every).due_seconds(FIRST_STEP_SECONDS))
    with Chief.of(store, job.identity, job.settings, sample=sample, twin=job.twin, spent=spent) as chief:
        _tell_attempt(store, job, chief.record.attempt)
        yield chief


def _tell_attempt(store: Store, job: Job, number: int) -> None:
    attempt = job.cluster.number_from_chief(number)
    job.reporter.note(f"{store.location}: attempt {attempt} on {', '.join(job.cluster.devices)}")
