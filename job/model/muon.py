"""Muon: Nesterov SGD whose steps on convolutions are orthogonal.

Jordan et al. 2024, *Muon: An optimizer for hidden layers in neural networks*
(https://kellerjordan.github.io/posts/muon/). A gradient moves few directions of a kernel much and the others
hardly at all; an orthogonal step moves all of them equally.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from job.model.optimizers import SGD

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0, and holds singular values between 0.7 and 1.2


class Muon(SGD):
    """Nesterov SGD, but kernels [height, width, inputs, outputs] move by the rate times an orthogonal matrix.

    Variables and their meaning are those of ``keras.optimizers.SGD``, so that a checkpoint opens as that.
    """

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
        """Update one variable; all but the kernels of convolutions as SGD does."""
        if len(variable.shape) != 4:
            super().update_step(gradient, variable, learning_rate)
            return
        rate = tf.cast(learning_rate, gradient.dtype)
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, self.momentum * velocity - rate * gradient)
        step = self.momentum * velocity - rate * gradient
        self.assign_add(variable, rate * orthogonal(step))


def orthogonal(kernel: tf.Tensor) -> tf.Tensor:
    """Nearly the closest semi-orthogonal matrix to a kernel's, [height * width * inputs, outputs].

    Returns:
        The kernel's singular vectors with singular values of 0.7 to 1.2; of those below about a thousandth
        of the kernel's norm, less. Zeros stay zeros.
    """
    matrix = tf.reshape(kernel, [-1, kernel.shape[-1]])
    wide = matrix.shape[0] < matrix.shape[1]
    result = _with_equal_singular_values(tf.transpose(matrix) if wide else matrix)
    return tf.reshape(tf.transpose(result) if wide else result, kernel.shape)


def _with_equal_singular_values(matrix: tf.Tensor) -> tf.Tensor:
    """Of [M, N], M at least N, by a Newton-Schulz iteration with the smaller of its two Gram matrices.

    The Gram matrix is computed anew each time. Its own recursion would need half the work in wide layers, but
    loses its small eigenvalues to the short products of GPUs (TF32).
    """
    a, b, c = QUINTIC
    # Twice, as the squares in the norm may leave float32's range.
    matrix = tf.math.divide_no_nan(matrix, tf.reduce_max(tf.abs(matrix)))
    matrix = tf.math.divide_no_nan(matrix, tf.norm(matrix))
    for _ in range(ITERATIONS):
        gram = tf.matmul(matrix, matrix, transpose_a=True)
        matrix = a * matrix + tf.matmul(matrix, b * gram + c * tf.matmul(gram, gram))
    return matrix
