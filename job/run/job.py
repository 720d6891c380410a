"""What all workers of an attempt know, where its run is, and the network that it begins with."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from job.console import Reporter
from job.data.splits import Splits
from job.domain.identity import Identity
from job.domain.settings import Settings
from job.engine.cluster import Cluster
from job.model import keras_file
from job.run.stopwatch import Stopwatch
from job.store.contract import Store
from job.store.location import join, open_store


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


def fresh_twin(identity: Identity) -> keras.Model:
    """The run's plain network with its first weights."""
    return keras_file.plain_twin(
        identity.network, identity.recipe, precision=identity.precision, seed=identity.seed
    )
