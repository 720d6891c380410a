"""What `train` would do: nothing is claimed, fetched or written, but a few steps are timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from job.console import Reporter, duration
from job.data import fetch, sources
from job.data.epoch_plan import EpochPlan, steps_per_epoch
from job.data.holdout import check_holdout
from job.data.records import Split
from job.domain.identity import Identity
from job.domain.settings import Settings, check_batch
from job.engine import cluster as hardware
from job.engine.cluster import Cluster
from job.engine.training_step import Trainer
from job.model import keras_file
from job.run.job import fresh_twin
from job.run.owner import find_record, refuse_living_owner
from job.run.resolve import has_finished, identity_of, refuse_untrainable
from job.store.location import join, open_store

TIMED_SECONDS = 2.0  # of steps, after the one that compiles


def plan(settings: Settings, reporter: Reporter) -> Iterator[str]:
    """Yield a line each on the run, its data, precision, devices, steps, and the time that they take.

    Several workers are not started: this one's devices and speed count for each.

    Raises:
        JobError: what `train` would raise before its first step, as far as one process can know.
    """
    source, absent = fetch.find(settings.data)
    train, test = sources.count_images(source)
    with closing(open_store(settings.output)) as runs:
        if settings.output.startswith("gs://") or Path(settings.output).exists():
            runs.check(write=False)
        identity = identity_of(settings, sources.digest_of(source), runs, reporter)
    location = join(settings.output, settings.name or identity.default_name)
    yield f"run        {location} ({_found(location, identity, settings)})"
    there = "would be fetched first: " if absent else ""
    yield f"data       {source} ({there}{train:,} training images, {test:,} test images)"
    yield f"precision  {identity.precision}"
    cluster = hardware.connect_alone(settings)
    of_each = f", in each of {settings.workers} workers" if settings.workers > 1 else ""
    yield f"devices    {', '.join(cluster.devices)}{of_each}"
    if settings.holdout:
        check_holdout(settings.holdout, images=train)
    images = train - settings.holdout
    replicas = cluster.replicas * settings.workers
    check_batch(batch_size=settings.batch_size, images=images, replicas=replicas)
    steps = steps_per_epoch(images, settings.batch_size)
    yield f"steps      {steps:,} an epoch, {steps * settings.epochs:,} in all"
    compiling, seconds = _step_seconds(settings, identity, cluster)
    yield (
        f"time       about {duration(steps * seconds)} for the steps of an epoch, "
        f"{duration(steps * seconds * settings.epochs)} in all, after {duration(compiling)} of compiling "
        f"({settings.batch_size / seconds:.0f} images/s here)"
    )


def _found(location: str, identity: Identity, settings: Settings) -> str:
    with closing(open_store(location)) as store:
        record = find_record(store, identity)
        if record is None:
            return "new"
        if not has_finished(record, settings.epochs):
            refuse_untrainable(store, record, settings.epochs)
            if not settings.take_over:
                refuse_living_owner(store, record)
    return f"{record.state}, epochs done: {len(record.history)}"


def _step_seconds(settings: Settings, identity: Identity, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the first step, which compiles, and of one after it, on images of noise."""
    hardware.use_determinism(settings.deterministic, cluster)
    share = replace(identity, batch_size=identity.batch_size // settings.workers)
    xla = hardware.resolve_xla(settings.xla, cluster, sync_batch_norm=settings.sync_batch_norm)
    noise = np.random.default_rng(0).integers(0, 256, (share.batch_size, 32, 32, 3), np.uint8)
    labels = np.arange(share.batch_size, dtype=np.int32) % 10
    trainer = Trainer(share, cluster, train=Split(noise, labels), xla=xla)
    trainer.state = keras_file.state_of(fresh_twin(identity))
    recipe = identity.recipe
    step = EpochPlan.draw(
        images=share.batch_size, seed=0, epoch=0, crop_padding=recipe.crop_padding, flip=recipe.flip
    ).batches(first=0, count=1, batch_size=share.batch_size)

    def timed() -> float:
        started = time.perf_counter()
        trainer.train_steps(step, np.array([recipe.learning_rate], np.float32))
        return time.perf_counter() - started

    compiling, times = timed(), [timed()]
    while sum(times) < TIMED_SECONDS:
        times.append(timed())
    return compiling, float(np.median(times))
