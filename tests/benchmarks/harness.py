"""Start contenders, give them their turns, and collect what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.benchmarks.contenders import Contender, Workload
from tests.benchmarks.turns import STARTED

ROOT = Path(__file__).parents[2]
ANSWER_SECONDS = 900.0  # longest wait for a line: XLA compiles a deep network for minutes
IMAGES = 128 * 390  # an epoch without the article's smaller last batch, so that every step is alike


class Failed(Exception):
    """A contender ended, or computes elsewhere than it should."""


class TooSlow(Exception):
    """A contender did not answer in time."""


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what would tell a contender how to work."""
    prefixes = ("JOB_", "TF_", "XLA_", "KERAS_", "OMP_", "MKL_", "TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # contenders wait on the same GPU
        STARTED: repr(time.monotonic()),
        **more,
    }


class Process:
    """A contender's process."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # with what it starts itself, for stop()
        )

    def hear(self) -> dict[str, Any]:
        """The next line it says."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        watchdog = threading.Timer(ANSWER_SECONDS, give_up)
        watchdog.start()
        try:
            line = _stream(self._process.stdout).readline()
        finally:
            watchdog.cancel()
        if late.is_set():
            raise TooSlow
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise Failed(f"ended with {code}: {' '.join(self._errors.read().split())[-300:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, **values: Any) -> None:
        """Say a line to it."""
        with suppress(BrokenPipeError):  # hear() says why it ended
            print(json.dumps(values), file=_stream(self._process.stdin), flush=True)

    def stop(self) -> None:
        """End it and all that it has started."""
        with suppress(BrokenPipeError):
            _stream(self._process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        _stream(self._process.stdout).close()
        self._errors.close()


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


class Player:
    """A contender and what it has said. Its process stays between turns while memory lasts."""

    def __init__(self, contender: Contender, command: list[str], *, gpu: bool = False) -> None:
        self.contender, self._command, self._gpu = contender, command, gpu
        self._process: Process | None = None
        self.first_unit_seconds: list[float] = []
        self.turns: list[dict[str, Any]] = []
        self.failure = contender.not_run
        self.could_run = contender.not_run is None

    def play(self, seconds: float) -> None:
        """One turn of it; a failure is its last."""
        try:
            if self._process is None:
                self._process = Process(self._command, clean_environment(**self.contender.environment))
                first = self._process.hear()
                if self._gpu and not first["on_gpu"]:
                    raise Failed("computes on the CPU, beside a GPU; see docs/benchmark.md")
                self.first_unit_seconds.append(first["first_unit_seconds"])
            self._process.tell(seconds=seconds)
            self.turns.append(self._process.hear())
        except Failed as failed:
            self.failure = f"failed: {failed}"
            self.leave()
        except TooSlow:
            what = "turn" if self.first_unit_seconds else "first call"
            self.failure = f"its {what} takes over {ANSWER_SECONDS:g} s"
            self.leave()
        if self.turns and _free_memory() < 2 * self.turns[-1]["peak_memory_bytes"]:
            self.leave()

    def leave(self) -> None:
        """End the process, if there is one."""
        if self._process:
            self._process.stop()
            self._process = None

    def to_json(self) -> dict[str, Any]:
        """What it is, and each turn."""
        speeds = [turn["images"] / turn["seconds"] for turn in self.turns]
        return {
            "name": self.contender.name,
            "label": self.contender.label,
            "options": list(self.contender.options),
            "environment": self.contender.environment,
            "not_run": self.failure,
            "first_unit_seconds": self.first_unit_seconds,
            "turns": self.turns,
            "images_per_second": speeds if self.failure is None else [],
        }


def play(
    contenders: list[Contender],
    workload: Workload,
    *,
    turns: int,
    seconds: float,
    images: int = IMAGES,
    torch: str | None = None,
    gpu: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Player]:
    """Let contenders take turns, A B C A B C, so that what changes meanwhile meets all alike.

    Args:
        contenders: whom.
        workload: the network that they train.
        turns: of each.
        seconds: a turn's length, warm-up apart.
        images: of the data that all of them train on.
        torch: a Python that has PyTorch.
        gpu: whether a GPU must compute; one that computes elsewhere fails.
        say: is told after each turn.
    """
    players = []
    for contender in contenders:
        python = (torch or sys.executable) if contender.group == "torch" else sys.executable
        module = f"{__package__}.{contender.worker}"
        options = [*workload.options, "--images", str(images), *contender.options]
        players.append(Player(contender, [python, "-m", module, *options], gpu=gpu))
    try:
        for turn in range(turns):
            for player in players:
                if player.failure is None:
                    player.play(seconds)
                    say(f"{workload.name}, turn {turn + 1}/{turns}: {_told(player)}")
    finally:
        for player in players:
            player.leave()
    return players


def _told(player: Player) -> str:
    if player.failure is not None:
        return f"{player.contender.name} {player.failure}"
    last = player.turns[-1]
    return f"{player.contender.name} {last['images'] / last['seconds']:.1f} images/s"


def _free_memory() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
