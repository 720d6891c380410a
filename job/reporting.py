"""What people and log collectors read while the job works."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

REFRESH_SECONDS = 0.2

log = logging.getLogger("job")


class Reporter:
    """Writes progress to standard error and results to standard output.

    ``format`` is "plain", "json" (one object a line with ``severity`` and ``message``, as Google Cloud's
    and most collectors read it), or "auto": a live line where standard error is a terminal, else plain lines.
    """

    def __init__(self, format: str = "auto", out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._json = format == "json"
        self._live = format == "auto" and self._out.isatty()
        self._shown = 0.0
        handler = logging.StreamHandler(self._out)
        handler.setFormatter(
            _JsonFormatter() if self._json else logging.Formatter("%(levelname)s: %(message)s")
        )
        log.handlers[:] = [handler]
        log.propagate = False

    def note(self, message: str, **fields: Any) -> None:
        """Tell one event; ``fields`` join the JSON object."""
        self._clear()
        self._write_line("INFO", message, fields)

    def progress(self, label: str, done: int, total: int, *, images_per_second: float, loss: float) -> None:
        """Refresh the live line: steps done, rate and time left. Silent without a terminal."""
        now = time.monotonic()
        if not self._live or (now - self._shown < REFRESH_SECONDS and done < total):
            return
        self._shown = now
        bar = "#" * (20 * done // total)
        text = f"{label} [{bar:<20}] {done}/{total} loss {loss:.4f}"
        if images_per_second:
            text += f", {images_per_second:.0f} images/s"
        self._write(f"\r\x1b[K{text}")

    def epoch(self, entry: dict[str, Any], epochs: int, *, seconds_left: float) -> None:
        """Tell an epoch's results."""
        train, validation = entry["train"], entry["validation"]
        message = (
            f"epoch {entry['epoch'] + 1}/{epochs}: loss {train['loss']:.4f}, accuracy "
            f"{train['accuracy']:.4f}, "
            f"validation loss {validation['loss']:.4f}, validation accuracy {validation['accuracy']:.4f}, "
            f"{train['images_per_second']:.0f} images/s, about {duration(seconds_left)} left"
        )
        self.note(message, **entry)

    def _clear(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def _write_line(self, severity: str, message: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"severity": severity, "message": message, **fields}) if self._json else message
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        """A reader that is gone, or a full disk, must not end the training."""
        with suppress(OSError):
            self._out.write(text)
            self._out.flush()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"severity": record.levelname, "message": record.getMessage()})


def tell_failure(message: str) -> None:
    """Say on standard error why the process ends, as JSON if the last ``Reporter`` writes that."""
    handler = log.handlers[-1] if log.handlers else None
    if handler is not None and isinstance(handler.formatter, _JsonFormatter):
        log.error(message)
    else:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
