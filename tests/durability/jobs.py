"""Real training processes as the tests handle them: start, wait until stopped, kill, freeze, thaw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.durability.driver import FILTERS

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120.0  # for one process; many times what it takes
TRAINING = (
    *("train", "--data", "sample", "--blocks", "1", "--filters", str(FILTERS), "--epochs", "2"),
    *("--commit-every", "3steps", "--log-format", "plain", "--name", "run"),
)


class Ended(AssertionError):
    """A process that should have stopped at its point has ended."""


@dataclass
class Job:
    """One process. Its parent is the nursery, or this process if it started cold."""

    pid: int
    log: Path
    cold: subprocess.Popen[bytes] | None = None
    code: int | None = None

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def trained_step(self) -> int:
        """How far training has come; only a process with a point tells."""
        return int(self.text.rpartition("driver: trained step ")[2].split()[0])

    def send(self, number: int) -> float:
        """Signal the process and return the moment."""
        os.kill(self.pid, number)
        return time.monotonic()

    def state(self) -> str:
        """One letter as in ps: T is stopped, Z or nothing has ended."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def wait_until_stopped(self) -> None:
        """Wait for the point of the driver's spec."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (state := self.state()) != "T":
            if state in ("", "Z"):
                raise Ended(f"the process never reached its point:\n{self.text}")
            assert time.monotonic() < deadline, f"the process hangs:\n{self.text}"
            time.sleep(0.005)

    def wait_until_said(self, text: str) -> None:
        """Wait until the process has printed a text."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.text:
            if self.state() in ("", "Z") and text not in self.text:
                raise Ended(f"the process never said {text!r}:\n{self.text}")
            assert time.monotonic() < deadline, f"the process hangs:\n{self.text}"
            time.sleep(0.005)

    def wait_until_blocked(self, number: int) -> None:
        """Wait until the process has taken a signal over."""
        while True:
            blocked = Path(f"/proc/{self.pid}/status").read_text().split("SigBlk:")[1].split()[0]
            if int(blocked, 16) >> (number - 1) & 1:
                return
            time.sleep(0.005)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, self.text

    def wait(self) -> int:
        """Wait for the end and return the exit code, negative for a signal."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.code is None:
            if self.cold is not None:
                self.code = self.cold.poll()
            elif self.state() in ("", "Z"):
                self.code = self._reap()
            assert time.monotonic() < deadline, f"the process hangs:\n{self.text}"
            time.sleep(0.005)
        return self.code

    def _reap(self) -> int:
        raise NotImplementedError


@dataclass
class WarmJob(Job):
    """A fork of the nursery's server, which alone can ask for its exit code."""

    server: subprocess.Popen[str] | None = None

    def _reap(self) -> int:
        assert self.server is not None
        return int(ask(self.server, {"reap": self.pid})["code"])


def ask(server: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    """Exchange a line with the driver's server."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return answer


@dataclass
class Nursery:
    """Starts processes, warm by a fork of one that has imported TensorFlow, or cold."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    _server: subprocess.Popen[str] | None = None

    def start(
        self, *arguments: str, cwd: Path, spec: dict[str, Any] | None = None, cold: bool = False
    ) -> Job:
        log = self.folder / f"{len(self.jobs)}.log"
        log.touch()
        environment = {**self.environment, **_emulator()}
        start = self._start_cold if cold else self._start_warm
        job = start(spec or {}, arguments, environment, cwd, log)
        self.jobs.append(job)
        return job

    def _start_cold(
        self,
        spec: dict[str, Any],
        arguments: Sequence[str],
        environment: dict[str, str],
        cwd: Path,
        log: Path,
    ) -> Job:
        module = ["tests.durability.driver", json.dumps(spec)] if spec else ["job"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, *arguments],
                cwd=cwd,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return Job(process.pid, log, process)

    def _start_warm(
        self,
        spec: dict[str, Any],
        arguments: Sequence[str],
        environment: dict[str, str],
        cwd: Path,
        log: Path,
    ) -> Job:
        server = self._serve()
        request = {
            "spec": spec,
            "arguments": list(arguments),
            "environment": environment,
            "folder": str(cwd),
            "log": str(log),
        }
        return WarmJob(ask(server, request)["pid"], log, server=server)

    def _serve(self) -> subprocess.Popen[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.durability.driver"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server

    def close(self) -> None:
        """End everything that still lives."""
        for job in self.jobs:
            if job.code is None and job.state() not in ("", "Z"):
                job.kill()
        if self._server is not None:
            self._server.kill()
            self._server.communicate()


def _emulator() -> dict[str, str]:
    return {name: os.environ[name] for name in ("STORAGE_EMULATOR_HOST",) if name in os.environ}
