from __future__ import annotations

from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from job.domain.network import Network
from job.model import networks
from job.model.convolution import Conv2D, convolve, kernel_gradient, prefers_products
from tests.support import TINY  # noqa: F401  op determinism is on

RESNET, SMALL = Network(), Network(blocks=(3, 3, 3), filters=16)
PRECISIONS = ("float32", "bfloat16")
LAST_PLACE = {"float32": 2.0**-23, "bfloat16": 2.0**-7}

Shape = tuple[int, int, int, int, int]  # map, inputs, filters, size, stride


def shape_of(layer: layers.Conv2D) -> Shape:
    return layer.input.shape[1], layer.input.shape[3], layer.filters, layer.kernel_size[0], layer.strides[0]


def convolutions(network: Network, **options: Any) -> list[Any]:
    """The layers of the network that trains."""
    model = networks.build(network, convolution=Conv2D, **options)
    return [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]


SHAPES = sorted({shape_of(layer) for network in (RESNET, SMALL) for layer in convolutions(network)})


def values(shape: Any, precision: str, *, seed: int) -> Any:
    return tf.cast(np.random.default_rng(seed).standard_normal(shape, np.float32), precision)


def gradients(layer: Any, inputs: Any, upstream: Any) -> list[Any]:
    """Outputs, and the gradients by inputs, kernel and bias."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs)
    return [outputs, *tape.gradient(outputs, [inputs, layer.kernel, layer.bias], upstream)]


def assert_equal_to_rounding(ours: Any, plain: Any, precision: str) -> None:
    """Both add in float32, in another order, and round the sum once: they differ by one unit at most."""
    one, other = (tf.cast(value, tf.float64).numpy() for value in (ours, plain))
    size = np.abs(other).max()
    np.testing.assert_allclose(one, other, rtol=LAST_PLACE[precision], atol=1e-5 * size)
    assert size > 0


def float32_kernel_gradient(inputs: Any, upstream: Any) -> Any:
    """TensorFlow's own gradient by a 3x3 kernel of stride 1, computed and returned in float32."""
    return tf.raw_ops.Conv2DBackpropFilter(
        input=tf.cast(inputs, tf.float32),
        filter_sizes=[3, 3, inputs.shape[3], upstream.shape[3]],
        out_backprop=tf.cast(upstream, tf.float32),
        strides=[1, 1, 1, 1],
        padding="SAME",
    )


@pytest.mark.parametrize("batch", [80, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_plain_layers_at_every_shape_of_both_networks(
    shape: Shape, precision: str, batch: int
) -> None:
    size, channels, filters, kernel, stride = shape
    inputs = values((batch, size, size, channels), precision, seed=0)
    upstream = values((batch, size // stride, size // stride, filters), precision, seed=1)
    policy = precision if precision == "float32" else f"mixed_{precision}"
    results = []
    for kind in (Conv2D, layers.Conv2D):
        keras.utils.set_random_seed(2)
        layer = kind(filters, kernel, strides=stride, padding="same", dtype=policy)
        layer.build(inputs.shape)
        results.append(gradients(layer, inputs, upstream))
    ours, plain = results
    assert [value.dtype for value in ours] == [value.dtype for value in plain]
    if prefers_products(inputs, layer.kernel, layer.strides):
        plain[2] = float32_kernel_gradient(inputs, upstream)  # where oneDNN has no bfloat16, Keras adds in it
    for one, other in zip(ours, plain, strict=True):
        assert_equal_to_rounding(one, other, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (2, 5), (1, 1), (1, 3)])
def test_the_products_are_the_gradient_by_the_kernel_whatever_the_map(
    height: int, width: int, precision: str
) -> None:
    inputs = values((5, height, width, 6), precision, seed=0)
    upstream = values((5, height, width, 7), precision, seed=1)
    plain = float32_kernel_gradient(inputs, upstream)
    assert_equal_to_rounding(kernel_gradient(inputs, upstream), plain, precision)


def uses_products(layer: Any) -> bool:
    return prefers_products(layer.input, layer.kernel, layer.strides)


@pytest.mark.parametrize("model", ["resnet", "plainnet"])
def test_both_networks_use_the_products_where_they_were_measured_to_be_faster(model: Any) -> None:
    used = {
        precision: Counter(
            shape_of(layer)
            for layer in convolutions(Network(model=model), precision=precision)
            if uses_products(layer)
        )
        for precision in PRECISIONS
    }
    assert used["bfloat16"] == {(8, 256, 256, 3, 1): 9, (4, 512, 512, 3, 1): 3}
    assert used["float32"] == {(4, 512, 512, 3, 1): 3}


@pytest.mark.parametrize("precision", [*PRECISIONS, "float16"])
def test_nothing_changes_in_the_small_network(precision: Any) -> None:
    assert not any(uses_products(layer) for layer in convolutions(SMALL, precision=precision))
    layer = Conv2D(64, 3, padding="same", dtype=f"mixed_{precision}" if precision != "float32" else precision)
    graph = graph_of(layer, (8, 8, 64), precision)
    assert graph["Conv2DBackpropFilter"] == 1
    assert graph["MatMul"] == 0


def graph_of(layer: Any, shape: tuple[int, int, int], precision: str) -> Counter[str]:
    """How often each operation is in the gradient's graph."""
    layer.build((None, *shape))

    @tf.function(input_signature=[tf.TensorSpec([None, *shape], precision)])
    def gradient(inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = layer(inputs)
        return tape.gradient(outputs, layer.kernel)

    return Counter(node.type for node in gradient.get_concrete_function().graph.get_operations())


def test_the_layer_asks_for_products_and_no_more_for_the_slow_gradient() -> None:
    graph = graph_of(Conv2D(512, 3, padding="same", dtype="mixed_bfloat16"), (4, 4, 512), "bfloat16")
    assert graph["MatMul"] == 9
    assert graph["Conv2DBackpropFilter"] == 0


@pytest.mark.parametrize(
    "changes",
    [{"strides": 2}, {"padding": "valid"}, {"kernel_size": 1}, {"kernel_size": 5}, {"filters": 16}],
    ids=str,
)
def test_what_the_products_do_not_cover_stays_plain(changes: Any) -> None:
    layer = Conv2D(**{"filters": 512, "kernel_size": 3, "padding": "same", "dtype": "float32", **changes})
    assert graph_of(layer, (4, 4, 512), "float32")["Conv2DBackpropFilter"] == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("size", "channels"), [(8, 256), (4, 512)])
def test_bits_repeat(size: int, channels: int, precision: str) -> None:
    inputs = values((80, size, size, channels), precision, seed=0)
    kernel = values((3, 3, channels, channels), precision, seed=1)

    @tf.function
    def gradient() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            outputs = convolve(inputs, kernel)
        return tape.gradient(outputs, kernel, inputs)

    first = gradient().numpy()
    for _ in range(5):
        np.testing.assert_array_equal(gradient().numpy(), first)


def test_the_training_network_has_the_plain_networks_variables_in_their_order() -> None:
    network = Network(blocks=(1, 1), filters=16)
    ours, plain = networks.build(network, convolution=Conv2D), networks.build(network)
    for one, other in zip(ours.variables, plain.variables, strict=True):
        assert (one.name, one.shape, one.dtype) == (other.name, other.shape, other.dtype)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)


@pytest.mark.slow
def test_resnet_30_has_the_plain_networks_loss_and_gradients_in_bfloat16() -> None:
    images = values((8, 32, 32, 3), "float32", seed=0) * 60 + 120
    labels = tf.range(8)
    results = []
    for kind in (Conv2D, layers.Conv2D):
        keras.utils.set_random_seed(0)
        model = networks.build(RESNET, precision="bfloat16", convolution=kind)
        optimizer = keras.optimizers.SGD(1e-3)
        losses = []
        for _ in range(3):
            with tf.GradientTape() as tape:
                probabilities = model(images, training=True)
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, probabilities))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            losses.append(float(loss))
        results.append(losses)
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0], results[1], rtol=0.02)
    assert results[0][2] < results[0][0]
