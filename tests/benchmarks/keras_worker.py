"""The article's network and its way of training, ``fit``. Nothing of job/ is in it but how it finds GPUs."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from job.engine.startup import load_cusolver
from tests.benchmarks.turns import Turns

load_cusolver()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers  # noqa: E402

Tensor = Any
TOGETHER = {"CPU": 1, "GPU": 10}  # batches between looks at the clock, for which a GPU must be waited for


def relu_bn(x: Tensor) -> Tensor:
    return layers.BatchNormalization()(layers.ReLU()(x))


def residual_block(x: Tensor, filters: int, *, halve: bool) -> Tensor:
    y = layers.Conv2D(filters, 3, strides=2 if halve else 1, padding="same")(x)
    y = layers.Conv2D(filters, 3, padding="same")(relu_bn(y))
    if halve:
        x = layers.Conv2D(filters, 1, strides=2, padding="same")(x)
    return relu_bn(layers.Add()([x, y]))


def network(blocks: list[int], filters: int) -> keras.Model:
    """From pixels [N, 32, 32, 3] to probabilities [N, 10]."""
    inputs = keras.Input((32, 32, 3))
    x = layers.BatchNormalization()(inputs)
    x = relu_bn(layers.Conv2D(filters, 3, padding="same")(x))
    for stage, count in enumerate(blocks):
        for block in range(count):
            x = residual_block(x, filters << stage, halve=stage > 0 and block == 0)
    x = layers.Flatten()(layers.AveragePooling2D(32 >> (len(blocks) - 1))(x))
    return keras.Model(inputs, layers.Softmax(dtype="float32")(layers.Dense(10)(x)))


class TakeTurns(keras.callbacks.Callback):
    """Counts batches of ``fit`` and of ``evaluate``, and holds them up between turns."""

    def __init__(self, turns: Turns, batch_size: int, *, together: int) -> None:
        super().__init__()
        self._turns, self._batch_size, self._together = turns, batch_size, together
        self._first: int | None = None  # batch of the unit under way
        self.over = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._first is None:
            self._first = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training = self._end(batch, logs)

    on_test_batch_begin = on_train_batch_begin

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_evaluating = self._end(batch, logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._first = None  # an epoch's last batches that fill no unit are not counted

    def on_test_begin(self, logs: Any = None) -> None:
        self._first = None

    def _end(self, batch: int, logs: Any) -> bool:
        assert self._first is not None
        done = batch - self._first + 1
        if done >= self._together:
            float(logs["loss"])  # waits for the device
            self._first = None
            self.over = not self._turns.did(done * self._batch_size)
        return self.over


def device_memory() -> int | None:
    if not tf.config.list_physical_devices("GPU"):
        return None
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--filters", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--policy", default="float32")
    parser.add_argument("--xla", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--steps-per-execution", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()

    turns = Turns(device_memory=device_memory)
    keras.config.set_dtype_policy(options.policy)
    model = network([int(count) for count in options.blocks.split(",")], options.filters)
    model.compile(
        "adam",
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile={"auto": "auto", "on": True, "off": False}[options.xla],
        steps_per_execution=options.steps_per_execution,
    )
    words = np.random.default_rng(0)
    images = words.integers(0, 256, (options.images, 32, 32, 3), dtype=np.uint8)
    labels = words.integers(0, 10, options.images, dtype=np.int32)
    callback = TakeTurns(
        turns, options.batch_size, together=TOGETHER["GPU" if device_memory() is not None else "CPU"]
    )
    run = model.evaluate if options.evaluate else model.fit
    # A second call of `fit` would trace again: one has epochs enough.
    more = {} if options.evaluate else {"epochs": 1_000_000}
    while not callback.over:
        run(images, labels, batch_size=options.batch_size, verbose=0, callbacks=[callback], **more)


if __name__ == "__main__":
    main()
