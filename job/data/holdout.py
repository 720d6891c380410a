"""Class-balanced choices of images: the hold-out, and what a picture of the classes shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from job.data.records import Split
from job.domain.errors import UsageError
from job.domain.network import CLASS_COUNT

HOLDOUT_KEY = 10  # of the Philox stream that draws hold-outs: fixed, so that runs of any seed share theirs


def draw_balanced(labels: NDArray[np.int32], per_class: int, *, key: int) -> NDArray[np.int64]:
    """Draw ``per_class`` random images of each class: indices [10, per_class], in random order.

    Raw Philox words and a stable sort: the choice is the same with every version of NumPy.
    """
    fewest = int(np.bincount(labels, minlength=CLASS_COUNT).min())
    if not 1 <= per_class <= fewest:
        raise UsageError(
            f"images per class must be 1 to {fewest}, received {per_class}; try {min(10, fewest)}"
        )
    order = np.argsort(np.random.Philox(key=key).random_raw(len(labels)), kind="stable")
    return np.stack([order[labels[order] == label][:per_class] for label in range(CLASS_COUNT)])


def check_holdout(count: int, *, images: int) -> None:
    """Check that ``count`` of ``images``, as many of each class, can be set aside.

    Raises:
        UsageError: it is not positive and divisible by 10, or leaves some class without training images.
    """
    per_class = images // CLASS_COUNT
    if count <= 0 or count % CLASS_COUNT or count // CLASS_COUNT >= per_class:
        raise UsageError(
            "the hold-out must be divisible by 10 (classes), positive and at most "
            f"{CLASS_COUNT * (per_class - 1)} so that every class keeps training images; "
            f"received {count}; try {min(5_000, CLASS_COUNT * (per_class // 10))}"
        )


def split_holdout(train: Split, count: int) -> tuple[Split, Split]:
    """Split into (remaining, hold-out), the hold-out class-balanced; both keep the images' order.

    The choice depends on ``count`` alone, not on a run's seed; a larger hold-out contains the smaller.

    Raises:
        UsageError: as :func:`check_holdout`.
    """
    fewest = int(np.bincount(train.labels, minlength=CLASS_COUNT).min())
    check_holdout(count, images=CLASS_COUNT * fewest)
    held = np.zeros(len(train.labels), bool)
    held[draw_balanced(train.labels, count // 10, key=HOLDOUT_KEY)] = True
    return Split(train.images[~held], train.labels[~held]), Split(train.images[held], train.labels[held])
