"""Several devices in each of several workers. Where GPUs are meant, TensorFlow's list of them is stubbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.durability.jobs import ROOT
from tests.workers.groups import free_ports

pytestmark = pytest.mark.slow

TRAIN = ("train", "--data", "sample", "--blocks", "1", "--filters", "16", "--workers", "2")


def run_two(folder: Path, *commands: Sequence[str]) -> list[tuple[int, str]]:
    """Exit code and output of both workers."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command, "--worker-hosts", hosts, "--log-format", "plain"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        texts = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def with_stubbed_gpus(count: int) -> tuple[str, ...]:
    return ("tests.workers.stubbed_gpus", str(count), *TRAIN)


def with_logical_cpus(count: int) -> tuple[str, ...]:
    spec = {"kind": "CPU", "devices": count, "memory_mb": 0}
    return ("tests.gpu.carved", json.dumps(spec), *TRAIN, "--replicas", str(count))


def test_two_workers_with_two_cpu_devices_each_are_refused(tmp_path: Path) -> None:
    command = ("job", *TRAIN, "--replicas", "2")
    for code, text in run_two(tmp_path, command, command):
        assert code == 2
        assert "--replicas must be 1 where 2 workers compute on CPUs, not 2" in text
        assert "example: --workers 4 --replicas 1" in text


def test_two_workers_with_two_stubbed_gpus_each_train_on_four_devices(tmp_path: Path) -> None:
    command = with_stubbed_gpus(2)
    for index, (code, text) in enumerate(run_two(tmp_path, command, command)):
        assert code == 0, text
        place = f"/job:worker/replica:0/task:{index}/device:GPU"
        assert f"4 replicas, here {place}:0 {place}:1\n" in text


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_two_workers_with_unequal_stubbed_gpus_end_alike(tmp_path: Path, counts: tuple[int, int]) -> None:
    for code, text in run_two(tmp_path, *map(with_stubbed_gpus, counts)):
        assert code == 73, text
        assert "all workers must have equally many devices of one kind, but worker 0 has " in text
        for index, count in enumerate(counts):
            assert f"worker {index} has {count} x GPU (stubbed A100, compute capability 8.0)" in text


def test_two_workers_with_unequal_logical_cpus_end_alike(tmp_path: Path) -> None:
    for code, text in run_two(tmp_path, with_logical_cpus(2), with_logical_cpus(1)):
        assert code == 73, text
        assert "worker 0 has 2 x CPU (" in text
        assert "worker 1 has 1 x CPU (" in text
        assert "or the same --replicas" in text
    assert not list(tmp_path.glob("runs/*/record-*"))


def test_a_worker_with_a_stubbed_gpu_and_one_without_end_alike(tmp_path: Path) -> None:
    for code, text in run_two(tmp_path, with_stubbed_gpus(1), with_logical_cpus(1)):
        assert code == 73, text
        assert "worker 0 has 1 x GPU (" in text
        assert "worker 1 has 1 x CPU (" in text
