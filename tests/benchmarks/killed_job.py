"""``python -m job train`` on generated images, with its steps counted: FOLDER IMAGES train ...

NumPy is imported once the job has taken SIGTERM over: threads that it starts before would end the process.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from job import __main__ as program
from job.cli import commands
from tests.benchmarks.progress import StepCounter

if TYPE_CHECKING:
    from job.data.records import Dataset, Split

TEST_SHARE = 5  # of as many training images, one tests


def generated(images: int) -> Dataset:
    """Images and labels as the other contenders generate them."""
    import numpy as np

    from job.data.records import Dataset, Split

    words = np.random.default_rng(0)

    def split(count: int) -> Split:
        pixels = words.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Split(pixels, words.integers(0, 10, count, dtype=np.int32))

    return Dataset(split(images), split(images // TEST_SHARE), sha256="0" * 64)


def prepare(folder: str, images: int) -> None:
    """Replace what reads data, and count what each call of the training step does."""
    from job.data import fetch, sources
    from job.engine.training_step import Trainer

    sources.load = lambda *_, **__: generated(images)
    fetch.locate = lambda *_, **__: "generated"
    counter, original = StepCounter(folder), Trainer.train_steps

    @functools.wraps(original)
    def counted(trainer: Any, plan: Any, rates: Any) -> Any:
        sums = original(trainer, plan, rates)
        counter.did(len(rates))
        return sums

    Trainer.train_steps = counted  # type: ignore[method-assign,assignment]


def main() -> None:
    folder, images = sys.argv[1], int(sys.argv[2])
    sys.argv = ["job", *sys.argv[3:]]
    original = commands.import_run

    def importing(*arguments: Any) -> Any:
        run = original(*arguments)
        prepare(folder, images)
        return run

    commands.import_run = importing  # type: ignore[assignment]
    program.main()


if __name__ == "__main__":
    main()
