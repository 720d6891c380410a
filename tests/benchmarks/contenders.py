"""Who is measured, on what work, and what this machine can run of it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from job.engine.startup import computes_bfloat16

REFERENCE = "keras"  # the article's way: what the others are compared with
OURS = "job"
EVALUATION_BATCH = 250  # images; what this job predicts at a time


@dataclass(frozen=True)
class Machine:
    """The hardware, as far as it decides who can run."""

    processor: str
    cores: int  # that this process may use
    gpus: tuple[str, ...]
    bfloat16: bool  # computed natively, and faster than float32
    memory_bytes: int

    @classmethod
    def here(cls) -> Machine:
        """Look without TensorFlow: it would keep a GPU busy."""
        gpus = _ask_driver("name")
        capabilities = [float(value) for value in _ask_driver("compute_cap")]
        return cls(
            processor=_first_line(Path("/proc/cpuinfo"), "model name") or platform.processor(),
            cores=len(os.sched_getaffinity(0)),
            gpus=tuple(gpus),
            bfloat16=min(capabilities) >= 8.0 if gpus else computes_bfloat16(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )


def _ask_driver(what: str) -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []


def _first_line(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


@dataclass(frozen=True)
class Workload:
    """A network and its batch."""

    name: str
    blocks: str
    filters: int
    batch_size: int = 128

    @property
    def layers(self) -> int:
        """On the main path."""
        return 2 * sum(map(int, self.blocks.split(","))) + 2

    @property
    def title(self) -> str:
        """For people."""
        return (
            f"ResNet-{self.layers} (`--blocks {self.blocks} --filters {self.filters}`), "
            f"batch {self.batch_size}"
        )

    @property
    def options(self) -> list[str]:
        """As every worker takes them."""
        return [
            *("--blocks", self.blocks),
            *("--filters", str(self.filters)),
            *("--batch-size", str(self.batch_size)),
        ]


WORKLOADS = {
    "resnet30": Workload("resnet30", "2,5,5,2", 64),
    "small": Workload("small", "3,3,3", 16),
}


@dataclass(frozen=True)
class Contender:
    """A program that trains, or evaluates, in a process of its own."""

    name: str
    label: str
    worker: str  # module in this package
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str | None = None  # why it cannot run here

    @property
    def group(self) -> str:
        """keras, torch or job."""
        return self.name.partition("-")[0]


ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "1"}
MANY_STEPS = ("--steps-per-execution", "32")


def contenders(machine: Machine, *, torch: bool) -> list[Contender]:
    """Everyone who trains, those who cannot run here included, with the reason."""
    no_bfloat16 = None if machine.bfloat16 else "no hardware that is faster in bfloat16"
    return [*_keras(machine, no_bfloat16), *_torch(no_bfloat16, torch=torch), *_job(machine, no_bfloat16)]


def _keras(machine: Machine, no_bfloat16: str | None) -> Iterator[Contender]:
    yield Contender(REFERENCE, "Keras `fit` as in the article", "keras_worker")
    if not machine.gpus:
        yield Contender("keras-onednn", "the same, oneDNN on", "keras_worker", environment=ONEDNN)
    best = "" if machine.gpus else ", oneDNN on"
    # Keras unrolls the steps of a call, which XLA compiles for over 5 minutes where there are 32.
    for xla, steps, note in (("off", MANY_STEPS, ", 32 steps a call"), ("on", (), "")):
        options: tuple[str, ...] = ("--xla", xla, *steps)
        name, label = f"keras-xla-{xla}", f"Keras `fit`, XLA {xla}{note}{best}"
        yield Contender(name, label, "keras_worker", options, ONEDNN)
        options = (*options, "--policy", "mixed_bfloat16")
        yield Contender(
            f"{name}-bfloat16", f"{label}, bfloat16", "keras_worker", options, ONEDNN, no_bfloat16
        )


def _torch(no_bfloat16: str | None, *, torch: bool) -> Iterator[Contender]:
    absent = None if torch else "no PyTorch here; make bench TORCH=1"
    for precision in ("float32", "bfloat16"):
        reason = absent or (no_bfloat16 if precision == "bfloat16" else None)
        options: tuple[str, ...] = ("--precision", precision)
        suffix = "" if precision == "float32" else "-bfloat16"
        note = "" if precision == "float32" else ", bfloat16"
        yield Contender(
            f"torch{suffix}", f"PyTorch, channels last{note}", "torch_worker", options, {}, reason
        )
        label, options = f"the same, compiled{note}", (*options, "--compile")
        reason = reason or (None if shutil.which("c++") else "no C++ compiler for torch.compile")
        yield Contender(f"torch-compiled{suffix}", label, "torch_worker", options, {}, reason)


def _job(machine: Machine, no_bfloat16: str | None) -> Iterator[Contender]:
    yield Contender(OURS, "this job", "job_worker")
    yield Contender(
        "job-float32",
        "this job, float32",
        "job_worker",
        ("--precision", "float32"),
        not_run="its default here" if no_bfloat16 else None,
    )
    lacking = "needs 2 GPUs" if len(machine.gpus) == 1 else None
    nodes = "needs a node of its own for each" if machine.gpus else None
    yield from _two("replicas", "this job, 2 replicas", lacking)
    yield from _two("workers", "this job, 2 workers on half the cores each", nodes)


def _two(kind: str, label: str, not_run: str | None) -> Iterator[Contender]:
    name, options = f"job-2-{kind}", (f"--{kind}", "2")
    yield Contender(name, label, "job_worker", options, not_run=not_run)
    own, label = "--no-sync-batch-norm", f"{label}, `--no-sync-batch-norm`"
    yield Contender(f"{name}-own-statistics", label, "job_worker", (*options, own), not_run=not_run)


def evaluators(everyone: list[Contender]) -> list[Contender]:
    """Those of them who evaluate, too: each in its precisions, with as many images at a time as this job."""
    ways = {REFERENCE, "keras-onednn", "keras-xla-off-bfloat16", "torch", "torch-bfloat16"}
    chosen = ways | {OURS, f"{OURS}-float32"}
    options = ("--evaluate", "--batch-size", str(EVALUATION_BATCH))
    return [
        Contender(one.name, one.label, one.worker, (*one.options, *options), one.environment, one.not_run)
        for one in everyone
        if one.name in chosen
    ]
