"""ResNet and its twin PlainNet by the Keras functional API: relu_bn -> residual_block -> network.

The article (*Using Keras Functional API to construct a Residual Neural Network*) normalizes after the
activation and leaves the sum itself un-normalized; both are kept. Its idea of a shortcut is He et al. 2015,
*Deep Residual Learning for Image Recognition*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from job.domain.network import CLASS_COUNT, IMAGE_SIZE, Network

# Whatever the user's keras.json says.
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")

Tensor = Any  # a KerasTensor; Keras has no public type for it
LayerMaker = Callable[..., keras.layers.Layer]


def build(
    network: Network,
    *,
    precision: str = "float32",
    convolution: LayerMaker = layers.Conv2D,
    normalization: LayerMaker = layers.BatchNormalization,
) -> keras.Model:
    """Build the network.

    With the article's four stages the maps are 32x32 -> 16x16 -> 8x8 -> 4x4 -> 1x1.

    Args:
        network: kind, blocks a stage and filters of the first stage.
        precision: "float32", or "bfloat16" / "float16" to compute in it with float32 variables.
        convolution: makes the convolution layers; its variables and their order are keras.layers.Conv2D's.
        normalization: makes the normalization layers, likewise keras.layers.BatchNormalization's.

    Returns:
        A model from pixels [N, 32, 32, 3], 0 to 255, to class probabilities [N, 10] in float32.
    """
    policy = keras.DTypePolicy(precision if precision == "float32" else f"mixed_{precision}")
    block = residual_block if network.model == "resnet" else plain_block
    make = _Layers(policy, convolution, normalization)

    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images")
    x = make.normalization()(images)
    x = make.relu_bn(make.convolution(network.filters)(x))  # [N, 32, 32, filters]
    for stage, count in enumerate(network.blocks):
        filters = network.filters << stage
        for index in range(count):
            halve = stage > 0 and index == 0
            x = block(make, x, filters=filters, halve=halve, name=f"stage{stage + 1}_block{index + 1}")
    x = layers.AveragePooling2D(network.final_map, dtype=policy, name="pool")(x)  # [N, 1, 1, last filters]
    x = layers.Flatten(dtype=policy, name="flatten")(x)
    logits = layers.Dense(CLASS_COUNT, dtype=policy, name="logits")(x)
    probabilities = layers.Softmax(dtype="float32", name="probabilities")(logits)
    return keras.Model(images, probabilities, name=f"{network.model}{network.layers}")


class _Layers:
    """The three layer makers with their defaults bound once."""

    def __init__(self, policy: keras.DTypePolicy, convolution: LayerMaker, normalization: LayerMaker) -> None:
        self.policy = policy
        self._convolution = convolution
        self._normalization = normalization

    def convolution(
        self, filters: int, *, size: int = 3, halve: bool = False, name: str | None = None
    ) -> layers.Layer:
        return self._convolution(
            filters, size, strides=2 if halve else 1, padding="same", dtype=self.policy, name=name
        )

    def normalization(self) -> layers.Layer:
        return self._normalization(dtype=self.policy)

    def relu_bn(self, x: Tensor) -> Tensor:
        return self.normalization()(layers.ReLU(dtype=self.policy)(x))


def residual_block(make: _Layers, x: Tensor, *, filters: int, halve: bool, name: str) -> Tensor:
    """relu_bn(convolutions(x) + shortcut(x)); the shortcut is x or a bare 1x1 projection of stride 2."""
    y = make.relu_bn(make.convolution(filters, halve=halve, name=f"{name}_conv1")(x))
    y = make.convolution(filters, name=f"{name}_conv2")(y)
    shortcut = make.convolution(filters, size=1, halve=True, name=f"{name}_shortcut")(x) if halve else x
    return make.relu_bn(layers.Add(dtype=make.policy, name=f"{name}_add")([shortcut, y]))


def plain_block(make: _Layers, x: Tensor, *, filters: int, halve: bool, name: str) -> Tensor:
    """The same two convolutions without the shortcut."""
    y = make.relu_bn(make.convolution(filters, halve=halve, name=f"{name}_conv1")(x))
    return make.relu_bn(make.convolution(filters, name=f"{name}_conv2")(y))


def multiply_accumulates(model: keras.Model) -> int:
    """Multiply-accumulates of one image's forward pass: convolutions and the dense layer."""
    return sum(_layer_multiply_accumulates(layer) for layer in model.layers)


def _layer_multiply_accumulates(layer: layers.Layer) -> int:
    if isinstance(layer, layers.Conv2D):
        _, height, width, _ = layer.output.shape
        return int(height * width * math.prod(layer.kernel.shape))
    if isinstance(layer, layers.Dense):
        return int(math.prod(layer.kernel.shape))
    return 0


def describe(model: keras.Model) -> str:
    """A table of layers with output shapes, parameters and multiply-accumulates, and the totals."""
    rows = [("layer", "kind", "output", "parameters", "multiply-accumulates")]
    for layer in model.layers:
        shape = "x".join(str(size) for size in layer.output.shape[1:])
        work = _layer_multiply_accumulates(layer)
        rows.append(
            (
                layer.name,
                type(layer).__name__,
                shape,
                f"{layer.count_params():,}",
                f"{work:,}" if work else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    main_path = sum(
        isinstance(layer, layers.Conv2D | layers.Dense) and not layer.name.endswith("_shortcut")
        for layer in model.layers
    )
    projections = sum(layer.name.endswith("_shortcut") for layer in model.layers)
    lines.append(
        f"\n{model.name}: {main_path} convolution and dense layers on the main path, {projections} "
        f"projections, "
        f"{model.count_params():,} parameters, {multiply_accumulates(model):,} multiply-accumulates an image"
    )
    return "\n".join(lines)
