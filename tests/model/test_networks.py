from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from job.domain.errors import UsageError
from job.domain.network import Network
from job.model import networks

RESNET = Network(model="resnet")
PLAINNET = Network(model="plainnet")


def kinds(model: keras.Model, kind: type) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, kind)]


@pytest.fixture(scope="module")
def resnet() -> keras.Model:
    return networks.build(RESNET)


@pytest.fixture(scope="module")
def plainnet() -> keras.Model:
    return networks.build(PLAINNET)


def test_parameter_counts_are_the_articles(resnet: Any, plainnet: Any) -> None:
    assert resnet.count_params() == RESNET.parameters == 15_619_990
    assert plainnet.count_params() == PLAINNET.parameters == 15_447_062
    projections = [layer for layer in resnet.layers if layer.name.endswith("_shortcut")]
    assert sum(layer.count_params() for layer in projections) == 15_619_990 - 15_447_062


@pytest.mark.parametrize("network", [RESNET, PLAINNET], ids=lambda network: network.model)
def test_output_shapes_layer_by_layer(network: Any) -> None:
    model = networks.build(network)
    main_path = [layer for layer in kinds(model, layers.Conv2D) if not layer.name.endswith("_shortcut")]
    expected = [(32, 32, 64)] * 5 + [(16, 16, 128)] * 10 + [(8, 8, 256)] * 10 + [(4, 4, 512)] * 4
    assert [layer.output.shape[1:] for layer in main_path] == expected
    assert network.layers == len(expected) + 1 == 30
    assert model.get_layer("pool").output.shape == (None, 1, 1, 512)
    assert model.output.shape == (None, 10)
    assert model.output.dtype == "float32"


def test_every_convolution_is_followed_by_relu_then_normalization_but_for_the_one_before_the_sum() -> None:
    model = networks.build(Network(blocks=(1, 1), filters=4))
    order = [type(layer).__name__ for layer in model.layers if layer.name not in ("stage2_block1_shortcut",)]
    block = ["Conv2D", "ReLU", "BatchNormalization", "Conv2D", "Add", "ReLU", "BatchNormalization"]
    start = ["InputLayer", "BatchNormalization", "Conv2D", "ReLU", "BatchNormalization"]
    assert order == [*start, *block, *block, "AveragePooling2D", "Flatten", "Dense", "Softmax"]


@pytest.mark.parametrize("name", ["stage1_block1", "stage2_block1"], ids=["identity", "projection"])
def test_a_block_whose_second_convolution_is_zero_is_relu_bn_of_its_shortcut(name: Any) -> None:
    model = networks.build(Network(blocks=(1, 2), filters=4))
    second = model.get_layer(f"{name}_conv2")
    second.set_weights([np.zeros_like(weight) for weight in second.get_weights()])
    add = model.get_layer(f"{name}_add")
    relu = add._outbound_nodes[0].operation
    normalization = relu._outbound_nodes[0].operation
    rng = np.random.default_rng(0)
    normalization.set_weights([rng.uniform(0.5, 2.0, weight.shape) for weight in normalization.get_weights()])
    shortcut = add.input[0]
    if name == "stage2_block1":
        assert model.get_layer(f"{name}_shortcut").output is shortcut
    probe = keras.Model(model.input, [shortcut, normalization.output])
    source, result = probe(rng.uniform(0, 255, (2, 32, 32, 3)).astype(np.float32))
    gamma, beta, mean, variance = normalization.get_weights()
    expected = (
        gamma * (np.maximum(source.numpy(), 0) - mean) / np.sqrt(variance + normalization.epsilon) + beta
    )
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(source.numpy()).max() > 0


def test_the_twins_differ_by_sums_and_projections_only(resnet: Any, plainnet: Any) -> None:
    def convolutions(model: keras.Model) -> list[Any]:
        return [
            (layer.kernel.shape, layer.strides, layer.use_bias)
            for layer in kinds(model, layers.Conv2D)
            if not layer.name.endswith("_shortcut")
        ]

    assert convolutions(resnet) == convolutions(plainnet)
    assert len(kinds(resnet, layers.Add)) == 14
    assert not kinds(plainnet, layers.Add)
    for kind in (layers.BatchNormalization, layers.ReLU, layers.Dense, layers.AveragePooling2D):
        assert len(kinds(resnet, kind)) == len(kinds(plainnet, kind))
    extra = {layer.name for layer in resnet.layers if layer.name.endswith(("_add", "_shortcut"))}
    assert len(resnet.layers) - len(plainnet.layers) == len(extra) == 17


@pytest.mark.parametrize(
    ("blocks", "depth", "parameters", "pool"),
    [((3, 3, 3), 20, 274_454, 8), ((9, 9, 9), 56, 861_782, 8), ((1,), 4, 5_462, 32)],
)
def test_other_depths(blocks: Any, depth: Any, parameters: Any, pool: Any) -> None:
    network = Network(blocks=blocks, filters=16)
    assert network.layers == depth
    assert network.final_map == pool
    model = networks.build(network)
    assert model.get_layer("pool").pool_size == (pool, pool)
    assert network.parameters == model.count_params() == parameters
    plainnet = replace(network, model="plainnet")
    assert plainnet.parameters == networks.build(plainnet).count_params()


def test_multiply_accumulates(resnet: Any) -> None:
    assert networks.multiply_accumulates(resnet) == pytest.approx(1.01e9, rel=0.01)
    small = networks.build(Network(blocks=(3, 3, 3), filters=16))
    # He et al.'s count for this shape, with the two 1x1 projections that they do not have.
    by_hand = 32 * 32 * 9 * (3 * 16 + 6 * 16 * 16) + 16 * 16 * (9 * (16 * 32 + 5 * 32 * 32) + 16 * 32)
    by_hand += 8 * 8 * (9 * (32 * 64 + 5 * 64 * 64) + 32 * 64) + 64 * 10
    assert networks.multiply_accumulates(small) == by_hand


def test_describe_counts_and_totals(plainnet: Any) -> None:
    text = networks.describe(plainnet)
    assert "30 convolution and dense layers on the main path, 0 projections, 15,447,062 parameters" in text
    assert "stage4_block2_conv2" in text
    assert "4x4x512" in text


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"blocks": (1,) * 7}, ("at most 6 stages", "'1,1,1,1,1,1,1'", "--blocks 2,5,5,2")),
        ({"blocks": (2, 0)}, ("at least 1 block", "'2,0'", "--blocks 3,3,3")),
        ({"filters": 0}, ("at least 1", "0", "--filters 16")),
        ({"model": "vgg"}, ("resnet or plainnet", "'vgg'", "--model resnet")),
    ],
)
def test_impossible_networks_say_rule_value_and_example(values: Any, parts: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Network(**values)
    assert all(part in str(caught.value) for part in parts)
