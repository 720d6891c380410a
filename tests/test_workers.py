"""Several worker processes that train one network: real ones, on loopback, ended in every way."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from job import cluster, portable
from job.checkpoints import Record
from job.config import Settings
from job.errors import UsageError
from tests.support import assert_same_state

ROOT = Path(__file__).parents[1]
TINY = ["--data", "sample", "--blocks", "1,1", "--filters", "8", "--log-format", "plain"]
slow = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    """Below the range that the kernel gives to outgoing connections, so that nobody takes them meanwhile."""
    candidates = random.sample(range(20_000, 32_000), 100)
    return list(itertools.islice(filter(is_free, candidates), count))


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    for process in Group.started:
        process.kill()
        process.wait()
    Group.started.clear()


class Group:
    """The workers of one network, as an Indexed Job would start them."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, workers: int, *options: str, name: str = "run") -> None:
        hosts = ",".join(f"127.0.0.1:{port}" for port in free_ports(workers))
        self.name = name
        self.processes = [self._start(index, workers, hosts, options) for index in range(workers)]
        self.started.extend(self.processes)

    def _start(
        self, index: int, workers: int, hosts: str, options: tuple[str, ...]
    ) -> subprocess.Popen[bytes]:
        with Path(f"{self.name}-{index}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "job", "train", *TINY, "--name", self.name, *options],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "JOB_WORKERS": str(workers),
                    "JOB_WORKER_HOSTS": hosts,
                    "JOB_COMPLETION_INDEX": str(index),
                },
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def wait(self, timeout: float = 200) -> list[int]:
        deadline = time.monotonic() + timeout
        return [process.wait(max(1, deadline - time.monotonic())) for process in self.processes]

    def wait_for_epoch(self) -> None:
        deadline = time.monotonic() + 120
        while not (Path("runs", self.name, "record.json").exists() and record(self.name).history):
            assert time.monotonic() < deadline, "no epoch in time"
            assert all(process.poll() is None for process in self.processes), self.text()
            time.sleep(0.1)

    def text(self) -> str:
        """What all workers have said, for a failure's message."""
        return "\n".join(path.read_text() for path in sorted(Path().glob(f"{self.name}-*.log")))


def record(name: str) -> Record:
    return Record.from_bytes(Path("runs", name, "record.json").read_bytes(), name)


def losses(name: str) -> list[tuple[float, float]]:
    return [(entry["train"]["loss"], entry["validation"]["loss"]) for entry in record(name).history]


def state(name: str) -> portable.State:
    return portable.load(Path("runs", name, record(name).commits[0].name))


def mirrored(replicas: int, *options: str) -> None:
    command = [sys.executable, "-m", "job", "train", *TINY, "--name", "mirrored", *options]
    subprocess.run(
        [*command, "--replicas", str(replicas)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )


@slow
def test_two_workers_end_with_the_bits_of_two_replicas_also_after_a_signal_to_either() -> None:
    mirrored(2, "--epochs", "30")
    for name, victim in (("term-worker", 1), ("term-chief", 0)):
        group = Group(2, "--epochs", "30", name=name)
        group.wait_for_epoch()
        group.processes[victim].send_signal(signal.SIGTERM)
        assert group.wait(60) == [75, 75]
        assert record(name).state == "interrupted"
        assert record(name).attempt == 1
        assert Group(2, "--epochs", "30", name=name).wait() == [0, 0]
        assert losses(name) == losses("mirrored")
        assert_same_state(state(name), state("mirrored"))


@slow
@pytest.mark.parametrize("victim", [0, 1], ids=["chief", "worker"])
def test_a_killed_worker_takes_the_group_down_and_the_group_continues(victim: int) -> None:
    group = Group(2, "--epochs", "40")
    group.wait_for_epoch()
    group.processes[victim].kill()
    started = time.monotonic()
    codes = group.wait(60)
    assert time.monotonic() - started < 30
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 69
    assert "lost a peer" in Path(f"run-{1 - victim}.log").read_text()
    done = len(record("run").history)
    assert 1 <= done < 40
    epochs = str(done + 1)
    assert Group(2, "--epochs", epochs).wait() == [0, 0]
    mirrored(2, "--epochs", epochs)
    assert losses("run") == losses("mirrored")
    assert_same_state(state("run"), state("mirrored"))


@slow
def test_three_workers_follow_the_curve_of_three_replicas() -> None:
    options = ("--holdout", "10", "--batch-size", "198", "--epochs", "1")  # 5 steps of 3 x 66 images
    assert Group(3, *options).wait() == [0, 0, 0]
    mirrored(3, *options)
    np.testing.assert_allclose(losses("run"), losses("mirrored"), rtol=1e-5)
    assert record("run").commits[0].progress.step == 5
    # The finished run says so on every worker, also with another number of them.
    assert Group(2, "--holdout", "10", "--batch-size", "198", "--epochs", "1").wait() == [0, 0]


@slow
def test_a_missing_peer_is_named() -> None:
    program = (
        "import sys; from job import startup; startup.set_environment(); from job import cluster, cli; "
        "cluster.PEERS_SECONDS = 6.0; cluster.ANNOUNCE_SECONDS = 1.0; cli.main()"
    )
    mine, absent = free_ports(2)
    result = subprocess.run(
        [sys.executable, "-c", program, "train", *TINY],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JOB_WORKERS": "2",
            "JOB_WORKER_HOSTS": f"127.0.0.1:{mine},127.0.0.1:{absent}",
            "JOB_COMPLETION_INDEX": "0",
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 69, result.stderr
    assert f"worker 1 (127.0.0.1:{absent})" in result.stderr


def group_of(
    monkeypatch: pytest.MonkeyPatch, index: str = "1", **settings: Any
) -> cluster.WorkerGroup | None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    return cluster.WorkerGroup.of(Settings(**settings))


def test_a_host_pattern_gives_each_workers_address(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(monkeypatch, workers=2, worker_hosts="resnet-{index}.resnet:2222")
    assert group == cluster.WorkerGroup(("resnet-0.resnet:2222", "resnet-1.resnet:2222"), 1)
    assert group_of(monkeypatch) is None


def test_tf_config_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert group_of(monkeypatch) == cluster.WorkerGroup(("a:1", "b:1"), 1)
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(UsageError, match="TF_CONFIG must name a cluster"):
        group_of(monkeypatch)


@pytest.mark.parametrize(
    ("index", "hosts", "message"),
    [
        ("0", "a:1,b:1,c:1", r"host:port of 2 workers, not 'a:1,b:1,c:1'"),
        ("0", "a,b", r"host:port of 2 workers, not 'a,b'"),
        ("2", "a:1,b:1", r"JOB_COMPLETION_INDEX must be from 0 to 1.*not '2'"),
    ],
)
def test_impossible_groups_are_refused(
    monkeypatch: pytest.MonkeyPatch, index: str, hosts: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        group_of(monkeypatch, index, workers=2, worker_hosts=hosts)
