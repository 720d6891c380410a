"""Signals become a flag that the training loop reads, and a deadline that holds whatever the loop does.

A Python signal handler waits while C++ imports, compiles or hangs in a collective, and TensorFlow replaces
handlers of its own accord (several workers' coordination takes SIGTERM). So the signals are blocked in every
thread, where no handler matters, and a watchdog thread waits for them with ``sigtimedwait``: it ends the
process when the grace is over, at once when there is nothing to save, and at a second signal. The last
commit is intact at any instant, which makes ending at any instant safe. How the loop stops in time is in
``Attempt._stop_if_asked``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from job.console import json_line
from job.domain.cleanup import clean_up
from job.domain.errors import Interrupted
from job.domain.settings import Settings

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
    SIGNALS.append(signal.SIGHUP)
ECHO_SECONDS = 1.0  # who signals a process and then its group, as `timeout` does, asks once
MARGIN_SECONDS = 0.5  # the watchdog fires this long before the grace ends


class Interruption:
    """The process's one place that knows about signals.

    A command that waits longer than the default grace, or logs otherwise, sets ``grace_seconds`` (from the
    first signal to the end) and ``as_json`` (the watchdog's last words as an object of one line).
    """

    def __init__(self, grace_seconds: float = Settings.grace_seconds, *, as_json: bool = False) -> None:
        self.grace_seconds = grace_seconds
        self.as_json = as_json
        self._deadline = float("inf")  # time.monotonic()
        self._requested = threading.Event()
        self._unsaved = False

    def install(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP over.

        Call it in the main thread before any import that may start a thread, as NumPy's does: a signal
        reaches any thread that does not block it, and kills the process there, or, if it is PID 1, is lost.
        """
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

    def note_unsaved_work(self, value: bool) -> None:
        """Say whether there is work that waiting could still save."""
        self._unsaved = value
        if self.requested and not value:
            self._exit("nothing is unsaved")

    def _watch(self) -> None:
        signal.sigwait(SIGNALS)
        self._deadline = time.monotonic() + self.grace_seconds - MARGIN_SECONDS
        self._requested.set()
        if not self._unsaved:
            self._exit("nothing is unsaved")
        first = time.monotonic()
        while signal.sigtimedwait(SIGNALS, max(0.0, self.seconds_left)):
            if time.monotonic() - first > ECHO_SECONDS:
                self._exit("a second signal came")
        self._exit(f"the grace of {self.grace_seconds:g} s is over")

    def _exit(self, reason: str) -> None:
        message = f"Interrupted: {reason}; what is committed is intact, the same command continues."
        if self.as_json:
            message = json_line("ERROR", message)
        elif os.isatty(self._stderr):
            message = f"\r\x1b[K{message}"  # in place of the live line
        # os.write, not print: another thread may hold the stream's lock for ever.
        try:
            os.write(self._stderr, f"{message}\n".encode())
            clean_up()
            remove_generated_code()
        finally:
            os._exit(Interrupted.exit_code)


def leave(code: int) -> None:
    """End the process without TensorFlow's teardown, which can abort or hang after a lost peer."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk, a reader that is gone
                stream.flush()
        clean_up()
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
