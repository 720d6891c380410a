"""The optimizers by TensorFlow's kernels, against the Keras optimizers that their checkpoints open as."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.model.optimizers import SGD, Adam

STEPS = 20
OPTIONS: list[tuple[type[keras.optimizers.Optimizer], type[keras.optimizers.Optimizer], dict[str, Any]]] = [
    (Adam, keras.optimizers.Adam, {}),
    (Adam, keras.optimizers.Adam, {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}),
    (SGD, keras.optimizers.SGD, {}),
    (SGD, keras.optimizers.SGD, {"momentum": 0.9}),
    (SGD, keras.optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
]


def trained(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """Variables of a network and its optimizer after steps of gradients of very different sizes."""
    draw = np.random.default_rng(0)
    starts = [draw.standard_normal(shape).astype(np.float32) for shape in [(3, 3, 17, 33), (33,), ()]]
    variables = [keras.Variable(start) for start in starts]
    optimizer.build(variables)
    step = tf.function(optimizer.apply)
    for _ in range(STEPS):
        size = 10.0 ** draw.uniform(-4, 1)
        optimizer.learning_rate.assign(draw.uniform(1e-3, 1e-1))
        step([tf.constant(size * draw.standard_normal(start.shape), tf.float32) for start in starts])
    return [variable.numpy() for variable in [*variables, *optimizer.variables]]


@pytest.mark.parametrize(("ours", "plain", "options"), OPTIONS)
def test_steps_are_those_of_keras(ours: Any, plain: Any, options: dict[str, Any]) -> None:
    mine = ours(0.1, **options)
    found, expected = trained(mine), trained(plain(0.1, **options))
    assert mine.iterations.numpy() == STEPS
    for value, wanted in zip(found, expected, strict=True):  # 1 - beta_2 in float32 is 1.3e-5 off
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "plain", "options"), OPTIONS)
def test_the_configuration_is_that_of_keras(ours: Any, plain: Any, options: dict[str, Any]) -> None:
    reference = plain(0.1, **options)
    assert ours.from_config(reference.get_config()).get_config() == reference.get_config()
