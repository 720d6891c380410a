"""Precise batch normalization: the statistics of every layer taken anew, by the weights as they are.

Training leaves moving averages over its last hundred steps or so, in which the weights moved. Here the
network sees training images once more, in training mode, without augmentation, and nothing of it changes;
each layer's mean and variance are those of all that it saw, not an average in which older batches fade: Wu
and Johnson 2021, Rethinking "Batch" in BatchNorm, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.epoch_plan import EpochPlan, steps_per_epoch
from job.engine.cluster import Cluster
from job.engine.device_split import DeviceSplit, counted_share, images_at
from job.engine.prediction import plain_python
from job.model.batch_normalization import Statistics, counting_images, observing_statistics

Callback = Callable[[], None]

IMAGES = 10_000  # at least so many, in whole batches, or all if there are fewer


class Recalibration:
    """A network, compiled to tell the statistics of its layers over training images."""

    def __init__(self, logits: keras.Model, cluster: Cluster, train: DeviceSplit, batch_size: int) -> None:
        self._logits, self._strategy, self._train = logits, cluster.strategy, train
        self._batch_size = batch_size
        self.images = min(train.count, steps_per_epoch(IMAGES, batch_size) * batch_size)
        self._call = tf.function(self._of_batch, input_signature=[tf.TensorSpec([None], tf.int32)])

    def statistics(self, after_each: Callback = lambda: None) -> Statistics:
        """Mean and biased variance of each layer's inputs, float32 [C], in the training's batches.

        The images are the same for any seed, and batches are synchronized over all replicas: the values do
        not depend on the number of replicas or workers, but for rounding. Costs a forward pass of each image.
        """
        order = EpochPlan.draw(images=self._train.count, seed=0, epoch=0).order[: self.images]

        def observed() -> Iterator[tuple[int, Statistics]]:
            for first in range(0, self.images, self._batch_size):
                positions = order[first : first + self._batch_size]
                found = self._call(tf.constant(positions))
                yield len(positions), tf.nest.map_structure(lambda value: value.numpy(), found)
                after_each()

        return combined(observed())

    def _of_batch(self, positions: tf.Tensor) -> Statistics:
        each = self._strategy.run(self._replica_statistics, args=(self._train.words, positions))
        of_first = partial(_first_of, self._strategy)  # of the replicas, which all have the same
        statistics: Statistics = tf.nest.map_structure(of_first, each)
        return statistics

    @plain_python
    def _replica_statistics(self, words: tf.Tensor, positions: tf.Tensor) -> Statistics:
        first, size, counted = counted_share(tf.shape(positions)[0])
        images = tf.cast(images_at(words, positions[first : first + size]), tf.float32)
        with counting_images(counted), observing_statistics() as observed:
            self._logits(images, training=True)
        return observed


def _first_of(strategy: tf.distribute.Strategy, value: Any) -> tf.Tensor:
    return strategy.experimental_local_results(value)[0]


def combined(batches: Iterable[tuple[int, Statistics]]) -> Statistics:
    """The statistics of all images together, of those of batches of so many images; summed in float64."""
    images = 0
    sums: dict[str, npt.NDArray[np.float64]] = {}  # of the inputs and of their squares, [2, C]
    for count, statistics in batches:
        images += count
        for name, (mean, variance) in statistics.items():
            mean = np.float64(mean)
            sums[name] = sums.get(name, 0.0) + count * np.stack([mean, variance + mean**2])
    return {name: _mean_and_variance(*(total / images)) for name, total in sums.items()}


def _mean_and_variance(mean: Any, mean_of_squares: Any) -> tuple[Any, Any]:
    variance = np.maximum(mean_of_squares - mean**2, 0.0)
    return mean.astype(np.float32), variance.astype(np.float32)
