"""Muon against its definition in float64, and as the SGD that its checkpoints open as."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from job.domain.errors import UsageError
from job.domain.recipe import RECIPES
from job.model.muon import Muon, orthogonal

Array = npt.NDArray[Any]
SHAPES = [(3, 3, 3, 16), (3, 3, 64, 64), (1, 1, 16, 32), (1, 1, 8, 8)]


def as_published(kernel: Array) -> Array:
    """Jordan's iteration as he writes it, on the whole matrix, in float64."""
    matrix = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
    matrix /= np.linalg.norm(matrix)
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix.reshape(kernel.shape)


def random(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_a_step_is_nearly_orthogonal_whatever_its_size(shape: Any, size: float) -> None:
    kernel = size * random(shape)
    left, _, right = np.linalg.svd(kernel.reshape(-1, shape[-1]), full_matrices=False)

    result = orthogonal(tf.constant(kernel)).numpy()

    assert result.shape == shape
    values = left.T @ result.reshape(-1, shape[-1]) @ right.T  # diagonal, if the singular vectors are kept
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-5)
    assert 0.6 < np.diag(values).min() <= np.diag(values).max() < 1.25


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_is_the_published_one(shape: Any) -> None:
    kernel = random(shape)
    np.testing.assert_allclose(orthogonal(tf.constant(kernel)).numpy(), as_published(kernel), atol=1e-5)


def test_directions_that_hardly_matter_are_lifted_and_stay_finite() -> None:
    left, _, right = np.linalg.svd(random((144, 16)), full_matrices=False)
    kernel = ((left * np.logspace(0, -6, 16)) @ right).reshape(3, 3, 16, 16).astype(np.float32)
    np.testing.assert_allclose(orthogonal(tf.constant(kernel)).numpy(), as_published(kernel), atol=2e-3)
    np.testing.assert_array_equal(orthogonal(tf.zeros((3, 3, 4, 4))).numpy(), 0.0)


def test_steps_match_numpy_for_convolutions_and_sgd_for_all_else() -> None:
    starts = [random((3, 3, 4, 8)), random((8,), 1), random((8, 10), 2)]
    mine, sgds = ([keras.Variable(start) for start in starts] for _ in range(2))
    options = {"momentum": 0.6, "nesterov": True}
    muon, sgd = Muon(0.1, **options), keras.optimizers.SGD(0.1, **options)
    expected, velocity = starts[0].astype(np.float64), np.zeros_like(starts[0], np.float64)
    for step, rate in enumerate([0.1, 0.2, 0.05]):
        gradients = [random(start.shape, 10 + step) for start in starts]
        for optimizer, variables in ((muon, mine), (sgd, sgds)):
            optimizer.learning_rate.assign(rate)
            optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
        velocity = 0.6 * velocity - rate * gradients[0]
        expected += rate * as_published(0.6 * velocity - rate * gradients[0])

    np.testing.assert_allclose(mine[0].numpy(), expected, atol=1e-5)
    for muons, plain in zip(mine[1:], sgds[1:], strict=True):
        np.testing.assert_array_equal(muons.numpy(), plain.numpy())
    for muons, plain in zip(muon.variables, sgd.variables, strict=True):
        np.testing.assert_allclose(muons.numpy(), plain.numpy(), atol=1e-6)


@pytest.mark.parametrize("values", [{"nesterov": False}, {"momentum": 0.0}, {"weight_decay": 1e-4}], ids=str)
def test_a_recipe_of_muon_has_what_muon_needs(values: Any) -> None:
    with pytest.raises(UsageError, match=r"Nesterov SGD with momentum.*, but nesterov is"):
        replace(RECIPES["fast"], **values)


def test_short_products_keep_the_singular_values_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose TF32 reads 10 bits of a float32's mantissa; also of kernels with small values."""
    exact = tf.matmul

    def short(values: tf.Tensor) -> tf.Tensor:
        bits = tf.bitcast(values, tf.uint32) + tf.constant(1 << 12, tf.uint32)
        return tf.bitcast(tf.bitwise.bitwise_and(bits, tf.constant(0xFFFFE000, tf.uint32)), tf.float32)

    def matmul(left: tf.Tensor, right: tf.Tensor, **options: Any) -> tf.Tensor:
        return exact(short(left), short(right), **options)

    monkeypatch.setattr(tf, "matmul", matmul)
    left, _, right = np.linalg.svd(random((144, 16)), full_matrices=False)
    for decades in (2, 4, 6):
        kernel = ((left * np.logspace(0, -decades, 16)) @ right).astype(np.float32)
        result = orthogonal(tf.constant(kernel.reshape(3, 3, 16, 16))).numpy().reshape(144, 16)
        assert np.linalg.norm(result, 2) < 1.25
        expected = as_published(kernel.reshape(3, 3, 16, 16)).reshape(144, 16)
        assert np.linalg.norm(result - expected) < 0.02 * np.linalg.norm(expected)
