"""The images by their use."""

from __future__ import annotations

from dataclasses import dataclass

from job.data.holdout import split_holdout
from job.data.records import Dataset, Split


@dataclass(frozen=True)
class Splits:
    """What trains, what validates after each epoch, and what tests."""

    train: Split
    validation: Split
    test: Split
    validates_on: str  # "test set", as in the article, or "hold-out"

    @classmethod
    def of(cls, dataset: Dataset, holdout: int) -> Splits:
        """Set ``holdout`` training images aside; without any, the test set validates."""
        if not holdout:
            return cls(dataset.train, dataset.test, dataset.test, "test set")
        return cls(*split_holdout(dataset.train, holdout), dataset.test, "hold-out")
