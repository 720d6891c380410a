"""What is measured of whole runs by the command line: start, commits, help."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.engine.startup import fills_vectors
from tests.benchmarks.contenders import Machine, Workload
from tests.benchmarks.harness import ROOT, Failed, Process, clean_environment
from tests.gcs_server import Gateway, GcsServer

COMMIT_EPOCHS = 3  # of the sample, a commit each
STORES = ("folder", "bucket")


def help_seconds(repeats: int) -> list[float]:
    """How long ``python -m job --help`` takes."""
    command = [sys.executable, "-m", "job", "--help"]
    return [_seconds(command) for _ in range(repeats)]


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def first_steps(workload: Workload, *, data: str, repeats: int) -> dict[str, Any]:
    """Seconds from a process's start to its first training step, and until that is done, traced and all.

    In turns: of a new run, of one that continues from a commit, and of Keras alone (``bare``).
    """
    found: dict[str, list[float]] = {key: [] for key in ("begins", "is_done", "resumed", "bare")}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data", data, "--output", folder, "--name"]
        job = [sys.executable, "-m", "job", "train", *workload.options, *options, "resumed", "--epochs", "1"]
        subprocess.run(job, cwd=ROOT, env=clean_environment(), capture_output=True, check=True)
        for turn in range(repeats):
            told = _probe("first-step", workload, [*options, f"new-{turn}"])
            found["begins"].append(told["begins"])
            found["is_done"].append(told["is_done"])
            told = _probe("first-step", workload, [*options, "resumed", "--epochs", "2", "--take-over"])
            found["resumed"].append(told["is_done"])
            found["bare"].append(bare_first_step(workload))
    return {"data": data, **found}


def bare_first_step(workload: Workload) -> float:
    """Seconds from a process's start to the end of its first step in Keras alone, without reading data."""
    precision = "bfloat16" if Machine.here().bfloat16 else "float32"
    network = [workload.blocks, str(workload.filters), str(workload.batch_size)]
    command = [sys.executable, "-m", f"{__package__}.bare", *network, precision]
    # As the job chooses: oneDNN leaves its memory where channels do not fill the processor's vectors.
    onednn = "1" if fills_vectors(workload.filters) else "0"
    process = Process(command, clean_environment(TF_ENABLE_ONEDNN_OPTS=onednn))
    try:
        return float(process.hear()["is_done"])
    finally:
        process.stop()


def commits(workload: Workload) -> dict[str, list[float]]:
    """Seconds that each commit holds the loop up, by store: all but the copy of the state is background."""
    results = {}
    for store in STORES:
        with output_in(store) as (output, environment):
            options = ["--data", "sample", "--output", output, "--epochs", str(COMMIT_EPOCHS)]
            options += ["--commit-every", "1epoch"]
            told = _probe("commits", workload, options, **environment)
            results[store] = list(told["blocked_seconds"])
    return results


@contextmanager
def output_in(store: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A place for runs, and the environment in which it is found: the bucket is a server on loopback."""
    if store == "folder":
        with tempfile.TemporaryDirectory() as folder:
            yield folder, {}
        return
    server = GcsServer()
    try:
        with Gateway(server) as gateway:
            yield gateway.new_bucket(), {"STORAGE_EMULATOR_HOST": gateway.url}
    finally:
        server.stop()


def _probe(probe: str, workload: Workload, options: list[str], **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.probe", probe, "train", "--log-format", "plain"]
    process = Process([*command, *workload.options, *options], clean_environment(**environment))
    try:
        return process.hear()
    finally:
        process.stop()


def load_average() -> float:
    """Processes that wanted a core over the last minute; near 0 on a quiet machine."""
    return os.getloadavg()[0]


def versions(torch: str | None) -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": sys.version.split()[0]}
    question = "from importlib.metadata import version; print(version({!r}))"
    packages = dict.fromkeys(("tensorflow", "keras", "numpy"), sys.executable)
    for name, python in (packages | ({"torch": torch} if torch else {})).items():
        command = [python, "-c", question.format(name)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise Failed(f"{python} has no {name}: {answer.stderr.strip().splitlines()[-1]}")
        found[name] = answer.stdout.strip()
    return found


def default_torch() -> str | None:
    """The Python with PyTorch that ``make bench TORCH=1`` makes, if it is there."""
    python = Path(sys.prefix) / "torch" / "bin" / "python"
    return str(python) if python.exists() else None
