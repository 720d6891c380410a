"""When a commit is due, also after a resume that did not stop at a multiple of the cadence."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from job.domain.record import Progress
from job.domain.settings import Cadence
from job.run import cadence
from job.run.cadence import CommitSchedule
from job.run.position import Position


def due_steps(schedule: CommitSchedule, first: int, last: int) -> list[int]:
    """Steps after which a commit is due and made."""
    due = []
    for step in range(first, last + 1):
        if schedule.is_due(progress := Progress(step=step)):
            schedule.committed(progress)
            due.append(step)
    return due


@pytest.mark.parametrize("resumed_at", [0, 1, 99, 100, 101, 199])
def test_the_gaps_between_commits_are_never_longer_than_asked(resumed_at: int) -> None:
    schedule = CommitSchedule(Cadence.parse("100steps"))
    schedule.committed(Progress(step=resumed_at))
    due = due_steps(schedule, resumed_at + 1, 1000)
    assert due == [step for step in range(100, 1001, 100) if step > resumed_at]
    assert max(later - earlier for earlier, later in itertools.pairwise([resumed_at, *due])) <= 100
    assert schedule.steps == 100


def test_a_commit_in_between_does_not_move_the_ones_after_it() -> None:
    schedule = CommitSchedule(Cadence.parse("4steps"))
    schedule.committed(Progress(step=4))
    schedule.committed(Progress(step=7))  # in place of one that storage failed
    assert due_steps(schedule, 8, 13) == [8, 12]


def test_epochs_are_counted_from_the_runs_beginning() -> None:
    schedule = CommitSchedule(Cadence.parse("3epochs"))
    schedule.committed(Progress(step=20, epoch=2))
    assert [epoch for epoch in range(2, 10) if schedule.is_due(Progress(epoch=epoch))] == list(range(3, 10))
    schedule.committed(Progress(step=30, epoch=3))
    assert not schedule.is_due(Progress(epoch=5))
    assert schedule.is_due(Progress(epoch=6))
    assert schedule.steps is None


def test_seconds_are_counted_from_the_last_commit(monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    schedule = CommitSchedule(Cadence.parse("10min"))
    now[0] += 599.0
    assert not schedule.is_due(Progress())
    now[0] += 1.0
    assert schedule.is_due(Progress())
    schedule.committed(Progress())
    assert not schedule.is_due(Progress())


@pytest.mark.parametrize(
    ("commit", "between"),
    [
        (0.0, 10.0),  # no commit yet
        (0.3, 10.0),
        (1.0, 20.0),
        (2.5, 50.0),
        (4.0, 56.0),
        (5.0, 55.0),
        (10.0, 100.0),
        (60.0, 600.0),
    ],
)
def test_auto_loses_a_minute_at_most_where_a_commit_takes_no_more_than_a_tenth_of_the_time(
    commit: float, between: float
) -> None:
    assert cadence.auto_seconds(commit) == between
    assert commit <= between / 10
    assert between + commit <= max(60.0, 11 * commit)


def test_auto_commits_at_each_epochs_end_and_as_often_in_between_as_the_last_commit_allows(
    monkeypatch: Any,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    schedule = CommitSchedule(Cadence())
    assert schedule.due_seconds(0.0) == 10.0
    now[0] += 9.9
    assert not schedule.is_due(Progress(step=9))
    assert schedule.is_due(Progress(step=9, epoch=1))
    now[0] += 0.1
    assert schedule.is_due(Progress(step=10))
    schedule.committed(Progress(step=10, epoch=1))
    assert not schedule.is_due(Progress(step=10, epoch=1))
    schedule.commit_seconds = 2.0
    assert schedule.due_seconds(0.0) == 42.0
    now[0] += 39.9
    assert not schedule.is_due(Progress(step=20, epoch=1))
    now[0] += 0.1
    assert schedule.is_due(Progress(step=20, epoch=1))
    assert schedule.steps is None


@pytest.mark.parametrize(("commit_every", "seconds"), [("auto", 43.0 + 2.0), ("30s", 35.0), ("1epoch", None)])
def test_a_schedule_says_within_how_long_the_next_commit_is_due(
    commit_every: str, seconds: float | None
) -> None:
    """Where a commit takes 2 s and an evaluation 3 s."""
    schedule = CommitSchedule(Cadence.parse(commit_every))
    schedule.commit_seconds = 2.0
    position = Position(history=({"validation": {"seconds": 3.0}},))
    assert schedule.due_seconds(position.evaluation_seconds) == seconds
    assert Position().evaluation_seconds == 0.0


def test_auto_lets_a_commit_in_flight_finish() -> None:
    schedule = CommitSchedule(Cadence())
    assert not schedule.is_due(Progress(epoch=1), busy=True)
    assert schedule.is_due(Progress(epoch=1))
    assert CommitSchedule(Cadence.parse("1epoch")).is_due(Progress(epoch=1), busy=True)
