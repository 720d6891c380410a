"""Two workers on machines of their own, as far as one machine can: network namespaces joined by a switch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.durability import jobs
from tests.durability.jobs import Job
from tests.durability.outcome import Outcome
from tests.workers.groups import STEP_BY_STEP, TRAINING, Place

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PORT = 2222
HOSTS = "worker-{index}.train"  # as pods of a headless Service are named
LOST_SECONDS = 30.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Machine:
    """A network namespace with an address, and the names of all in a hosts file of its own."""

    name: str
    cable: str  # its end at the switch
    switch: str

    def plug(self, state: str) -> None:
        ip("-netns", self.switch, "link", "set", self.cable, state)


@dataclass(frozen=True)
class Addresses:
    """Of all machines, in one subnet."""

    prefix: str
    length: int
    options: tuple[str, ...] = ()

    def of(self, index: int) -> str:
        return f"{self.prefix}{index + 1}"


IPV4 = Addresses("10.77.0.", 24)
IPV6 = Addresses("fd77::", 64, ("nodad",))  # usable at once: nobody else can have them


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    with machines_with(IPV4) as made:
        yield made


@contextlib.contextmanager
def machines_with(addresses: Addresses) -> Iterator[list[Machine]]:
    """Two machines with addresses of one kind only, and names for them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 (apt-get install iproute2) to make network namespaces")
    with contextlib.ExitStack() as stack:
        try:
            remove_leftovers()
            made = build(f"job{os.getpid()}", addresses, stack)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the privilege to make network namespaces: {error.stderr.strip()}")
        yield made


def remove_leftovers() -> None:
    """Take down what a killed test process of this file has left."""
    for found in re.finditer(r"^job(\d+)-\w+", subprocess.getoutput("ip netns list"), re.MULTILINE):
        if not Path("/proc", found[1]).exists():
            ip("netns", "delete", found[0])
            shutil.rmtree(Path("/etc/netns", found[0]), ignore_errors=True)


def build(tag: str, addresses: Addresses, stack: contextlib.ExitStack) -> list[Machine]:
    """Make a switch, in a namespace too, and two machines at it; ``stack`` takes them down."""
    switch = f"{tag}-switch"
    namespace(switch, stack)
    ip("-netns", switch, "link", "add", "bridge", "type", "bridge")
    ip("-netns", switch, "link", "set", "bridge", "up")
    names = "".join(f"{addresses.of(index)} {HOSTS.format(index=index)}\n" for index in range(2))
    return [
        machine(tag, switch, index, addresses, f"127.0.0.1 localhost\n{names}", stack) for index in range(2)
    ]


def namespace(name: str, stack: contextlib.ExitStack) -> None:
    ip("netns", "add", name)
    stack.callback(ip, "netns", "delete", name)  # and its devices with it
    ip("-netns", name, "link", "set", "lo", "up")


def machine(
    tag: str, switch: str, index: int, addresses: Addresses, hosts: str, stack: contextlib.ExitStack
) -> Machine:
    name, cable = f"{tag}-{index}", f"cable{index}"
    namespace(name, stack)
    folder = Path("/etc/netns", name)  # `ip netns exec` lays its files over those of /etc
    folder.mkdir(parents=True)
    stack.callback(shutil.rmtree, folder)
    (folder / "hosts").write_text(hosts)
    ip("-netns", switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("-netns", switch, "link", "set", cable, "master", "bridge", "up")
    ip("-netns", name, "link", "set", "eth0", "up")
    address = f"{addresses.of(index)}/{addresses.length}"
    ip("-netns", name, "address", "add", address, "dev", "eth0", *addresses.options)
    return Machine(name, cable, switch)


def start(place: Place, machines: list[Machine], **spec: object) -> list[Job]:
    """Start a worker on each machine."""
    return [start_one(place, machine.name, index, spec) for index, machine in enumerate(machines)]


def start_one(place: Place, namespace: str, index: int, spec: dict[str, object]) -> Job:
    log = place.folder / f"{len(place.nursery.jobs)}.log"
    driver = ("-m", "tests.durability.driver", json.dumps(STEP_BY_STEP | spec))
    options = ("--workers", "2", "--worker-hosts", f"{HOSTS}:{PORT}", "--output", place.output)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, *driver, *TRAINING, *options],
            cwd=place.folder,
            env={**os.environ, "PYTHONPATH": str(jobs.ROOT), "JOB_COMPLETION_INDEX": str(index)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    job = Job(process.pid, log, process)
    place.nursery.jobs.append(job)  # which ends it if the test does not
    return job


def ports_in_use(pid: int) -> set[frozenset[int]]:
    """Return both ends' ports of every connection between the machines, as a process sees them."""
    lines = [line.split() for kind in ("tcp", "tcp6") for line in connections(pid, kind)]
    far = [line for line in lines if not line[2].partition(":")[0].endswith(("0100007F", "00000000"))]
    return {frozenset(int(end.rpartition(":")[2], 16) for end in line[1:3]) for line in far}


def connections(pid: int, kind: str) -> list[str]:
    return Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]


@pytest.mark.timeout(600)
def test_machines_that_lose_each_other_end_and_then_continue_to_the_same_bits(
    place: Place, machines: list[Machine], reference: Outcome
) -> None:
    chief, worker = start(place, machines, point="called", count=5)
    chief.wait_until_stopped()
    worker.wait_until_stopped()
    # The meeting, the coordination and the collectives' ring: all that a NetworkPolicy must let in.
    assert ports_in_use(chief.pid)
    assert all(PORT in ports for ports in ports_in_use(chief.pid) | ports_in_use(worker.pid))
    machines[1].plug("down")  # no reset comes: a machine that vanished
    started = time.monotonic()
    for job in (chief, worker):
        job.send(signal.SIGCONT)
    assert [chief.wait(), worker.wait()] == [69, 69], chief.text + worker.text
    assert time.monotonic() - started < LOST_SECONDS
    print(f"both ended {time.monotonic() - started:.1f} s after the cable was pulled")

    machines[1].plug("up")
    chief, worker = start(place, machines)
    assert [chief.wait(), worker.wait()] == [0, 0], chief.text + worker.text
    place.check_same(reference)


def test_machines_that_have_ipv6_only_meet_by_their_names_and_train_the_same_bits(
    place: Place, reference: Outcome
) -> None:
    with machines_with(IPV6) as machines:
        addresses = subprocess.getoutput(f"ip -netns {machines[0].name} -brief address show eth0")
        assert "fd77::1/64" in addresses
        assert "10.77" not in addresses
        chief, worker = start(place, machines)
        assert [chief.wait(), worker.wait()] == [0, 0], chief.text + worker.text
        place.check_same(reference)
