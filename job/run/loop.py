"""The training loop: epochs of calls of many steps, each followed by a validation.

A call to the devices lasts about half a second. What the attempt does after each, it says: there it commits,
and stops, by an exception, if a signal asks it to.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from job.data.epoch_plan import EpochPlan, steps_per_epoch
from job.domain.account import Kind
from job.engine.device_split import DeviceSplit
from job.engine.prediction import Predictions
from job.engine.recalibration import Callback
from job.engine.training_step import StepSums, Trainer
from job.model.batch_normalization import Statistics
from job.run.job import Job
from job.run.position import Pace, Position, after_call, after_epoch

CALL_SECONDS = 0.5  # one call lasts about so long: it bounds the reaction to a signal


class NotFinite(Exception):
    """A loss is infinite or not a number; the message says which."""


class TrainingLoop:
    """Trains and validates, and knows how far it has come."""

    def __init__(self, job: Job, trainer: Trainer, *, commit_steps: int | None) -> None:
        """No call goes beyond a multiple of ``commit_steps``."""
        self._trainer, self._splits, self._identity = trainer, job.splits, job.identity
        self._cluster, self._reporter, self._stopwatch = job.cluster, job.reporter, job.stopwatch
        self._epochs, self._commit_steps = job.settings.epochs, commit_steps
        splits, strategy = job.splits, job.cluster.strategy
        self._validation = DeviceSplit(splits.validation, strategy)
        test_validates = splits.test is splits.validation
        self._test = self._validation if test_validates else DeviceSplit(splits.test, strategy)
        self._steps = steps_per_epoch(len(splits.train.labels), job.identity.batch_size)
        self._pace = Pace(CALL_SECONDS)
        self._has_predicted = False  # the first call of an attempt traces
        self.position = Position()

    def train_epoch(self, *, after_each: Callback) -> None:
        """Finish the epoch under way, call by call."""
        recipe, progress = self._identity.recipe, self.position.progress
        plan = EpochPlan.draw(
            images=len(self._splits.train.labels),
            seed=self._identity.seed,
            epoch=progress.epoch,
            crop_padding=recipe.crop_padding,
            flip=recipe.flip,
        )
        while self.position.progress.batch < self._steps:
            self._train_call(plan)
            after_each()

    def validate(self, *, after_each: Callback) -> None:
        """Evaluate every validation image, and close the epoch."""
        started, progress = time.perf_counter(), self.position.progress
        evaluated = self._stopwatch.seconds("evaluation")
        predictions = self._predict(self._validation, after_each)
        seconds = time.perf_counter() - started
        validation = predictions.summary(self._validation.labels_on_host)
        _check_finite(np.array([validation["loss"]]), "validation loss after", progress.step)
        took = self.position.timing.epoch + seconds
        self.position = after_epoch(
            self.position,
            validation,
            predictions.confusion(self._validation.labels_on_host),
            seconds=seconds,
            evaluated=self._stopwatch.seconds("evaluation") - evaluated,
            learning_rate=self._learning_rate(progress.step - 1),
        )
        epochs_left = self._epochs - self.position.progress.epoch
        self._reporter.epoch(self.position.history[-1], self._epochs, seconds_left=epochs_left * took)

    def evaluate_at_end(self, *, after_each: Callback) -> dict[str, Any]:
        """What result.json says of the final weights: "test", "confusion" and "recalibrated"."""
        before = self._stopwatch.seconds("evaluation")
        test, confusion = self._tested(after_each)
        recalibrated = self._recalibrated(after_each)
        evaluated = self._stopwatch.seconds("evaluation") - before
        timing = self.position.timing
        self.position = replace(self.position, timing=replace(timing, evaluated=timing.evaluated + evaluated))
        return {"test": test, "confusion": confusion, "recalibrated": recalibrated}

    def _tested(self, after_each: Callback) -> tuple[dict[str, float] | None, list[list[int]]]:
        """The test set's loss and accuracy, None where it validates, and its confusion."""
        if self._test is self._validation and self.position.confusion is not None:
            return None, self.position.confusion
        predictions = self._predict(self._test, after_each)
        labels = self._test.labels_on_host
        summary = None if self._test is self._validation else predictions.summary(labels)
        return summary, predictions.confusion(labels)

    def _recalibrated(self, after_each: Callback) -> dict[str, Any]:
        """Loss and accuracy by batch statistics taken anew, which stay out of the network."""
        images = self._trainer.recalibration.images
        self._reporter.note(f"evaluating again, by batch statistics taken anew over {images:,} images")
        with self._stopwatch.spending("evaluation"):
            statistics = self._trainer.recalibration.statistics(after_each)

        def summary(split: DeviceSplit) -> dict[str, float]:
            return self._predict(split, after_each, statistics).summary(split.labels_on_host)

        return {
            "images": images,
            "validation": summary(self._validation),
            "test": None if self._test is self._validation else summary(self._test),
        }

    def _train_call(self, plan: EpochPlan) -> None:
        before = self.position.progress
        count = self._steps_of_next_call()
        batches = plan.batches(first=before.batch, count=count, batch_size=self._identity.batch_size)
        rates = [self._learning_rate(before.step + index) for index in range(count)]
        traced = not self._pace.has_traced
        kind: Kind = "starting" if traced else "training"
        spent = self._stopwatch.seconds(kind)
        with self._stopwatch.spending(kind):
            sums = self._trainer.train_steps(batches, np.array(rates, np.float32))
        self._stopwatch.switch("other")  # what comes before the first call counts as the start
        seconds, images = self._stopwatch.seconds(kind) - spent, batches.order.size
        _check_finite(sums.loss, "loss of", before.step + 1)
        self._pace.took(seconds, steps=images / self._identity.batch_size)
        self._move_on(sums, steps=count, images=images, seconds=seconds, traced=traced)

    def _move_on(self, sums: StepSums, **call: Any) -> None:
        self.position = after_call(self.position, sums, **call)
        progress = self.position.progress
        self._reporter.progress(
            f"epoch {progress.epoch + 1}/{self._epochs}",
            progress.batch,
            self._steps,
            images_per_second=self.position.timing.images_per_second,
            loss=progress.loss_sum / progress.images,
            accuracy=progress.correct / progress.images,
        )

    def _steps_of_next_call(self) -> int:
        """The chief's number: as the pace allows, of one batch size, and not beyond the next commit."""
        progress = self.position.progress
        whole = len(self._splits.train.labels) // self._identity.batch_size
        most = (whole if progress.batch < whole else self._steps) - progress.batch
        if self._commit_steps is not None:
            most = min(most, self._commit_steps - progress.step % self._commit_steps)
        return self._cluster.number_from_chief(min(most, self._pace.steps()))

    def _learning_rate(self, step: int) -> float:
        return self._identity.recipe.rate(step, self._epochs * self._steps)

    def _predict(
        self, split: DeviceSplit, after_each: Callback, statistics: Statistics | None = None
    ) -> Predictions:
        """Predict in calls of bounded length."""
        parts: list[Predictions] = []
        first, count = 0, self._trainer.predictor.batch
        while first < split.count:
            count = min(count, split.count - first)
            started = time.perf_counter()
            with self._stopwatch.spending("evaluation" if self._has_predicted else "starting"):
                parts.append(self._trainer.predict(split, first=first, count=count, statistics=statistics))
            self._has_predicted = True
            self._stopwatch.switch("other")
            first += count
            fast = time.perf_counter() - started < CALL_SECONDS / 2
            if fast and len(parts) > 1:  # the first call traces
                count *= 2
            count = self._cluster.number_from_chief(count)
            after_each()
        return Predictions.joined(parts)


def _check_finite(losses: Any, what: str, step: int) -> None:
    """Raise NotFinite for the first loss that is not finite; they are of ``step`` and those after it."""
    finite = np.isfinite(losses)
    if not finite.all():
        first = int(np.argmin(finite))
        raise NotFinite(f"the {what} step {step + first} is {losses[first]}, not a finite number")
