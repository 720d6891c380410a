"""Runs of the job on one machine, on its GPU or on its CPU, and what is compared of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from job.engine.startup import adds_bfloat16_in_float32
from job.store.local import LocalStore
from tests.durability.jobs import ROOT, Job
from tests.workers.groups import free_ports

Kind = Literal["GPU", "CPU"]

# Batches of 99 are shared unevenly by two and by four, the last one of 10 by four.
SMALL = ("--data", "sample", "--blocks", "1", "--batch-size", "99", "--epochs", "1")
FILTERS = {"GPU": "16", "CPU": "4"}  # where the CPU computes alone, it is to take seconds
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}
MEMORY_MB = 1024  # of a logical GPU; the small network needs a part of it
FIRST_STEPS = 5  # that are compared: later, an optimizer amplifies any rounding

LOOK = """
from job.engine.startup import load_cusolver
load_cusolver()
import json, tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus[:1]]
print(json.dumps([[one.get("device_name", "GPU"), one.get("compute_capability", (0, 0))] for one in details]))
"""


@dataclass(frozen=True)
class Device:
    """What trains."""

    kind: Kind
    name: str
    capability: tuple[int, int] = (0, 0)  # of a GPU

    def computes(self, precision: str) -> bool:
        """Whether TensorFlow's convolutions know this precision there."""
        if precision != "bfloat16":
            return True
        return self.capability >= (8, 0) if self.kind == "GPU" else adds_bfloat16_in_float32()


def first_gpu() -> Device | None:
    """The first GPU that TensorFlow finds, asked in a process that does not keep it busy."""
    looked = subprocess.run(
        [sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return gpu_in(looked.stdout)


def gpu_in(answer: str) -> Device | None:
    """The GPU of an answer to ``LOOK``, whose last line counts."""
    found = json.loads(answer.splitlines()[-1])
    return Device("GPU", str(found[0][0]), (found[0][1][0], found[0][1][1])) if found else None


@dataclass
class Run:
    """A process that trains or has trained."""

    job: Job
    store: LocalStore
    report: Path

    def finish(self) -> Run:
        """Wait for its success."""
        assert self.job.wait() == 0, self.job.text
        return self

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.store.read("result.json"))
        return result

    @property
    def losses(self) -> list[float]:
        """Of each step, per image."""
        losses: list[float] = json.loads(self.report.read_text())["losses"]
        return losses

    @property
    def images_on(self) -> list[str]:
        """The kinds of device that hold the training images."""
        kinds: list[str] = json.loads(self.report.read_text())["images_on"]
        return kinds

    @property
    def peak_memory_bytes(self) -> list[int]:
        """Of each device of the process, as TensorFlow counts them; 0 for CPUs."""
        return [one["peak"] for one in json.loads(self.report.read_text())["memory_bytes"]]


@dataclass
class Machine:
    """Starts the job on one device."""

    device: Device
    folder: Path
    runs: list[Run] = field(default_factory=list)

    def start(
        self,
        name: str,
        *options: str,
        devices: int = 1,
        on_cpu: bool = False,
        environment: dict[str, str] | None = None,
        driver: dict[str, Any] | None = None,
    ) -> Run:
        """Begin or continue the run ``name``, on so many logical devices of this process."""
        kind = "CPU" if on_cpu else self.device.kind
        report, log = (self.folder / f"{len(self.runs)}.{ending}" for ending in ("json", "log"))
        spec = {"kind": kind, "devices": devices, "memory_mb": MEMORY_MB, "report": str(report)}
        place = ("--output", str(self.folder / "runs"), "--name", name, "--log-format", "plain")
        network = ("--filters", FILTERS[self.device.kind])
        command = ["train", *SMALL, *network, *place, "--replicas", str(devices), *options]
        needs = ["--require-gpu"] if kind == "GPU" else []
        process = self._launch(
            [json.dumps({**spec, "driver": driver}), *command, *needs],
            log,
            {**(environment or {}), **(NO_GPU if kind == "CPU" else {})},
        )
        self.runs.append(
            Run(Job(process.pid, log, process), LocalStore(str(self.folder / "runs" / name)), report)
        )
        return self.runs[-1]

    def start_workers(self, name: str, *options: str, devices: int = 1) -> list[Run]:
        """Begin two workers that share the device."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        group = ("--workers", "2", "--worker-hosts", hosts)
        return [
            self.start(
                name, *group, *options, devices=devices, environment={"JOB_COMPLETION_INDEX": str(index)}
            )
            for index in range(2)
        ]

    def train(self, name: str, *options: str, **how: Any) -> Run:
        """Train to the end."""
        return self.start(name, *options, **how).finish()

    def evaluate(self, run: Run) -> dict[str, float]:
        """Loss and accuracy of a run's model on the test set, as this device computes them."""
        spec = {"kind": self.device.kind, "devices": 1, "memory_mb": MEMORY_MB}
        log = self.folder / "evaluation.log"
        process = self._launch(
            [json.dumps(spec), "evaluate", str(run.store.location)],
            log,
            NO_GPU if self.device.kind == "CPU" else {},
        )
        job = Job(process.pid, log, process)
        assert job.wait() == 0, job.text
        answer: dict[str, float] = json.loads(job.text[job.text.index("{\n") :])["validation"]
        return answer

    def _launch(
        self, arguments: Sequence[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.carved", *arguments],
                cwd=self.folder,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def close(self) -> None:
        """End what still runs."""
        for run in self.runs:
            if run.job.code is None and run.job.state() not in ("", "Z"):
                run.job.kill()


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of the losses of the first steps."""
    first, second = np.array(one[:FIRST_STEPS]), np.array(other[:FIRST_STEPS])
    return float(np.max(np.abs(first / second - 1.0)))
