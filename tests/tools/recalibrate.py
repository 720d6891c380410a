"""Whose is a low accuracy: the weights', or the moving averages' that batch normalization evaluates with?

    python -m tests.tools.recalibrate [--data FOLDER] RUN...

measures finished runs on the test set twice: with the averages that training left, and with averages taken
anew over training images while the weights stand still. The answers go to standard output as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job import cifar10
from job.cifar10 import Split

MODEL = "model.keras"
BATCHES, BATCH = 100, 128
MOMENTUM = 0.95  # after the batches, 0.6 % of what was there before is left
SEED = 0  # of the choice of images


def measured(run: Path, data: cifar10.Dataset) -> dict[str, Any]:
    """A run's accuracy on the test set, by both averages."""
    model = keras.saving.load_model(run / MODEL)
    before = accuracy(model, data.test)
    renew_averages(model, data.train)
    return {"accuracy": before, "accuracy_by_new_averages": accuracy(model, data.test)}


def accuracy(model: keras.Model, split: Split) -> float:
    """Share of the images whose most probable class is theirs."""
    probabilities = model.predict(split.images, batch_size=250, verbose=0)  # [N, classes]
    return float(np.mean(np.argmax(probabilities, axis=1) == split.labels))


def renew_averages(model: keras.Model, train: Split) -> None:
    """Let every batch normalization see training images anew, while no weight changes."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = MOMENTUM
    see = tf.function(lambda images: model(images, training=True))
    order = np.random.default_rng(SEED).permutation(len(train.labels))
    for batch in range(BATCHES):
        chosen = np.sort(np.take(order, range(batch * BATCH, (batch + 1) * BATCH), mode="wrap"))
        see(tf.constant(train.images[chosen]))


def main() -> None:
    """Measure the runs that the command line names."""
    parser = argparse.ArgumentParser(description="Is a low accuracy the moving averages'?")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", default="data")
    options = parser.parse_args()
    data = cifar10.load(options.data)
    answers = {run.name: measured(run, data) for run in options.runs}
    print(json.dumps({"batches": BATCHES, "batch_size": BATCH, "seed": SEED, "runs": answers}, indent=1))


if __name__ == "__main__":
    main()
