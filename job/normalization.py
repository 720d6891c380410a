"""Batch normalization by TensorFlow's fused kernel, where Keras 3 composes it of many small ones."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization over the channels of [N, H, W, C], in one kernel.

    Same variables, same values and gradients up to float rounding, same moving statistics; a test holds it
    to that. Keras's layer reads the activations several times, this one twice. Statistics that are
    synchronized over replicas are left to Keras's layer: the kernel knows one device only.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        """Normalize [N, H, W, C] by its own statistics in training, else by the moving ones."""
        if training and self.synchronized:
            return super().call(inputs, training=training, mask=mask)
        if not training:
            outputs, _, _ = tf.compat.v1.nn.fused_batch_norm(
                inputs,
                scale=tf.convert_to_tensor(self.gamma),
                offset=tf.convert_to_tensor(self.beta),
                mean=tf.convert_to_tensor(self.moving_mean),
                variance=tf.convert_to_tensor(self.moving_variance),
                epsilon=self.epsilon,
                is_training=False,
            )
            return outputs
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            scale=tf.convert_to_tensor(self.gamma),
            offset=tf.convert_to_tensor(self.beta),
            epsilon=self.epsilon,
            is_training=True,
        )
        count = tf.cast(tf.size(inputs) / tf.shape(inputs)[-1], tf.float32)
        self._move(self.moving_mean, mean)
        # The kernel reports the variance with Bessel's correction; Keras keeps it without.
        self._move(self.moving_variance, variance * (count - 1.0) / count)
        return outputs

    def _move(self, moving: keras.Variable, value: tf.Tensor) -> None:
        moving.assign(moving * self.momentum + value * (1.0 - self.momentum))
