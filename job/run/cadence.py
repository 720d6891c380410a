"""When a commit is due.

By default (``auto``) at each epoch's end, and in between as often as storage makes it cheap: a kill then
costs a minute of work at most, and a commit takes a tenth of the time at most. What the last commit took
decides.
"""

from __future__ import annotations

import time

from job.domain.record import Progress
from job.domain.settings import Cadence

# Between commits, however cheap: 360 an hour, and the 15 ms of each hold 0.15 % of the time.
LEAST_SECONDS = 10.0
MOST_LOST_SECONDS = 60.0  # by a kill, with a commit that is under way
TIMES = ("auto", "seconds")  # units by which time decides
# Between commits, in times of what one takes: at least, and up to where MOST_LOST_SECONDS allows.
LEAST_TIMES, CHEAP_TIMES = 10, 20


def auto_seconds(commit_seconds: float) -> float:
    """From one commit to the next, where each takes so long in the background."""
    cheap = min(CHEAP_TIMES * commit_seconds, MOST_LOST_SECONDS - commit_seconds)
    return max(LEAST_SECONDS, cheap, LEAST_TIMES * commit_seconds)


class CommitSchedule:
    """Compares where training is with the last commit, by the cadence that was asked for."""

    def __init__(self, cadence: Cadence) -> None:
        self._cadence = cadence
        self._step, self._epoch, self._moment = 0, 0, time.monotonic()
        self.commit_seconds = 0.0  # that the last commit took

    def committed(self, progress: Progress) -> None:
        """Note that a commit of this progress has begun."""
        self._step, self._epoch, self._moment = progress.step, progress.epoch, time.monotonic()

    def is_due(self, progress: Progress, *, busy: bool = False) -> bool:
        """Whether another multiple of the cadence has been reached since the last commit.

        With ``auto`` one that is in flight, ``busy``, is let finish: nothing waits for it.
        """
        count = self._cadence.count
        if self._cadence.unit == "auto":
            return not busy and (
                progress.epoch > self._epoch or self._is_time(auto_seconds(self.commit_seconds))
            )
        if self._cadence.unit == "seconds":
            return self._is_time(count)
        if self._cadence.unit == "steps":
            return progress.step // count > self._step // count
        return progress.epoch // count > self._epoch // count

    def _is_time(self, seconds: float) -> bool:
        return time.monotonic() - self._moment >= seconds

    def due_seconds(self, interruption: float) -> float | None:
        """Seconds from a commit's beginning to the next one's end, at most; None: steps or epochs decide.

        ``interruption``: seconds in which nothing can be committed, as while the network is evaluated.
        """
        between = auto_seconds(self.commit_seconds) if self._cadence.unit == "auto" else self._cadence.count
        return between + interruption + self.commit_seconds if self._cadence.unit in TIMES else None

    @property
    def steps(self) -> int | None:
        """A commit is due at every multiple of so many steps; None for other cadences."""
        return int(self._cadence.count) if self._cadence.unit == "steps" else None
