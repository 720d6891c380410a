"""How training moves a position on: sums of the epoch under way, entries of the history, times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from job.domain.record import Progress, Record, Timing
from job.engine.training_step import StepSums


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far an attempt has come: what a commit writes into the record."""

    progress: Progress = field(default_factory=Progress)
    timing: Timing = field(default_factory=Timing)
    history: tuple[dict[str, Any], ...] = ()  # one entry an epoch
    confusion: list[list[int]] | None = None  # of the last validation

    @classmethod
    def of(cls, record: Record) -> Position:
        """Where the newest commit of a record is, or the beginning."""
        if not record.restorable:
            return cls()
        commit = record.restorable[0]
        return cls(
            progress=commit.progress,
            timing=commit.timing,
            history=record.history,
            confusion=record.confusion,
        )

    @property
    def evaluation_seconds(self) -> float:
        """How long the newest epoch's validation took; 0 before the first."""
        return float(self.history[-1]["validation"]["seconds"]) if self.history else 0.0

    def with_loss_scale(self, loss_scale: float, finite_steps: int) -> Position:
        """The same with the state of float16's loss scaling."""
        return replace(
            self, progress=replace(self.progress, loss_scale=loss_scale, finite_steps=finite_steps)
        )


def after_call(
    position: Position, sums: StepSums, *, steps: int, images: int, seconds: float, traced: bool
) -> Position:
    """Move on by one training call.

    Args:
        position: before it.
        sums: what its steps report.
        steps: of the call.
        images: of all its steps.
        seconds: that it took.
        traced: whether it was an attempt's first, whose time says nothing of the speed.
    """
    progress, timing = position.progress, position.timing
    return replace(
        position,
        progress=replace(
            progress,
            step=progress.step + steps,
            batch=progress.batch + steps,
            loss_sum=_added_one_by_one(progress.loss_sum, sums.loss),
            correct=progress.correct + int(sums.correct.sum()),
            images=progress.images + images,
        ),
        timing=replace(
            timing,
            epoch=timing.epoch + seconds,
            total=timing.total + seconds,
            timed_images=timing.timed_images + (0 if traced else images),
            timed=timing.timed + (0.0 if traced else seconds),
            trained=timing.trained + (0.0 if traced else seconds),
        ),
    )


def after_epoch(
    position: Position,
    validation: dict[str, float],
    confusion: list[list[int]],
    *,
    seconds: float,
    evaluated: float,
    learning_rate: float,
) -> Position:
    """Close the epoch under way with what its validation found.

    Args:
        position: after the epoch's last step.
        validation: loss and accuracy.
        confusion: of the validation.
        seconds: that it took.
        evaluated: those of them that its account counts as evaluation.
        learning_rate: of the epoch's last step.
    """
    progress, timing = position.progress, position.timing
    entry = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "wall_time": time.time(),
        "train": {
            "loss": progress.loss_sum / progress.images,
            "accuracy": progress.correct / progress.images,
            "learning_rate": learning_rate,
            "images_per_second": timing.images_per_second,
            "seconds": timing.epoch,
        },
        "validation": {**validation, "seconds": seconds},
    }
    return Position(
        progress=Progress(step=progress.step, epoch=progress.epoch + 1),
        timing=Timing(
            total=timing.total + seconds, trained=timing.trained, evaluated=timing.evaluated + evaluated
        ),
        history=(*position.history, entry),
        confusion=confusion,
    )


def _added_one_by_one(total: float, losses: Any) -> float:
    """Losses of steps added such that no sum depends on how the steps were split into calls.

    Python's ``sum`` would: since 3.12 it carries what rounding lost along, within one call.
    """
    for loss in losses:
        total += float(loss)
    return total


class Pace:
    """How many steps a call may have, so that it lasts about ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._of_step: float | None = None  # 0 until a call that did not trace has been timed

    @property
    def has_traced(self) -> bool:
        """Whether the first call, which traces and compiles, is over."""
        return self._of_step is not None

    def steps(self) -> int:
        """As many as fit; one until the speed is known."""
        return max(1, int(self._seconds / self._of_step)) if self._of_step else 1

    def took(self, seconds: float, *, steps: float) -> None:
        """Note how long a call took; of the first, which traces, nothing can be learned."""
        self._of_step = seconds / steps if self.has_traced else 0.0
