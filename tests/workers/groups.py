"""The workers of one network as real processes, started as an Indexed Job would start them."""

from __future__ import annotations

import itertools
import random
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from job.domain.record import Record
from job.run.reader import read_record
from job.store.contract import Store
from tests.durability.driver import FILTERS
from tests.durability.jobs import Job, Nursery
from tests.durability.outcome import Outcome, check_same_outcome, outcome

TRAINING = (
    *("train", "--data", "sample", "--blocks", "1", "--filters", str(FILTERS), "--epochs", "2"),
    *("--commit-every", "3steps", "--log-format", "plain", "--name", "run"),
)
STEP_BY_STEP = {"point": "never"}  # the driver's: stop nowhere, with one step in a call


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


def has_ipv6() -> bool:
    """Whether this host has its own address in IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@dataclass
class Group:
    """The workers of one network, on this host. Each is begun by itself."""

    nursery: Nursery
    folder: Path
    workers: int
    options: tuple[str, ...]
    jobs: dict[int, Job] = field(default_factory=dict)  # by index; 0 is the chief

    def __post_init__(self) -> None:
        self.hosts = [f"127.0.0.1:{port}" for port in free_ports(self.workers)]

    def begin(self, index: int, **spec: Any) -> Job:
        """Start one worker; ``spec`` is the driver's."""
        hosts = ("--workers", str(self.workers), "--worker-hosts", ",".join(self.hosts))
        self.nursery.environment["JOB_COMPLETION_INDEX"] = str(index)
        self.jobs[index] = self.nursery.start(
            *TRAINING, *hosts, *self.options, cwd=self.folder, spec=STEP_BY_STEP | spec
        )
        return self.jobs[index]

    def wait(self) -> list[int]:
        """Return all exit codes."""
        return [self.jobs[index].wait() for index in sorted(self.jobs)]

    def interrupt(self, index: int) -> None:
        """Signal a worker that has stopped at its point, and let it go on."""
        self.jobs[index].wait_until_stopped()
        self.jobs[index].send(signal.SIGTERM)
        self.jobs[index].send(signal.SIGCONT)

    @property
    def text(self) -> str:
        """What all workers have said, for a failure's message."""
        return "\n".join(f"--- worker {index}\n{job.text}" for index, job in sorted(self.jobs.items()))


@dataclass
class Place:
    """Where one run lives, and how to start workers on it."""

    nursery: Nursery
    output: str
    folder: Path
    store: Store

    def group(self, workers: int, *options: str) -> Group:
        """Workers that are still to be begun."""
        return Group(self.nursery, self.folder, workers, ("--output", self.output, *options))

    def start(self, workers: int, *options: str, stop: dict[int, dict[str, Any]] | None = None) -> Group:
        """Begin all workers, some of which stop at a point."""
        group = self.group(workers, *options)
        for index in range(workers):
            group.begin(index, **(stop or {}).get(index, {}))
        return group

    def finish(self, workers: int, *options: str) -> None:
        """Let a group run to its end."""
        group = self.start(workers, *options)
        assert group.wait() == [0] * workers, group.text

    def alone(self, *options: str, **spec: Any) -> Job:
        """Start one process without peers."""
        options = ("--output", self.output, *options)
        return self.nursery.start(*TRAINING, *options, cwd=self.folder, spec=STEP_BY_STEP | spec)

    @property
    def record(self) -> Record:
        return read_record(self.store)

    @property
    def outcome(self) -> Outcome:
        return outcome(self.store)

    def check_same(self, reference: Outcome) -> None:
        check_same_outcome(self.store, reference)


def of_one_process(reference: Outcome, replicas: int) -> Outcome:
    """Return the outcome of as many replicas in one process: it says so, and is the same otherwise."""
    devices = reference.result["devices"][:1] * replicas
    result = {**reference.result, "devices": devices, "workers": 1, "replicas": replicas}
    return replace(reference, result=result)


def losses(record: Record) -> list[list[float]]:
    """Return training and validation loss of each epoch."""
    return [[entry[part]["loss"] for part in ("train", "validation")] for entry in record.history]


def counted(confusion: Iterable[Iterable[int]]) -> int:
    """Return the images that were evaluated."""
    return sum(sum(row) for row in confusion)
