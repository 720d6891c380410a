"""A split's images on every replica's device, and the share of a batch that each replica takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.records import Split
from job.domain.network import IMAGE_SIZE

WORDS = IMAGE_SIZE * IMAGE_SIZE * 3 // 8  # of an image: 8 pixel values in an int64


class DeviceSplit:
    """A split's images and labels, resident on every replica's device.

    Both are int64. On GPUs TensorFlow gathers no uint8, and it keeps int32 in the host's memory
    (``MTypeFromDType``), from where each step would copy all of it.
    """

    def __init__(self, split: Split, strategy: tf.distribute.Strategy) -> None:
        self.count = len(split.labels)
        self.labels_on_host = split.labels
        words = np.ascontiguousarray(split.images).reshape(self.count, -1).view(np.int64)
        self.words = _on_each_replica(strategy, words)
        self.labels = _on_each_replica(strategy, split.labels.astype(np.int64))


def images_at(words: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """Images [N, 32, 32, 3] in uint8, of ``words`` [images, WORDS] at ``positions`` [N]."""
    pixels = tf.bitcast(tf.gather(words, positions), tf.uint8)
    return tf.reshape(pixels, [-1, IMAGE_SIZE, IMAGE_SIZE, 3])


def _on_each_replica(strategy: tf.distribute.Strategy, array: npt.NDArray[Any]) -> Any:
    if not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy():
        return tf.constant(array)
    devices = strategy.extended.worker_devices

    def place(context: tf.distribute.ReplicaContext) -> tf.Tensor:
        with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
            return tf.identity(array)

    return strategy.experimental_distribute_values_from_function(place)


def my_share(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """First position and number of this replica's images of a batch, both int32.

    Shares are as even as they can be: the first ``batch % replicas`` replicas take one image more, and of a
    batch that is smaller than the number of replicas the last ones take none.
    """
    replica_context = tf.distribute.get_replica_context()
    replicas = replica_context.num_replicas_in_sync
    replica = replica_context.replica_id_in_sync_group
    size, rest = batch // replicas, batch % replicas
    first = replica * size + tf.minimum(replica, rest)
    return first, size + tf.cast(replica < rest, tf.int32)


def counted_share(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """:func:`my_share` with at least one image, and the factor by which these images count.

    oneDNN cannot compute without an image: who has none takes the batch's last one, by the factor 0. The
    factor is None, for 1, where there is one replica.
    """
    first, size = my_share(batch)
    if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
        return first, size, None
    counted = tf.cast(tf.minimum(size, 1), tf.float32)
    return tf.minimum(first, batch - 1), tf.maximum(size, 1), counted
