"""The least that a first step takes: imports, the network, one batch. BLOCKS FILTERS BATCH [float32|bfloat16]

Keras as its documentation shows it, with no data to read, nothing to restore and nothing to log.
"""

from __future__ import annotations

import json
import os
import sys
import time

import keras
import numpy as np

from tests.benchmarks.keras_worker import network
from tests.benchmarks.turns import STARTED


def main() -> None:
    blocks, filters, batch, precision = sys.argv[1:]
    if precision != "float32":
        keras.config.set_dtype_policy(f"mixed_{precision}")
    model = network([int(count) for count in blocks.split(",")], int(filters))
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    words = np.random.default_rng(0)
    images = words.integers(0, 256, (int(batch), 32, 32, 3), dtype=np.uint8)
    model.train_on_batch(images, words.integers(0, 10, int(batch)))
    print(json.dumps({"is_done": time.monotonic() - float(os.environ[STARTED])}))


if __name__ == "__main__":
    main()
