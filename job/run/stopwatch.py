"""Where this process's time goes: every second since its start is of one kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from job.domain.account import KINDS, Kind, Spent
from job.run.processes import seconds_since_start


class Stopwatch:
    """Counts an attempt's seconds by their kind, from the start of its process, for one thread."""

    def __init__(self) -> None:
        age = seconds_since_start()
        self._began = time.time() - age  # once: the clock may be set while the attempt lives
        self._seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._kind: Kind = "starting"
        self._since = time.monotonic() - age

    def seconds(self, kind: Kind) -> float:
        """Of one kind, so far."""
        return self._seconds[kind] + (time.monotonic() - self._since if kind == self._kind else 0.0)

    def switch(self, kind: Kind) -> Kind:
        """Count as this kind from now on; the kind before it."""
        now, before = time.monotonic(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextmanager
    def spending(self, kind: Kind) -> Iterator[None]:
        """Count as this kind for a while."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def spent(self, *, due: float | None = None, ended: bool = False) -> Spent:
        """All so far; ``due`` and ``ended`` as :class:`Spent` has them."""
        self.switch(self._kind)
        return Spent(began=self._began, due=due, ended=ended, **self._seconds)
