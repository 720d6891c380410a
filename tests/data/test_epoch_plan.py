from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job.data.epoch_plan import EpochPlan, steps_per_epoch
from job.engine.training_step import crop_and_flip

GOLDEN = {
    "order": [0, 2, 1, 5, 4, 3, 6, 7],
    "offsets": [[7, 8], [3, 4], [4, 3], [2, 0], [1, 0], [2, 2], [1, 1], [7, 0]],
    "flips": [False, False, True, False, False, False, False, True],
}


def draw(**changes: Any) -> EpochPlan:
    return EpochPlan.draw(**{"images": 50, "seed": 3, "epoch": 1, "crop_padding": 4, "flip": True, **changes})


def test_golden_values() -> None:
    """Streams that must never change: resuming an old run depends on them."""
    plan = draw(images=8, seed=0, epoch=0)
    assert plan.order.tolist() == GOLDEN["order"]
    assert plan.offsets.tolist() == GOLDEN["offsets"]
    assert plan.flips.tolist() == GOLDEN["flips"]


def test_each_image_once_and_from_seed_and_epoch_alone() -> None:
    assert sorted(draw().order) == list(range(50))
    np.testing.assert_array_equal(draw().order, draw().order)
    assert draw(seed=4).order.tolist() != draw().order.tolist()
    assert draw(epoch=2).order.tolist() != draw().order.tolist()


def test_augmentation_does_not_move_the_order() -> None:
    np.testing.assert_array_equal(draw(crop_padding=0, flip=False).order, draw().order)


def test_crops_and_flips_are_uniform() -> None:
    plan = draw(images=20_000)
    for axis in (0, 1):
        counts = np.bincount(plan.offsets[:, axis], minlength=9)
        assert counts.min() > 2_000
        assert len(counts) == 9
    assert abs(plan.flips.mean() - 0.5) < 0.02
    assert not draw(flip=False).flips.any()
    assert not draw(crop_padding=0).offsets.any()


def test_batches_cut_the_plan_in_order() -> None:
    plan = draw()
    cut = plan.batches(first=1, count=2, batch_size=16)
    np.testing.assert_array_equal(cut.order.ravel(), plan.order[16:48])
    assert cut.offsets.shape == (2, 16, 2)
    last = plan.batches(first=3, count=1, batch_size=16)
    np.testing.assert_array_equal(last.order, [plan.order[48:]])


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(50_000, 128, 391), (50_000, 100, 500), (1_000, 1_000, 1)]
)
def test_steps_per_epoch(images: Any, batch: Any, steps: Any) -> None:
    assert steps_per_epoch(images, batch) == steps


def test_a_real_crop_moves_pixels_and_fills_with_zeros() -> None:
    images = np.arange(1, 1 + 2 * 32 * 32 * 3, dtype=np.uint64).reshape(2, 32, 32, 3) % 251 + 1
    images = images.astype(np.uint8)
    moved = crop_and_flip(
        tf.constant(images), tf.constant([[4, 4], [0, 7]]), tf.constant([False, True]), padding=4
    ).numpy()
    np.testing.assert_array_equal(moved[0], images[0])
    padded = np.pad(images[1], ((4, 4), (4, 4), (0, 0)))
    np.testing.assert_array_equal(moved[1], padded[0:32, 7:39][:, ::-1])
    assert not moved[1, :4].any()


def test_flip_alone_mirrors() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    flips = tf.constant([True, False, True])
    result = crop_and_flip(tf.constant(images), tf.zeros([3, 2], tf.int32), flips, padding=0).numpy()
    np.testing.assert_array_equal(result[0], images[0, :, ::-1])
    np.testing.assert_array_equal(result[1], images[1])
