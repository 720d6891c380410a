"""What being killed costs: the same training to its end, undisturbed and under one schedule of signals."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py

from job.store.location import open_store
from tests.benchmarks.contenders import Workload
from tests.benchmarks.harness import ROOT, clean_environment
from tests.benchmarks.measures import output_in
from tests.benchmarks.progress import RESULT, count_of, digest_of

GRACE_SECONDS = 15.0  # from a SIGTERM to a SIGKILL, as a spot node has it
JITTER = 0.2  # of the time between two signals
FAILURES = 3  # in a row, that nobody killed: then a contender does not finish
NAME = "run"  # of the job's run


@dataclass(frozen=True)
class Schedule:
    """When signals come, counted from the contender's first start; the same for all contenders."""

    number: int  # SIGKILL or SIGTERM; 0 for none
    every: float = 0.0  # seconds

    @property
    def title(self) -> str:
        """For people."""
        if not self.number:
            return "undisturbed"
        return f"{signal.Signals(self.number).name} every {self.every:g} s"

    def moments(self) -> Iterator[float]:
        """Seconds after the start; without end."""
        words, moment = random.Random(0), 0.0
        while self.number:
            moment += self.every * words.uniform(1 - JITTER, 1 + JITTER)
            yield moment
        yield float("inf")


UNDISTURBED = Schedule(0)


@dataclass(frozen=True)
class Work:
    """What each contender has to do."""

    workload: Workload
    images: int
    epochs: int
    torch: str | None  # a Python that has PyTorch

    @property
    def steps(self) -> int:
        """That the finished network has seen."""
        return -(-self.images // self.workload.batch_size) * self.epochs


@dataclass(frozen=True)
class Killed:
    """How a contender fared."""

    finished: bool
    seconds: float  # wall time until the end, or until it was given up
    signals: int  # that it got
    starts: int
    steps: int  # that it trained, those included that it trained again
    weights: str | None  # digest of the final ones
    account: dict[str, Any] | None  # the job's own


CONTENDERS = {
    "job-folder": "this job, in a folder",
    "job-bucket": "this job, in a bucket on loopback",
    "keras-epoch": "Keras `fit`, `BackupAndRestore`, each epoch",
    "keras-steps": "Keras `fit`, `BackupAndRestore`, each 100 steps",
    "torch-epoch": "PyTorch, a checkpoint an epoch",
}


def measure(
    work: Work, schedules: list[Schedule], *, most: float, only: tuple[str, ...], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each contender and schedule; who takes ``most`` times the undisturbed time is given up."""
    rows: list[dict[str, Any]] = []
    for name, label in CONTENDERS.items():
        if only and name not in only:
            continue
        if name.startswith("torch") and not work.torch:
            rows.append({"name": name, "label": label, "not_run": "no PyTorch here; make bench TORCH=1"})
            continue
        undisturbed = play(name, work, UNDISTURBED, limit=float("inf"))
        for schedule in (UNDISTURBED, *schedules):
            limit = most * undisturbed.seconds
            fared = undisturbed if schedule == UNDISTURBED else play(name, work, schedule, limit=limit)
            about = {"name": name, "label": label, "not_run": None, "schedule": schedule.title}
            rows.append(about | _row(fared, undisturbed, work))
            say(f"{work.workload.name}, {name}, {schedule.title}: {fared.seconds:.1f} s")
    return rows


def _row(fared: Killed, undisturbed: Killed, work: Work) -> dict[str, Any]:
    return {
        **asdict(fared),
        "ratio": fared.seconds / undisturbed.seconds if fared.finished and undisturbed.finished else None,
        "steps_repeated": fared.steps - work.steps if fared.finished else None,
        "same_weights": fared.weights == undisturbed.weights if fared.finished else None,
    }


def play(name: str, work: Work, schedule: Schedule, *, limit: float) -> Killed:
    """Let one contender train to its end in a place of its own."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = "bucket" if name == "job-bucket" else "folder"
        output, environment = stack.enter_context(output_in(store))
        command = _command(name, work, folder, output)
        finished, seconds, signals, starts = restarted(command, environment, schedule, limit=limit)
        weights, account = _result(name, folder, output, environment) if finished else (None, None)
        return Killed(finished, seconds, signals, starts, count_of(folder), weights, account)


def _command(name: str, work: Work, folder: str, output: str) -> list[str]:
    group, _, cadence = name.partition("-")
    python = work.torch if group == "torch" and work.torch else sys.executable
    options = [*work.workload.options, "--epochs", str(work.epochs)]
    start = [python, "-m", f"{__package__}.killed_{group}", folder, str(work.images)]
    if group == "job":
        return [*start, "train", *options, "--output", output, "--name", NAME, "--log-format", "plain"]
    return [*start, *options, *(["--save-freq", "100"] if cadence == "steps" else [])]


def restarted(
    command: list[str], environment: dict[str, str], schedule: Schedule, *, limit: float
) -> tuple[bool, float, int, int]:
    """Start a command again and again until it ends with 0.

    Returns:
        Whether it did, within ``limit`` seconds; the seconds; how many signals it got; how often it started.
    """
    started, moments = time.monotonic(), schedule.moments()
    due, signals, starts, failures = next(moments), 0, 0, 0
    while failures < FAILURES and time.monotonic() - started < limit:
        starts += 1
        ended = _lived(command, environment, started + min(due, limit), schedule.number or signal.SIGKILL)
        if ended == 0:
            return True, time.monotonic() - started, signals, starts
        failures, signals = (failures + 1, signals) if ended is not None else (0, signals + 1)
        while due <= time.monotonic() - started:
            due = next(moments)
    return False, time.monotonic() - started, signals, starts


def _lived(command: list[str], environment: dict[str, str], until: float, number: int) -> int | None:
    """Start a process, and signal it at a moment of the monotonic clock; its exit code if it ended before."""
    process = subprocess.Popen(
        command,
        env=clean_environment(**environment),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if _waited(process, until - time.monotonic()):
            return int(process.returncode)
        process.send_signal(number)
        _waited(process, GRACE_SECONDS)
        return None
    finally:
        process.kill()
        process.wait()


def _waited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ended within so many seconds."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(None if seconds == float("inf") else max(0.0, seconds))
        return True
    return False


def _result(
    name: str, folder: str, output: str, environment: dict[str, str]
) -> tuple[str, dict[str, Any] | None]:
    """Digest of the final weights, and the job's account."""
    if not name.startswith("job"):
        return str(json.loads(Path(folder, RESULT).read_text())["weights"]), None
    os.environ.update(environment)  # where the bucket is
    with closing(open_store(f"{output}/{NAME}")) as store:
        found = _arrays(store.read("model.keras"))
        account = json.loads(store.read("result.json"))["time"]
    return digest_of(found), account


def _arrays(keras_file: bytes) -> list[bytes]:
    """Weights and optimizer of a ``.keras`` file, in the order of their names."""
    with zipfile.ZipFile(io.BytesIO(keras_file)) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    found: dict[str, bytes] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(content) as file:
        file.visititems(keep)
    return [data for _, data in sorted(found.items())]
