"""Signals become a flag that the training loop reads, and a deadline that holds whatever the loop does.

A Python signal handler waits while C++ imports, compiles or hangs in a collective, and TensorFlow replaces
handlers of its own accord (several workers' coordination takes SIGTERM). So the signals are blocked in every
thread, where no handler matters, and a watchdog thread waits for them with ``sigtimedwait``: it ends the
process when the grace is over, at once when there is nothing to save, and at a second signal. The last
commit is intact at any instant, which makes ending at any instant safe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from job.errors import Interrupted

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
    SIGNALS.append(signal.SIGHUP)
ECHO_SECONDS = 1.0  # who signals a process and then its group, as `timeout` does, asks once
MARGIN_SECONDS = 0.5  # the watchdog fires this long before the grace ends


class Interruption:
    """The process's one place that knows about signals."""

    def __init__(self, grace_seconds: float, *, as_json: bool = False) -> None:
        self._grace_seconds = grace_seconds
        self._as_json = as_json
        self._deadline = float("inf")  # time.monotonic()
        self._requested = threading.Event()
        self._unsaved = False

    def install(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP over. Main thread only, and before TensorFlow is imported."""
        self._stderr = os.dup(2)  # a later redirection must not swallow the watchdog's last words
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # threads inherit it
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def requested(self) -> bool:
        """Whether a signal asked us to stop."""
        return self._requested.is_set()

    @property
    def seconds_left(self) -> float:
        """Until the watchdog ends the process; infinite without a signal."""
        return self._deadline - time.monotonic()

    def unsaved(self, value: bool) -> None:
        """Say whether there is work that waiting could still save."""
        self._unsaved = value
        if self.requested and not value:
            self._exit("nothing is unsaved")

    def _watch(self) -> None:
        self._next_signal(timeout=None)
        self._deadline = time.monotonic() + self._grace_seconds - MARGIN_SECONDS
        self._requested.set()
        if not self._unsaved:
            self._exit("nothing is unsaved")
        first = time.monotonic()
        while self._next_signal(timeout=max(0.0, self.seconds_left)):
            if time.monotonic() - first > ECHO_SECONDS:
                self._exit("a second signal came")
        self._exit(f"the grace of {self._grace_seconds:g} s is over")

    @staticmethod
    def _next_signal(timeout: float | None) -> bool:
        """Wait for one of our signals; False when the time is over."""
        if timeout is None:
            signal.sigwait(SIGNALS)
            return True
        return signal.sigtimedwait(SIGNALS, timeout) is not None

    def _exit(self, reason: str) -> None:
        message = f"Interrupted: {reason}; what is committed is intact, the same command continues."
        if self._as_json:
            message = json.dumps({"severity": "ERROR", "message": message})
        # os.write, not print: another thread may hold the stream's lock for ever.
        try:
            os.write(self._stderr, f"{message}\n".encode())
            remove_generated_code()
        finally:
            os._exit(Interrupted.exit_code)


def leave(code: int) -> None:
    """End the process without TensorFlow's teardown, which can abort or hang after a lost peer."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        remove_generated_code()
    finally:
        os._exit(code)


def remove_generated_code() -> None:
    """Delete the files of the functions that TensorFlow traced, which it would do in its teardown."""
    for name, module in sys.modules.copy().items():  # another thread may import
        if name.startswith("__autograph_generated_file"):
            for file in (module.__file__, module.__cached__):
                with suppress(OSError):
                    os.remove(file or "")
