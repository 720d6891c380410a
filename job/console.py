"""What people and log collectors read while the job works."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from job.domain.disk import disk_errors

if TYPE_CHECKING:
    from rich.progress import Progress

REFRESH_SECONDS = 0.2  # of the live line
LINE_SECONDS = 60.0  # between two lines of progress without a terminal

log = logging.getLogger("job")


class Reporter:
    """Writes notes and progress to standard error.

    ``format`` is "plain"; "json": one object a line with ``timestamp``, ``severity`` and ``message``, as
    Google Cloud's and most collectors read it; or "auto": a live line where standard error is a terminal,
    else plain.
    """

    def __init__(self, format: str = "auto", out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self.writes_json = format == "json"
        redraws = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._live = LiveLine(self._out) if format == "auto" and redraws else None
        self._label, self._first, self._started = "", 0, 0.0
        self._shown = time.monotonic()  # when something was last written
        log.handlers[:] = [_Handler(self)]
        log.propagate = False

    def note(self, message: str, **fields: Any) -> None:
        """Tell one event; ``fields`` join the JSON object."""
        self.write("INFO", message, **fields)

    def progress(
        self,
        label: str,
        done: int,
        total: int,
        *,
        images_per_second: float,
        loss: float,
        accuracy: float | None = None,
    ) -> None:
        """Show that ``done`` of an epoch's ``total`` steps are trained; call it as often as you like."""
        if not self._is_due(label, done, total, LINE_SECONDS):
            return
        measures = [f"loss {loss:.4f}"]
        measures += [] if accuracy is None else [f"accuracy {accuracy:.4f}"]
        measures += [f"{images_per_second:.0f} images/s"] if images_per_second else []
        if self._live:
            return self._live.show(label, done, total, f"{done}/{total}  {', '.join(measures)}")
        seconds_left = self._seconds_left(done, total)
        left = [] if seconds_left is None else [f"about {duration(seconds_left)} left in the epoch"]
        fields = {"step": done, "steps": total, "loss": loss, "accuracy": accuracy}
        fields |= {"images_per_second": images_per_second, "seconds_left": seconds_left}
        self.note(f"{label}, step {done}/{total}: {', '.join(measures + left)}", **fields)

    def epoch(self, entry: dict[str, Any], epochs: int, *, seconds_left: float) -> None:
        """Tell an epoch's results, as an entry of the record's history holds them."""
        train, validation = entry["train"], entry["validation"]
        self.note(
            f"epoch {entry['epoch']}/{epochs}: loss {train['loss']:.4f}, accuracy {train['accuracy']:.4f}, "
            f"validation loss {validation['loss']:.4f}, validation accuracy {validation['accuracy']:.4f}, "
            f"{train['images_per_second']:.0f} images/s, about {duration(seconds_left)} left",
            **entry,
        )

    def transfer(self, label: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are here; call it as often as you like."""
        if not self._is_due(label, done, total, LINE_SECONDS / 2) and done < total:
            return
        amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
        if (seconds := time.monotonic() - self._started) > 0:
            amount += f", {(done - self._first) / seconds / 1e6:.1f} MB/s"
        if self._live and done < total:
            return self._live.show(label, done, total, amount)
        seconds_left = self._seconds_left(done, total)
        left = f", about {duration(seconds_left)} left" if seconds_left else ""
        self.note(f"{label}: {amount}{left}", bytes=done, of_bytes=total, seconds_left=seconds_left)

    def write(self, severity: str, message: str, **fields: Any) -> None:
        """Write one line. A reader that is gone, or a full disk, must not end the training."""
        self._shown = time.monotonic()
        with suppress(OSError, ValueError):  # ValueError: it is closed
            if self._live:
                self._live.clear()
            text = json_line(severity, message, **fields) if self.writes_json else message
            self._out.write(f"{text}\n")
            self._out.flush()

    def tell(self, message: str) -> None:
        """Print a result on standard output, as a line of the log."""
        show(json_line("INFO", message) if self.writes_json else message)

    def log(self, severity: str, message: str) -> None:
        """Write what was logged; a plain line says how bad it is."""
        self.write(severity, message if self.writes_json else f"{severity}: {message}")

    def _is_due(self, label: str, done: int, total: int, seconds: float) -> bool:
        """Whether to show progress now; the start of a label is remembered to tell the time left."""
        now = time.monotonic()
        if label != self._label or done < self._first:
            self._label, self._first, self._started = label, done, now
        if now - self._shown < (REFRESH_SECONDS if self._live else seconds):
            return False
        self._shown = now
        return True

    def _seconds_left(self, done: int, total: int) -> float | None:
        """By the mean speed since the label's start; None while that is unknown."""
        since = done - self._first
        return (time.monotonic() - self._started) / since * (total - done) if since > 0 else None


class LiveLine:
    """One line that is redrawn on a terminal and fits its width: rich's, started when first shown."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rich: Progress | None = None
        self._label = ""

    def show(self, label: str, done: int, total: int, detail: str) -> None:
        """Draw the line anew."""
        with suppress(OSError):
            if self._rich is None:
                self._rich = _rich_progress(self._out)
                self._rich.add_task("", total=total, detail="")
            task = self._rich.task_ids[0]
            if label != self._label:  # no sample of the speed, which a resumed epoch or download would spoil
                self._label = label
                self._rich.reset(task, description=label, total=total, completed=done, detail=detail)
            self._rich.update(task, completed=done, detail=detail)
            self._rich.start()
            self._rich.refresh()

    def clear(self) -> None:
        """Erase the line, for another that stays; the next `show` draws it again below."""
        if self._rich is not None:
            self._rich.stop()


def _rich_progress(out: TextIO) -> Progress:
    from rich import progress  # imported here: `--help` must not wait for it
    from rich.console import Console
    from rich.table import Column

    class Terminal(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False  # it is never hidden: the process may be ended at once, and would leave it so

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, ratio=1)),
        console=Terminal(file=out, highlight=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )


class _Handler(logging.Handler):
    """What is logged is written by the reporter, as everything else."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.log(record.levelname, record.getMessage())


def json_line(severity: str, message: str, **fields: Any) -> str:
    """One line of a JSON log; ``timestamp`` is RFC 3339, in UTC."""
    timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"timestamp": timestamp, "severity": severity, "message": message, **fields})


def show(text: str) -> None:
    """Print a result on standard output; a reader that has seen enough, as `head` may have, is no error."""
    with disk_errors("write to", "standard output"), suppress(BrokenPipeError):
        print(text, flush=True)


def current_reporter() -> Reporter:
    """The reporter that was made last, or a new one."""
    handler = log.handlers[-1] if log.handlers else None
    return handler.reporter if isinstance(handler, _Handler) else Reporter()


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
