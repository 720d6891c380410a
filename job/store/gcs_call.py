"""One call to Google Cloud Storage: its time, its retries, and the files that it reads or writes."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import requests
from google.api_core.retry import Retry, exponential_sleep_generator

from job.domain.disk import disk_errors
from job.domain.errors import StorageFailed
from job.store.gcs_errors import explained, may_heal

log = logging.getLogger("job")

QUIET_SECONDS = 5.0  # for which a call is repeated without a word
SLOWEST_BYTES_PER_SECOND = 500_000  # an upload at this rate must not run into the time-out
LARGEST_DELAY_SECONDS = 4.0


@dataclass
class Patience:
    """What all calls of one store have in common."""

    location: str
    deadline_seconds: float  # of a call, since its last progress
    timeout_seconds: float  # of one connection or one answer
    first_delay_seconds: float
    end: float = math.inf  # when all calls must have ended, in monotonic seconds
    tell: Callable[[str], None] | None = None  # told of every answer, while ``check`` listens


class Call:
    """One call: it may last so long since its last progress, and to the end of the store's time."""

    def __init__(self, patience: Patience, what: str) -> None:
        self._patience = patience
        self._what = what
        self._begin = self._since = time.monotonic()
        self._furthest = 0
        self._quiet = True
        self._last: Exception | None = None
        self._delays = exponential_sleep_generator(patience.first_delay_seconds, LARGEST_DELAY_SECONDS)
        # It waits in ``_pause``, which ``finish_within`` cuts short.
        self.retry = Retry(
            predicate=lambda error: may_heal(error) and self.left() > 0,
            initial=0.001,
            maximum=0.001,
            timeout=None,
            on_error=self._pause,
        )

    def left(self) -> float:
        """Return the seconds left, at most zero when there are none."""
        return min(self._since + self._patience.deadline_seconds, self._patience.end) - time.monotonic()

    def require_time(self) -> None:
        """Raise ``StorageFailed`` when no time is left, with the last error if there was one."""
        if self.left() > 0:
            return
        if self._last is not None:
            raise explained(self._what, self._patience.location, self._last) from self._last
        raise StorageFailed(
            f"Could not {self._what} {self._patience.location}: the time for storage was used up. What was "
            "committed before is intact."
        )

    def reached(self, position: int) -> None:
        """Note that ``position`` bytes are through; only more than ever before is progress."""
        if position > self._furthest:
            self._furthest, self._since = position, time.monotonic()

    def timeout(self, *, payload: int = 0) -> float:
        """Return the seconds to wait for one answer to a request that carries ``payload`` bytes."""
        usual = self._patience.timeout_seconds + payload / SLOWEST_BYTES_PER_SECOND
        return max(0.1, min(usual, self.left()))

    def answered(self) -> None:
        """Tell a ``check`` that the service is alive."""
        if (tell := self._patience.tell) is not None:
            tell("an answer")

    def _pause(self, error: Exception) -> None:
        if (response := getattr(error, "response", None)) is not None:
            response.close()  # else a refused download keeps its connection until the garbage collector comes
        if not isinstance(error, requests.Timeout):
            self.answered()
        self._last = error
        self._warn(error)
        wake = time.monotonic() + next(self._delays)
        while (rest := min(wake - time.monotonic(), self.left())) > 0:
            time.sleep(min(rest, 0.1))
        self.require_time()

    def _warn(self, error: Exception) -> None:
        late = self._patience.tell is not None or time.monotonic() - self._begin > QUIET_SECONDS
        if self._quiet and late:
            self._quiet = False
            log.warning(
                "Could not %s %s yet: %s. Trying again for up to %.0f s.",
                *(self._what, self._patience.location, error, self.left()),
            )


class Stream:
    """A local file as the client reads or writes it: each further block is progress."""

    def __init__(self, file: BinaryIO, call: Call) -> None:
        self._file = file
        self._call = call
        self.used = False

    def read(self, size: int = -1) -> bytes:
        self._call.require_time()
        self.used = True
        data = self._file.read(size)
        self._call.reached(self._file.tell())
        return data

    def write(self, data: bytes) -> int:
        self._call.require_time()
        with disk_errors("write", Path(self._file.name)):  # here, where it cannot be taken for the network's
            written = self._file.write(data)
            self._file.flush()
        self._call.reached(self._file.tell())
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)
