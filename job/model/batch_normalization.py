"""Batch normalization whose statistics are accurate, fast on CPUs, and may span all replicas.

Keras 3 composes its layer of many small operations on TensorFlow. TensorFlow's fused kernels are several
times faster on CPUs, but the one for training finds a variance that was off by 3e-4. Here the statistics
come from the kernel for gradients, which adds with more care, and on *folded* maps, [N, H, 1, W * C], whose
columns are channels of their own: it adds N * H values in a row at most, and the columns are added
afterwards. The variance was off by 3e-7, unfolded by 2e-6; by 7e-6 and 6e-5 where oneDNN has no bfloat16.
Folding copies nothing, and fills the processor's vectors also where there are 3 channels: 20 times as fast
there. (Measured in bfloat16 at [128, 32, 32, 16] and [128, 32, 32, 3]: AMD Zen 4, 2 cores.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

AllReduce = Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]]  # sums over the replicas


class Kernels(NamedTuple):
    """Standardization by a given mean and variance [C], and its gradient.

    Maps come out in the inputs' type or in float32; :func:`normalize` adds and rounds them.
    """

    # inputs [N, H, W, C], gamma, beta, mean, variance, epsilon -> (inputs - mean) / deviation * gamma + beta
    standardize: Callable[..., tf.Tensor]
    # upstream, inputs, gamma, mean, variance, epsilon -> the gradients by inputs, gamma and beta
    gradient: Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]


# Mean and variance [C] that each layer normalizes by, by the layer's name.
Statistics = dict[str, tuple[Any, Any]]


class _Context(threading.local):
    """What the replica that this thread traces asks of all its layers."""

    counted: tf.Tensor | None = None
    observed: Statistics | None = None
    given: Statistics | None = None


_context = _Context()


@contextmanager
def counting_images(factor: tf.Tensor | None) -> Iterator[None]:
    """Let synchronized layers count this replica's images, or, by the factor 0, none of them.

    A replica without an image in a small batch computes on some image all the same, in step with the others.
    """
    _context.counted = factor
    try:
        yield
    finally:
        _context.counted = None


@contextmanager
def observing_statistics() -> Iterator[Statistics]:
    """Collect the statistics by which layers normalize in training, and leave the moving ones as they are.

    They are those of the global batch, also of layers that are not synchronized.
    """
    _context.observed = {}
    try:
        yield _context.observed
    finally:
        _context.observed = None


@contextmanager
def evaluating_by(statistics: Statistics | None) -> Iterator[None]:
    """Let layers evaluate by these statistics instead of their moving ones."""
    _context.given = statistics
    try:
        yield
    finally:
        _context.given = None


class BatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization over the channels of [N, H, W, C], one code for one and many replicas.

    Same variables, values, gradients and moving statistics up to float rounding; a test holds it to that.

    Args:
        synchronized: the statistics are those of the global batch, whatever each replica's share of it: one
            all-reduce of 2C + 1 numbers forward and one of 2C backward. Sums and counts are added, as by
            PyTorch's SyncBatchNorm.
        kernels: ``FUSED`` for CPUs, or ``COMPOSED`` for GPUs and XLA.
    """

    def __init__(self, *, kernels: Kernels, **options: Any) -> None:
        super().__init__(**options)
        self._kernels = kernels

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        """Normalize by the batch's statistics in training, else by the moving ones, or by given ones."""
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        if not training:
            moving = (self.moving_mean, self.moving_variance)
            mean, variance = map(
                tf.convert_to_tensor, _context.given[self.name] if _context.given else moving
            )
            outputs = self._kernels.standardize(inputs, gamma, beta, mean, variance, self.epsilon)
            return tf.cast(outputs, inputs.dtype)
        synchronized = self.synchronized or _context.observed is not None
        outputs, mean, variance = normalize(
            inputs,
            gamma,
            beta,
            epsilon=self.epsilon,
            kernels=self._kernels,
            all_reduce=_sum_over_replicas if synchronized else list,
            counted=_context.counted if synchronized else None,
        )
        if _context.observed is not None:
            _context.observed[self.name] = (mean, variance)
        else:
            self._move(self.moving_mean, mean)
            self._move(self.moving_variance, variance)
        return outputs

    def _move(self, moving: keras.Variable, value: tf.Tensor) -> None:
        moving.assign(moving * self.momentum + value * (1.0 - self.momentum))


def normalize(
    inputs: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    epsilon: float,
    kernels: Kernels,
    all_reduce: AllReduce = list,
    counted: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalize [N, H, W, C] by its mean and biased variance: Ioffe and Szegedy 2015, algorithm 1.

    ``counted`` is the factor of :func:`counting_images`. The upstream gradient of a replica that does not
    count must be 0; so is the gradient by its inputs then.

    Returns:
        Outputs like the inputs, and the mean and variance [C], through which no gradient flows.
    """

    @tf.custom_gradient
    def normalized(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Any]:
        statistics = [*_sums(inputs, kernels), tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)]
        if counted is not None:
            statistics = [value * counted for value in statistics]
        sums, squares, count = all_reduce(statistics)
        mean, mean_of_squares = sums / count, squares / count
        variance = tf.maximum(mean_of_squares - mean * mean, 0.0)
        outputs = tf.cast(kernels.standardize(inputs, gamma, beta, mean, variance, epsilon), inputs.dtype)

        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # As if the statistics were constants. The optimizer sums gamma's and beta's over the replicas.
            direct, to_gamma, to_beta = kernels.gradient(upstream, inputs, gamma, mean, variance, epsilon)
            # And through the statistics. With x' the standardized input, both together are
            # gamma / deviation * (dy - mean(dy) - x' * mean(dy * x')).
            mean_dy_x, mean_dy = (total / count for total in all_reduce([to_gamma, to_beta]))
            scale = -gamma * tf.math.rsqrt(variance + epsilon)
            through = kernels.standardize(inputs, scale * mean_dy_x, scale * mean_dy, mean, variance, epsilon)
            to_inputs = direct + through
            if counted is not None:  # the term through the statistics is not 0 where no image counts
                to_inputs *= tf.cast(counted, to_inputs.dtype)
            return tf.cast(to_inputs, inputs.dtype), to_gamma, to_beta

        return (outputs, mean, variance), gradient

    outputs, mean, variance = normalized(inputs, gamma, beta)
    return outputs, tf.stop_gradient(mean), tf.stop_gradient(variance)


def _sums(inputs: tf.Tensor, kernels: Kernels) -> tuple[tf.Tensor, tf.Tensor]:
    """Of each channel [C], the sum and the sum of squares, in float32.

    They are what beta's and gamma's gradients would be, were the inputs standardized already and the upstream
    gradient, too. The fused kernel reads bfloat16 once for both; TensorFlow's sums need a float32 copy.
    """
    one = tf.ones(inputs.shape[-1])
    _, squares, sums = kernels.gradient(inputs, inputs, one, 0.0 * one, one, 0.0)
    return sums, squares


def _sum_over_replicas(values: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
    """One all-reduce of all values, packed in one vector."""
    packed = tf.concat([tf.reshape(value, [-1]) for value in values], axis=0)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packed)
    sizes = [value.shape.num_elements() for value in values]
    parts = tf.split(total, sizes)
    return [tf.reshape(part, value.shape) for part, value in zip(parts, values, strict=True)]


def _fused_standardize(
    inputs: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    width = inputs.shape[2]
    outputs, *_ = tf.raw_ops.FusedBatchNormV3(
        x=_fold(inputs),
        scale=tf.tile(gamma, [width]),
        offset=tf.tile(beta, [width]),
        mean=tf.tile(mean, [width]),
        variance=tf.tile(variance, [width]),
        epsilon=epsilon,
        is_training=False,
    )
    return tf.reshape(outputs, tf.shape(inputs))


def _fused_gradient(
    upstream: tf.Tensor,
    inputs: tf.Tensor,
    gamma: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    width, channels = inputs.shape[2:]
    to_inputs, to_gamma, to_beta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_fold(upstream),
        x=_fold(inputs),
        scale=tf.tile(gamma, [width]),
        reserve_space_1=tf.tile(mean, [width]),
        reserve_space_2=tf.tile(variance, [width]),
        reserve_space_3=tf.zeros([0]),
        epsilon=epsilon,
        is_training=False,
    )
    of_columns = tf.reshape(tf.stack([to_gamma, to_beta]), [2, width, channels])
    to_gamma, to_beta = tf.unstack(tf.reduce_sum(of_columns, 1))
    return tf.reshape(to_inputs, tf.shape(inputs)), to_gamma, to_beta


def _fold(values: tf.Tensor) -> tf.Tensor:
    """[N, H, W, C] as [N, H, 1, W * C]."""
    _, height, width, channels = values.shape
    return tf.reshape(values, [-1, height, 1, width * channels])


def _composed_standardize(
    inputs: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    # In float32: the mean may be many deviations away from 0, and half precision would lose the difference.
    return (tf.cast(inputs, tf.float32) - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta


def _composed_gradient(
    upstream: tf.Tensor,
    inputs: tf.Tensor,
    gamma: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    inverse = tf.math.rsqrt(variance + epsilon)
    wide = tf.cast(upstream, tf.float32)
    standardized = (tf.cast(inputs, tf.float32) - mean) * inverse
    # Over the pixels of an image, then over the images: float32 sums of many values in a row drift.
    to_gamma = tf.reduce_sum(tf.reduce_sum(wide * standardized, [1, 2]), 0)
    to_beta = tf.reduce_sum(tf.reduce_sum(wide, [1, 2]), 0)
    return wide * (gamma * inverse), to_gamma, to_beta


# TensorFlow's kernels, those of oneDNN where it is in use.
FUSED = Kernels(_fused_standardize, _fused_gradient)
# On GPUs the fused gradient by constant statistics has no deterministic form, and XLA can fuse these.
COMPOSED = Kernels(_composed_standardize, _composed_gradient)
