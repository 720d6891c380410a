"""Convolution whose gradient by the kernel is faster where maps are small and channels are many.

oneDNN's gradient by the kernel is slow there. A matrix product for each of the kernel's positions gives the
same sums, and leaves out the zeros around the maps: almost a third of the work at 4x4.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

# Fewest channels, in and out, from which the products are faster, by precision and height of a square map.
# Measured in turns at batches of 128, plain to products in processor time, on an Intel Xeon with AVX512-BF16:
# in bfloat16 1.6 and 1.4 at 4x4 with 512 and 128 channels, 1.1 at 8x8 with 256; in float32 1.6 at 4x4 with
# 512, 1.1 with 256 and 0.8 at 8x8.
FEWEST_CHANNELS = {
    ("bfloat16", 8): 256,
    ("bfloat16", 4): 128,
    ("float32", 4): 512,
}


class Conv2D(keras.layers.Conv2D):
    """keras.layers.Conv2D for CPUs: same variables, values and gradients up to float rounding."""

    def convolution_op(self, inputs: tf.Tensor, kernel: Any) -> tf.Tensor:
        """Convolve [N, H, W, C]; the layer adds bias and activation."""
        kernel = tf.convert_to_tensor(kernel)
        if self.padding == "same" and prefers_products(inputs, kernel, self.strides):
            return convolve(inputs, kernel)
        return super().convolution_op(inputs, kernel)


def prefers_products(inputs: tf.Tensor, kernel: tf.Tensor, strides: tuple[int, int]) -> bool:
    """Whether :func:`kernel_gradient` is the faster one, by what is known before any step."""
    _, height, width, channels = inputs.shape
    fewest = FEWEST_CHANNELS.get((keras.backend.standardize_dtype(inputs.dtype), height))
    return (
        fewest is not None
        and height == width
        and strides == (1, 1)
        and tuple(kernel.shape[:2]) == (3, 3)
        and min(channels, kernel.shape[3]) >= fewest
    )


@tf.custom_gradient
def convolve(inputs: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """Convolve [N, H, W, C] with [3, 3, C, F], stride 1, zeros around, to [N, H, W, F]."""

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        to_inputs = tf.nn.conv2d_transpose(upstream, kernel, tf.shape(inputs), strides=1, padding="SAME")
        return to_inputs, kernel_gradient(inputs, upstream)

    return tf.nn.conv2d(inputs, kernel, strides=1, padding="SAME"), gradient


def kernel_gradient(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """The gradient [3, 3, C, F] of :func:`convolve` by its kernel: nine products of matrices over pixels.

    Args:
        inputs: [N, H, W, C].
        upstream: [N, H, W, F], the gradient by the outputs.
    """
    channels, filters = inputs.shape[3], upstream.shape[3]
    products = []
    for down in (-1, 0, 1):
        source_rows, target_rows = _overlap(down)
        for right in (-1, 0, 1):
            source_columns, target_columns = _overlap(right)
            pixels = tf.reshape(inputs[:, source_rows, source_columns], [-1, channels])
            gradients = tf.reshape(upstream[:, target_rows, target_columns], [-1, filters])
            products.append(tf.matmul(pixels, gradients, transpose_a=True))
    return tf.reshape(tf.stack(products), [3, 3, channels, filters])


def _overlap(shift: int) -> tuple[slice, slice]:
    """Where inputs that are ``shift`` further on lie within the map, and their outputs."""
    inner = {-1: slice(None, -1), 0: slice(None), 1: slice(1, None)}
    return inner[shift], inner[-shift]
