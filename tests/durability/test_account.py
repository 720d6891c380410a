"""The account of a run that is killed again and again, against the clock of who kills it."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass

import pytest

from job.run.reader import read_record
from job.store.contract import NotFound
from tests.durability.conftest import Place
from tests.durability.jobs import Ended, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 10
STEPS_OF_A_LIFE = 16  # that are committed, at least, before the kill
STEPS_OF_AN_EPOCH = 8
TOLERANCE = 0.02
PAUSE_SECONDS = 3.0
PATIENCE_SECONDS = 600.0  # for one attempt


@dataclass
class Life:
    """An attempt, timed from outside."""

    job: Job
    began: float
    ended: float

    @property
    def first_step(self) -> int:
        """From where it continued."""
        told = re.search(r"continuing from step (\d+)", self.job.text)
        return int(told[1]) if told else 0

    def training_seconds(self, until: float) -> float:
        """Of the calls up to a step, but the first, which traces, as the driver's clock tells."""
        step, total = self.first_step, 0.0
        calls = re.findall(r"^clock step (\S+) (\d+)$", self.job.text, re.MULTILINE)
        for index, (seconds_of_step, steps) in enumerate(calls):
            step += int(steps)
            if index and step <= until:
                total += float(seconds_of_step) * int(steps)
        return total


def committed_step(place: Place) -> int:
    try:
        commits = read_record(place.store).commits
    except NotFound:
        return 0
    return commits[0].progress.step if commits else 0


def live(place: Place, epochs: int, number: int | None = None) -> Life:
    """Run an attempt to its end; with a signal, until it has committed some steps."""
    before = committed_step(place)
    job = place.start("--epochs", str(epochs), "--commit-every", "auto", clock=True)
    began = time.monotonic()  # the nursery, which may have had to start itself, has forked it just now
    while number is not None and committed_step(place) < before + STEPS_OF_A_LIFE:
        if job.state() in ("", "Z"):
            raise Ended(job.text)
        assert time.monotonic() - began < PATIENCE_SECONDS, job.text
        time.sleep(0.02)
    if number is not None:
        job.send(number)
    job.wait()
    return Life(job, began, time.monotonic())


def test_the_account_of_a_run_that_was_killed_ten_times_is_right_to_2_percent(place: Place) -> None:
    epochs = 1000  # it never gets there
    lives = [live(place, epochs, signal.SIGKILL) for _ in range(KILLS)]
    lives.append(live(place, epochs, signal.SIGTERM))
    time.sleep(PAUSE_SECONDS)  # nobody trains: a gap
    lives.append(live(place, committed_step(place) // STEPS_OF_AN_EPOCH + 3))
    assert [life.job.code for life in lives] == [-signal.SIGKILL] * KILLS + [75, 0]

    record = read_record(place.store)
    assert record.finished is not None
    account = record.finished.result["time"]
    wall = sum(life.ended - life.began for life in lives)
    assert account["attempts"] == KILLS + 2
    assert account["wall_seconds"] == pytest.approx(wall, rel=TOLERANCE)
    assert account["gap_seconds"] == pytest.approx(PAUSE_SECONDS, abs=TOLERANCE * wall)
    ends = [*(life.first_step for life in lives[1:]), float("inf")]
    trained = sum(life.training_seconds(end) for life, end in zip(lives, ends, strict=True))
    assert account["training_seconds"] == pytest.approx(trained, abs=TOLERANCE * wall)
    kept = trained + account["evaluation_seconds"]
    assert account["goodput"] == pytest.approx(kept / wall, abs=TOLERANCE)
