"""Small networks, small data and logical CPU devices for tests that train in this process."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from job.data.records import Dataset, Split
from job.domain.identity import Identity
from job.domain.network import Network
from job.domain.recipe import RECIPES
from job.domain.settings import Settings
from job.engine.cluster import Cluster
from job.engine.training_step import Trainer
from job.model import keras_file

DEVICES = 7
_bases = itertools.count(1)
TINY = Network(blocks=(1, 1), filters=16)

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * DEVICES
)
tf.config.experimental.enable_op_determinism()


def cluster_of(replicas: int = 1) -> Cluster:
    """Logical CPU devices of this process as a cluster."""
    strategy = _mirrored(replicas) if replicas > 1 else tf.distribute.get_strategy()
    return Cluster(strategy, ("test CPU",) * replicas, on_gpu=False)


def _mirrored(replicas: int) -> tf.distribute.Strategy:
    # Strategies of one process share its collective groups, and would take each other's by their keys.
    keys = type("Mirrored", (tf.distribute.MirroredStrategy,), {"_collective_key_base": 1000 * next(_bases)})
    return keys([f"CPU:{index}" for index in range(replicas)])


def split_of(count: int, *, seed: int = 0) -> Split:
    """Balanced random images whose class shows in their brightness."""
    words = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 10
    images = words.integers(0, 120, (count, 32, 32, 3)) + 13 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


def dataset_of(train: int = 108, test: int = 30) -> Dataset:
    """A data set that no one would mistake for CIFAR-10."""
    return Dataset(split_of(train), split_of(test, seed=1), sha256="5" * 64)


def identity_of(*, recipe: str = "article", precision: Any = "float32", **settings: Any) -> Identity:
    """The identity of a tiny run."""
    values = {"network": TINY, "batch_size": 8, **settings}
    return Settings(recipe=RECIPES[recipe], **values).identity(precision=precision, data_sha256="5" * 64)


def trainer_of(
    identity: Identity | None = None, *, replicas: int = 1, train: Split | None = None, xla: bool = False
) -> Trainer:
    """A trainer with the identity's initial weights."""
    identity = identity or identity_of()
    trainer = Trainer(identity, cluster_of(replicas), train=train or split_of(40), xla=xla)
    twin = keras_file.plain_twin(
        identity.network, identity.recipe, precision=identity.precision, seed=identity.seed
    )
    trainer.state = keras_file.state_of(twin)
    return trainer


def assert_same_state(left: keras_file.State, right: keras_file.State) -> None:
    """Bit for bit."""
    for one, other in zip([*left.weights, *left.optimizer], [*right.weights, *right.optimizer], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert left.loss_scale == right.loss_scale
