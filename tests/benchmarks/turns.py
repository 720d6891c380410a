"""A contender's side of the benchmark: it works while it is its turn, and says how much it did.

Standard library only: contenders live in several environments. What they say is one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

STARTED = "BENCHMARK_STARTED"  # environment variable: time.monotonic() when the process was started
WARM_UP_UNITS = 2  # at least, before each turn: the others have used the caches meanwhile
WARM_UP_SHARE = 0.2  # of the turn's seconds, at least
LEAST_UNITS = 3  # in a turn, however long they take


class Turns:
    """Waits for turns, and counts and times the units of work that a contender finishes in them."""

    def __init__(
        self, *, peers: tuple[int, ...] = (), device_memory: Callable[[], int | None] = lambda: None
    ) -> None:
        """Take standard output over; all else that is printed goes to standard error.

        Args:
            peers: processes whose memory counts, too.
            device_memory: the most bytes that were in use on an accelerator; None where none computes.
        """
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._peers, self._device_memory = peers, device_memory
        self._script = self._play()
        next(self._script)

    def did(self, images: int) -> bool:
        """Count a finished unit of work, and wait here between turns; False when no turn is left."""
        try:
            self._script.send(images)
        except StopIteration:
            return False
        return True

    def _play(self) -> Generator[None, int, None]:
        yield  # the first unit, which traces or compiles
        seconds = time.monotonic() - float(os.environ[STARTED])
        self._say(first_unit_seconds=seconds, on_gpu=self._device_memory() is not None)
        for line in sys.stdin:
            seconds = json.loads(line)["seconds"]
            warm_up = yield from _work(WARM_UP_SHARE * seconds, WARM_UP_UNITS)
            turn = yield from _work(seconds, LEAST_UNITS)
            memory = sum(map(_peak_memory, (os.getpid(), *self._peers)))
            self._say(
                **turn,
                warm_up_seconds=warm_up["seconds"],
                peak_memory_bytes=memory,
                device_memory_bytes=self._device_memory(),
            )

    def _say(self, **values: Any) -> None:
        print(json.dumps(values), file=self._out, flush=True)


def _work(seconds: float, least: int) -> Generator[None, int, dict[str, float]]:
    """Let units pass until the time is over; how many images they had, and the seconds that they took."""
    images = units = 0
    started = time.perf_counter()
    while units < least or time.perf_counter() - started < seconds:
        images += yield
        units += 1
    return {"images": images, "units": units, "seconds": time.perf_counter() - started}


def _peak_memory(process: int) -> int:
    """Most bytes that a process has held in memory so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
