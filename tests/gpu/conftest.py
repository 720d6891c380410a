"""The machine that the scenarios run on: with a GPU for `make test-gpu`, else this one's CPU."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from job.engine.devices import cpu_name
from tests.durability import jobs
from tests.gpu.report import Report
from tests.gpu.scenarios import Device, Machine, first_gpu

REPORT = jobs.ROOT / "build" / "gpu-report.json"
PATIENCE_SECONDS = 500.0  # for one process: a GPU that is newer than the libraries compiles for minutes
INSTALL = ".venv/bin/python -m pip install --no-deps --require-hashes -r requirements/gpu.lock"


def gpu_or_reason(found: Device | None, *, driver_lists_one: bool) -> Device:
    """The GPU. Without one the test is skipped; if only TensorFlow does not find it, the test fails."""
    if found:
        return found
    if driver_lists_one:
        pytest.fail(f"nvidia-smi lists a GPU, but TensorFlow finds none; install its libraries: {INSTALL}")
    pytest.skip(f"skipped: no GPU. On a machine whose nvidia-smi lists one: {INSTALL}; then make test-gpu")


def driver_lists_one() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say where the measurements are."""
    if any("GPU" in test.nodeid for test in terminalreporter.stats.get("passed", [])) and REPORT.exists():
        terminalreporter.write_line(f"Images per second, memory and differences from the CPU: {REPORT}")


@pytest.fixture(
    scope="module",
    params=[pytest.param("GPU", marks=pytest.mark.gpu), pytest.param("CPU", marks=pytest.mark.slow)],
)
def device(request: pytest.FixtureRequest) -> Device:
    """What trains."""
    if request.param == "CPU":
        return Device("CPU", cpu_name())
    return gpu_or_reason(first_gpu(), driver_lists_one=driver_lists_one())


@pytest.fixture(scope="module")
def machine(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """No process outlives the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "PATIENCE_SECONDS", PATIENCE_SECONDS)
        with contextlib.closing(Machine(device, tmp_path_factory.mktemp(device.kind))) as opened:
            yield opened


@pytest.fixture(scope="module")
def report(device: Device, machine: Machine) -> Report:
    """The file of a GPU stays; that of the CPU is thrown away with its runs."""
    return Report(REPORT if device.kind == "GPU" else machine.folder / "report.json", device)
