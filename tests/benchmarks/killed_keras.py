"""Keras's ``fit`` with ``BackupAndRestore``, as its documentation shows, to its end: FOLDER IMAGES ..."""

from __future__ import annotations

import argparse
from typing import Any

import keras
import numpy as np

from tests.benchmarks.keras_worker import network
from tests.benchmarks.progress import StepCounter, digest_of, tell_result

TEST_SHARE = 5  # of as many training images, one tests


class CountSteps(keras.callbacks.Callback):
    """Counts each batch that has been trained."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self._counter = counter

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._counter.did(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("images", type=int)
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--filters", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--save-freq", default="epoch", help="'epoch' or a number of batches")
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    model = network([int(count) for count in options.blocks.split(",")], options.filters)
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    words = np.random.default_rng(0)
    train, test = (
        (words.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), words.integers(0, 10, count))
        for count in (options.images, options.images // TEST_SHARE)
    )
    frequency = options.save_freq if options.save_freq == "epoch" else int(options.save_freq)
    backup = keras.callbacks.BackupAndRestore(f"{options.folder}/backup", save_freq=frequency)
    callbacks = [backup, CountSteps(StepCounter(options.folder))]
    model.fit(
        *train,
        batch_size=options.batch_size,
        epochs=options.epochs,
        validation_data=test,
        verbose=0,
        callbacks=callbacks,
    )
    tell_result(options.folder, weights=digest_of(array.tobytes() for array in model.get_weights()))


if __name__ == "__main__":
    main()
