"""Predictions of every image once, on all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.domain.network import CLASS_COUNT
from job.engine.cluster import Cluster
from job.engine.device_split import DeviceSplit, images_at, my_share
from job.model.batch_normalization import Statistics, evaluating_by

EVALUATION_BATCH = 250  # images a replica; fixed, so that an image's result does not depend on the replicas

# For functions that branch on no tensor: AutoGraph would parse them for a second and change nothing.
plain_python = tf.autograph.experimental.do_not_convert


@dataclass(frozen=True)
class Predictions:
    """Each image's own loss and predicted class."""

    loss: npt.NDArray[np.float32]  # [N]
    predicted: npt.NDArray[np.int32]  # [N]

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of consecutive images as one."""
        return cls(
            np.concatenate([part.loss for part in parts]), np.concatenate([part.predicted for part in parts])
        )

    def summary(self, labels: npt.NDArray[Any]) -> dict[str, float]:
        """Mean loss, summed in float64 in image order, and accuracy from 0 to 1."""
        return {
            "loss": float(np.sum(self.loss, dtype=np.float64) / len(labels)),
            "accuracy": int(np.sum(self.predicted == labels)) / len(labels),
        }

    def confusion(self, labels: npt.NDArray[Any]) -> list[list[int]]:
        """Images of class i predicted as class j, at [i][j]."""
        cells = labels.astype(np.int64) * CLASS_COUNT + self.predicted
        return np.bincount(cells, minlength=CLASS_COUNT**2).reshape(CLASS_COUNT, CLASS_COUNT).tolist()


class Predictor:
    """A network, compiled to predict the images of a split."""

    def __init__(self, logits: keras.Model, cluster: Cluster) -> None:
        self._logits, self._strategy = logits, cluster.strategy
        self.batch = EVALUATION_BATCH * cluster.replicas  # images that all replicas predict in one step
        self._call = tf.function(self._steps, reduce_retracing=True)

    def predict(
        self, split: DeviceSplit, *, first: int, count: int, statistics: Statistics | None = None
    ) -> Predictions:
        """Predict images ``first`` to ``first + count - 1``, each once.

        By the moving averages of training, or by other ``statistics``, which change nothing in the network.
        """
        positions = tf.range(first, first + -(-count // self.batch) * self.batch)
        # The last batch is padded by repeating the last image; its results are cut off again.
        positions = tf.reshape(tf.minimum(positions, first + count - 1), [-1, self.batch])
        # Traced for any number of batches: a second number would have it traced again.
        any_number = tf.TensorSpec([None, self.batch], tf.int32)
        self._call.get_concrete_function(split.words, split.labels, any_number, statistics)
        results = self._call(split.words, split.labels, positions, statistics).numpy()[:count]
        return Predictions(results[:, 0], results[:, 1].astype(np.int32))

    def _steps(
        self, words: Any, labels: Any, positions: tf.Tensor, statistics: Statistics | None
    ) -> tf.Tensor:
        """Loss and predicted class of each position, [N, 2]."""
        count = tf.shape(positions)[0]
        results = tf.TensorArray(tf.float32, size=count)
        for step in tf.range(count):
            mine = self._strategy.run(
                self._replica_predictions, args=(words, labels, positions[step], statistics)
            )
            results = results.write(step, self._strategy.gather(mine, axis=0))
        return results.concat()

    @plain_python
    def _replica_predictions(
        self, words: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor, statistics: Statistics | None
    ) -> tf.Tensor:
        first, size = my_share(tf.shape(positions)[0])
        mine = positions[first : first + size]
        images = tf.cast(images_at(words, mine), tf.float32)
        with evaluating_by(statistics):
            logits = tf.cast(self._logits(images, training=False), tf.float32)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(labels, mine), logits)
        return tf.stack([loss, tf.cast(predicted_class(logits), tf.float32)], axis=1)


def predicted_class(logits: tf.Tensor) -> tf.Tensor:
    """The class [N], int64, of the largest of ``logits`` [N, classes]."""
    return tf.argmax(logits, axis=1)
