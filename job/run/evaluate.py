"""Recompute the accuracy of a run's newest commit."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import tensorflow as tf

from job.console import Reporter
from job.data import fetch, sources
from job.data.splits import Splits
from job.domain.errors import IdentityConflict
from job.domain.identity import Identity
from job.domain.settings import Settings
from job.engine import cluster as hardware
from job.engine.device_split import DeviceSplit
from job.engine.training_step import Trainer
from job.model import keras_file
from job.model.batch_normalization import Statistics
from job.run.reader import config_of, read_newest_whole
from job.store.location import open_store


def evaluate(
    location: str, *, data: str | None, replicas: int | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Recompute the accuracy of a run's newest whole commit, on every image of its validation and test sets.

    Twice: by the moving averages that training left, and by batch statistics taken anew.

    Without ``data`` it is the run's own: the sample, or what the run's configuration names and still exists,
    or the official files where `fetch.locate` finds or brings them.

    Raises:
        MissingInput: no run, or no commit, is there.
        InvalidData: no commit can be read.
        IdentityConflict: the data is not the run's.
    """
    cluster = hardware.connect_alone(Settings(replicas=replicas))
    with closing(open_store(location)) as store:
        identity, settings = config_of(store)
        source = _data_of(location, identity, settings.get("data"), data)
        twin = keras_file.plain_twin(identity.network, identity.recipe, precision=identity.precision, seed=0)
        state, commit = read_newest_whole(store, lambda path: keras_file.load(twin, path))
    dataset = sources.load(fetch.locate(source, reporter or Reporter()))
    tf.config.experimental.enable_op_determinism()
    splits = Splits.of(dataset, identity.holdout)
    trainer = Trainer(identity, cluster, train=splits.train)
    trainer.state = state
    evaluated = {"validation": splits.validation} | ({"test": splits.test} if identity.holdout else {})
    on_devices = {name: DeviceSplit(split, cluster.strategy) for name, split in evaluated.items()}
    about = {"run": location, "step": commit.progress.step, "on": splits.validates_on}
    return about | _evaluated_twice(trainer, on_devices)


def _evaluated_twice(trainer: Trainer, splits: dict[str, DeviceSplit]) -> dict[str, Any]:
    """Loss and accuracy on each split, and the same by batch statistics taken anew."""

    def summaries(statistics: Statistics | None = None) -> dict[str, Any]:
        return {
            name: trainer.predict(split, first=0, count=split.count, statistics=statistics).summary(
                split.labels_on_host
            )
            for name, split in splits.items()
        }

    images, statistics = trainer.recalibration.images, trainer.recalibration.statistics()
    return {**summaries(), "recalibrated": {"images": images, **summaries(statistics)}}


def _data_of(location: str, identity: Identity, recorded: str | None, named: str | None) -> str | None:
    """The run's data, its digest compared before anything is fetched; None for where `fetch.locate` looks."""
    source = named or sources.of_run(identity.data_sha256, recorded)
    received = sources.digest_of(source or fetch.find(None)[0])
    if received != identity.data_sha256:
        raise IdentityConflict(
            f"{location} was trained on data of SHA-256 {identity.data_sha256}, not {received}; "
            "name its data with --data"
        )
    return source
