"""An epoch's order, crops and flips, from (seed, epoch) alone.

No random state lives anywhere: an epoch can be planned again, at any time, on any machine. NumPy promises
the streams of ``Generator`` methods for one build only, so the raw words of the Philox counter are used
with a stable sort and plain arithmetic (https://numpy.org/doc/stable/reference/random/compatibility.html).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class EpochPlan:
    """What happens to which image, in the order of training."""

    order: npt.NDArray[np.int32]  # [N] index of the image at each position
    offsets: npt.NDArray[np.int32]  # [N, 2] row and column of the crop in the padded image
    flips: npt.NDArray[np.bool_]  # [N] mirrored left to right

    @classmethod
    def draw(
        cls, *, images: int, seed: int, epoch: int, crop_padding: int = 0, flip: bool = False
    ) -> EpochPlan:
        """Plan epoch ``epoch`` (counted from 0) over ``images`` images.

        Each of three columns of words has its own use, so that switching augmentation on or off
        leaves the order as it is.
        """
        words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(3 * images)
        order_words, crop_words, flip_words = words.reshape(3, images)
        sizes = 2 * crop_padding + 1
        rows = (crop_words >> np.uint64(32)) % np.uint64(sizes)
        columns = (crop_words & np.uint64(0xFFFFFFFF)) % np.uint64(sizes)
        return cls(
            order=np.argsort(order_words, kind="stable").astype(np.int32),
            offsets=np.stack([rows, columns], axis=1).astype(np.int32),
            flips=(flip_words >> np.uint64(63)).astype(np.bool_) & flip,
        )

    def batches(self, *, first: int, count: int, batch_size: int) -> EpochPlan:
        """The plan of steps ``first`` to ``first + count - 1``, shaped [count, batch, ...].

        The steps must have one size: the last partial batch of an epoch is asked for alone.
        """
        positions = slice(first * batch_size, (first + count) * batch_size)
        return EpochPlan(
            order=self.order[positions].reshape(count, -1),
            offsets=self.offsets[positions].reshape(count, -1, 2),
            flips=self.flips[positions].reshape(count, -1),
        )


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of one pass over all images; the last batch may be smaller."""
    return -(-images // batch_size)
