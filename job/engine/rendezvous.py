"""The processes that train one network: their addresses, how they meet, and the strategy over them all."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.eager import context

from job.domain.errors import ResourceUnavailable, UsageError
from job.domain.settings import Settings
from job.engine.devices import Devices

PEERS_SECONDS = 600.0  # a starting worker waits so long: a Job's back-off reaches 6 minutes
LOOK_SECONDS = 0.2  # between two looks at all peers
LINGER_SECONDS = 1.0  # who is ready goes on answering, so that all peers hear it
LOOKING, FOUND_ALL = b"0", b"1"  # a worker's answers to a call
REGISTER_SECONDS = 10.0  # once all are ready, TensorFlow connects them within milliseconds, if none was lost
HEARTBEAT_SECONDS = 15.0  # a host that vanished without a reset is given up after it
ANNOUNCE_SECONDS = 15.0
ROLES = ("chief", "worker")  # of TF_CONFIG, in the order of their numbers

log = logging.getLogger("job")


@dataclass(frozen=True)
class WorkerGroup:
    """The processes that train one network together."""

    hosts: tuple[str, ...]  # host:port of each; an IPv6 address in brackets
    index: int  # of this one; 0 is the chief

    @classmethod
    def of(cls, settings: Settings) -> WorkerGroup | None:
        """From TF_CONFIG, or from the settings and the index that an Indexed Job gives; None for one worker.

        Raises:
            UsageError: the hosts or the index are missing or contradict the number of workers.
        """
        if text := os.environ.get("TF_CONFIG"):
            return cls._from_tf_config(text)
        if settings.workers == 1:
            if "," in (settings.worker_hosts or ""):
                raise UsageError(
                    f"--worker-hosts {settings.worker_hosts} needs --workers of 2 or more, not 1; "
                    "example: --workers 2 --worker-hosts a:2222,b:2222"
                )
            return None
        return cls(_hosts(settings.worker_hosts or "", settings.workers), _index(settings.workers))

    @classmethod
    def _from_tf_config(cls, text: str) -> WorkerGroup | None:
        try:
            config = json.loads(text)
            members: dict[str, list[str]] = config["cluster"]
            role, number = config["task"]["type"], int(config["task"]["index"])
            _check_roles([*members, role])
            chiefs, workers = (members.get(name, []) for name in ROLES)
            hosts = tuple(host.strip() for host in (*chiefs, *workers))
            index = number if role == "chief" else len(chiefs) + number
            if not all(_is_address(host) for host in hosts):
                raise ValueError(f"its hosts must be host:port, not {', '.join(hosts)}")
            if not 0 <= number < len(members.get(role, [])):
                raise ValueError(f"it has no {role} of number {number}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"TF_CONFIG must name a cluster of workers and this task, but {error!r}; example: "
                '{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}'
            ) from error
        return cls(hosts, index) if len(hosts) > 1 else None


def _check_roles(roles: list[str]) -> None:
    for role in roles:
        if role not in ROLES:
            raise UsageError(
                f"TF_CONFIG must give the roles chief and worker only, not {role!r}: each worker of this job "
                "trains and evaluates, and no server holds parameters; remove that role from the cluster"
            )


def _hosts(pattern: str, workers: int) -> tuple[str, ...]:
    if "{index}" in pattern:
        hosts = [pattern.strip().replace("{index}", str(number)) for number in range(workers)]
    else:
        hosts = [host.strip() for host in pattern.split(",")]
    if len(hosts) != workers or not all(map(_is_address, hosts)):
        raise UsageError(
            f"--worker-hosts must give host:port of {workers} workers, not {pattern!r}; examples: "
            "--worker-hosts resnet-{index}.resnet:2222, --worker-hosts [fd00::1]:2222,[fd00::2]:2222"
        )
    return tuple(hosts)


def _index(workers: int) -> int:
    text = os.environ.get("JOB_COMPLETION_INDEX", "")
    if not text.isdecimal() or int(text) >= workers:
        raise UsageError(
            f"JOB_COMPLETION_INDEX must be from 0 to {workers - 1}, as --workers says, "
            f"not {text!r}; an Indexed Job sets it"
        )
    return int(text)


def _is_address(text: str) -> bool:
    try:
        _parse_address(text)
    except ValueError:
        return False
    return True


def _parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``name:2222``, ``10.0.0.1:2222`` or ``[fd00::1]:2222``. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 1 << 16:
        raise ValueError(f"{text!r} is not host:port")
    (match[2] or "").encode("idna")  # as it is looked up: no part is empty or longer than 63 characters
    return match[1] or match[2], int(match[3])


def strategy_over(group: WorkerGroup, devices: Devices) -> tf.distribute.Strategy:
    """Meet the peers and mirror over the devices of all. Time-outs are set before: they cannot be later.

    Raises:
        ResourceUnavailable: a peer did not come, or was lost while they met.
    """
    meet(group)
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(group.hosts))],
        cluster_register_timeout_in_ms=int(REGISTER_SECONDS * 1000),
        heartbeat_timeout_in_ms=int(HEARTBEAT_SECONDS * 1000),
    )
    # Without it the chief would wait an hour for the devices of a peer that was lost after it had answered.
    context.context().coordination_service.cluster_register_with_barrier = True
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(
            _resolver(group, devices),
            # What TensorFlow's AUTO means for GPUs, too. It needs the workers' one port; NCCL, which is
            # faster between GPUs, opens ports that no NetworkPolicy can name.
            tf.distribute.experimental.CommunicationOptions(
                implementation=tf.distribute.experimental.CommunicationImplementation.RING
            ),
        )
    except tf.errors.OpError as error:
        raise ResourceUnavailable(
            f"worker {group.index} lost a peer while they met: {error.message[:200]}"
        ) from error


def _resolver(group: WorkerGroup, devices: Devices) -> tf.distribute.cluster_resolver.ClusterResolver:
    """Workers and their devices; without a number of GPUs TensorFlow takes one CPU device a worker."""
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(group.hosts)}),
        task_type="worker",
        task_id=group.index,
        num_accelerators={"GPU": len(devices.names)} if devices.kind == "GPU" else {},
        rpc_layer="grpc",
    )


def tell_all(group: WorkerGroup, topic: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Every worker's message, in the order of their numbers, by the service that coordinates them.

    It needs no devices, so that workers of different devices can talk, too. A topic can be used once.

    Raises:
        ResourceUnavailable: a peer was lost meanwhile.
    """
    service = context.context()
    try:
        service.set_config_key_value(f"job/{topic}/{group.index}", json.dumps(message))
        return [
            json.loads(service.get_config_key_value(f"job/{topic}/{number}", int(HEARTBEAT_SECONDS * 2000)))
            for number in range(len(group.hosts))
        ]
    except tf.errors.OpError as error:
        raise ResourceUnavailable(
            f"worker {group.index} lost a peer while they compared devices: {error.message[:200]}"
        ) from error


def wait_for_all(barrier: str, seconds: float) -> None:
    """Wait until every worker waits there, too, at most so long; a peer that has left is no error."""
    with suppress(tf.errors.OpError):
        context.context().wait_at_barrier(barrier, int(seconds * 1000))


def meet(group: WorkerGroup) -> None:
    """Wait until every worker has found every other.

    TensorFlow's own wait names nobody, knows no limit and holds Python's lock, so that no signal is heard in
    it (2.21), and it ends ``REGISTER_SECONDS`` after the first worker has come. So a worker that has found
    all of its peers stays until they have found theirs: a name service may remember for half a minute that
    one of them was not there.

    Raises:
        ResourceUnavailable: a peer did not come within ``PEERS_SECONDS``, or the port is taken.
    """
    deadline, announced = time.monotonic() + PEERS_SECONDS, time.monotonic()
    answers: dict[int, bytes | None] = {}
    with _answering(_parse_address(group.hosts[group.index])[1]) as found_all:
        while missing := ", ".join(not_ready(group, answers, found_all)):
            if time.monotonic() > deadline:
                raise ResourceUnavailable(
                    f"worker {group.index} waited {PEERS_SECONDS:g} s for its peers, but misses {missing}; "
                    "check that their pods run and that a NetworkPolicy lets workers reach each other"
                )
            if time.monotonic() - announced > ANNOUNCE_SECONDS:
                announced = time.monotonic()
                log.warning("worker %d waits for its peers; missing: %s", group.index, missing)
            time.sleep(LOOK_SECONDS)
        time.sleep(LINGER_SECONDS)


def not_ready(group: WorkerGroup, answers: dict[int, bytes | None], found_all: threading.Event) -> list[str]:
    """Number and address of every peer that does not answer, or still looks for peers of its own.

    ``answers`` keeps what each has said. Who was ready and does not answer is on the way to TensorFlow's
    server, which says something else, and is ready, too.
    """
    peers = {number: host for number, host in enumerate(group.hosts) if number != group.index}
    for number, host in peers.items():
        answer = _answer_of(host)
        if answer is not None or answers.get(number) == LOOKING:
            answers[number] = answer
    if all(answers.get(number) is not None for number in peers):
        found_all.set()
    silent = [f"worker {number} ({host})" for number, host in peers.items() if answers.get(number) is None]
    looking = [
        f"worker {number} ({host}), which misses others"
        for number, host in peers.items()
        if answers.get(number) == LOOKING
    ]
    return silent or looking  # those that look miss the silent ones, too


def _answer_of(address: str) -> bytes | None:
    """The first byte that a peer says, or None."""
    try:
        with socket.create_connection(_parse_address(address), timeout=2) as call:
            return call.recv(1) or None
    except OSError:
        return None


@contextmanager
def _answering(port: int) -> Iterator[threading.Event]:
    """Say to everyone who calls whether this worker has found all its peers: the event tells."""
    found_all = threading.Event()

    def answer() -> None:
        with suppress(OSError):  # no listener any more
            while True:
                with listener.accept()[0] as call, suppress(OSError):
                    call.sendall(FOUND_ALL if found_all.is_set() else LOOKING)

    with _listener(port) as listener:
        thread = threading.Thread(target=answer, name="meeting", daemon=True)
        thread.start()
        try:
            yield found_all
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # closing alone wakes no thread that waits for a call
            thread.join()


def _listener(port: int) -> socket.socket:
    """Listen on every address of this host, IPv4 and IPv6, as TensorFlow's server will."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        raise ResourceUnavailable(
            f"this worker's port {port} cannot be opened: {error.strerror}; end what uses it, or give "
            "--worker-hosts another"
        ) from error
