"""What hardware is here: replicas, workers, precision, XLA."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.eager import context

from job import startup
from job.config import Settings
from job.errors import ResourceUnavailable, UsageError

PEERS_SECONDS = 600.0  # a starting worker waits so long: a Job's back-off reaches 6 minutes
REGISTER_SECONDS = 10.0  # once all answer, TensorFlow connects them within milliseconds, if none was lost
HEARTBEAT_SECONDS = 15.0  # a host that vanished without a reset is given up after it
ANNOUNCE_SECONDS = 15.0
PARTING_SECONDS = 5.0  # workers that end together leave within milliseconds of each other

log = logging.getLogger("job")

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Cluster:
    """The devices that train together."""

    strategy: tf.distribute.Strategy
    devices: tuple[str, ...]  # of this worker, as people name them
    on_gpu: bool
    replicas: int  # over all workers
    workers: int = 1
    index: int = 0  # of this worker

    @property
    def is_chief(self) -> bool:
        """Whether this worker commits and writes for all."""
        return self.index == 0

    def any_worker(self, wish: bool) -> bool:
        """Whether some worker wishes it: the same answer on all, which all must ask for."""
        return wish if self.workers == 1 else bool(self._sum_of_workers(np.array([wish], np.int32))[0])

    def from_chief(self, data: bytes) -> bytes:
        """The chief's bytes, on all workers, which all must ask for."""
        if self.workers == 1:
            return data
        length = self.number_from_chief(len(data))
        mine = np.frombuffer(data, np.uint8) if self.is_chief else np.zeros(length)
        return self._sum_of_workers(mine.astype(np.int32)).astype(np.uint8).tobytes()

    def number_from_chief(self, value: int) -> int:
        """The chief's number, on all workers, which all must ask for."""
        if self.workers == 1:
            return value
        return int(self._sum_of_workers(np.array([value if self.is_chief else 0], np.int32))[0])

    def part(self) -> None:
        """Leave together after the last common act, which ends for some workers before it does for others.

        A worker that left at once would take what it still has to send along, and its peers would report a
        lost peer. Here they have all they need, so a failure means no more than that somebody has left.
        """
        if self.workers == 1:
            return
        with _silence():
            parting = threading.Thread(target=self._meet_for_the_last_time, daemon=True)
            parting.start()
            parting.join(PARTING_SECONDS)

    def _meet_for_the_last_time(self) -> None:
        with suppress(tf.errors.OpError):
            self.number_from_chief(0)

    def _sum_of_workers(self, values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        summed = _sum_function(self.strategy, self.replicas // self.workers)
        result: npt.NDArray[np.int32] = summed(tf.constant(values)).numpy()
        return result


@functools.cache
def _sum_function(strategy: tf.distribute.Strategy, replicas_of_worker: int) -> Any:
    """Sum a vector [N] over the workers, each counted once however many replicas it has."""

    def of_first_replica(values: tf.Tensor) -> tf.Tensor:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return values * tf.cast(tf.equal(replica % replicas_of_worker, 0), tf.int32)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def summed(values: tf.Tensor) -> tf.Tensor:
        each = strategy.run(of_first_replica, args=(values,))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None)

    return summed


def _is_address(host: str) -> bool:
    match = re.fullmatch(r"[^:]+:(\d+)", host)
    return match is not None and 0 < int(match[1]) < 1 << 16


@dataclass(frozen=True)
class WorkerGroup:
    """The processes that train one network together."""

    hosts: tuple[str, ...]  # host:port of each
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
        pattern, index = settings.worker_hosts or "", os.environ.get("JOB_COMPLETION_INDEX", "")
        if "{index}" in pattern:
            hosts = tuple(pattern.replace("{index}", str(number)) for number in range(settings.workers))
        else:
            hosts = tuple(pattern.split(","))
        if len(hosts) != settings.workers or not all(_is_address(host) for host in hosts):
            raise UsageError(
                f"--worker-hosts must give host:port of {settings.workers} workers, not {pattern!r}; "
                "example: --worker-hosts resnet-{index}.resnet:2222"
            )
        if not index.isdigit() or int(index) >= settings.workers:
            raise UsageError(
                f"JOB_COMPLETION_INDEX must be from 0 to {settings.workers - 1}, as --workers says, "
                f"not {index!r}; an Indexed Job sets it"
            )
        return cls(hosts, int(index))

    @classmethod
    def _from_tf_config(cls, text: str) -> WorkerGroup | None:
        try:
            config = json.loads(text)
            chiefs = config["cluster"].get("chief", [])
            hosts = (*chiefs, *config["cluster"].get("worker", []))
            task = config["task"]
            first = {"chief": 0, "worker": len(chiefs)}[task["type"]]
            index = first + int(task["index"])
            if not all(_is_address(host) for host in hosts):
                raise ValueError(f"its hosts must be host:port, not {', '.join(hosts)}")
            if not 0 <= index < len(hosts):
                raise ValueError(f"it has {len(hosts)} workers, and this task would be number {index}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"TF_CONFIG must name a cluster of workers and this task, but {error!r}; example: "
                '{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}'
            ) from error
        return cls(hosts, index) if len(hosts) > 1 else None


def connect(settings: Settings) -> Cluster:
    """Take every GPU (or ``--replicas`` of them), else logical CPU devices, and meet the other workers.

    One device needs no strategy. Must run before TensorFlow touches a device.

    Raises:
        ResourceUnavailable: ``--require-gpu`` and no GPU, or a peer did not come.
        UsageError: more replicas than GPUs, or an impossible group of workers.
    """
    kind, devices = _take_devices(settings)
    group = WorkerGroup.of(settings)
    if group is None:
        return _alone(kind, devices)
    return Cluster(
        _strategy_over_workers(group),
        devices,
        on_gpu=kind == "GPU",
        replicas=len(devices) * len(group.hosts),
        workers=len(group.hosts),
        index=group.index,
    )


def connect_alone(settings: Settings) -> Cluster:
    """The same without other workers, also where the environment names some. Raises as :func:`connect`."""
    return _alone(*_take_devices(settings))


def _alone(kind: str, devices: tuple[str, ...]) -> Cluster:
    strategy = local_strategy(kind, len(devices))
    return Cluster(strategy, devices, on_gpu=kind == "GPU", replicas=len(devices))


def _take_devices(settings: Settings) -> tuple[str, tuple[str, ...]]:
    """Kind and names of the devices that this process computes on."""
    gpus = tf.config.list_physical_devices("GPU")
    if settings.require_gpu and not gpus:
        raise ResourceUnavailable(
            "--require-gpu: TensorFlow sees no GPU on this machine; check the driver and the container's GPU "
            "access (docker run --gpus all; nvidia.com/gpu in a pod), or leave the option out to use the CPU"
        )
    return _take_gpus(gpus, settings.replicas) if gpus else _take_cpus(settings.replicas or 1)


def _take_gpus(gpus: list[tf.config.PhysicalDevice], replicas: int | None) -> tuple[str, tuple[str, ...]]:
    count = replicas or len(gpus)
    if count > len(gpus):
        raise UsageError(
            f"--replicas must not exceed the {len(gpus)} GPUs here, not {count}; example: --replicas 1"
        )
    tf.config.set_visible_devices(gpus[:count], "GPU")
    for gpu in gpus[:count]:
        tf.config.experimental.set_memory_growth(gpu, True)
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus[:count]]
    return "GPU", tuple(str(detail.get("device_name", "GPU")) for detail in details)


def _take_cpus(replicas: int) -> tuple[str, tuple[str, ...]]:
    physical = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(physical, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return "CPU", (cpu_name(),) * replicas


def local_strategy(kind: str, count: int) -> tf.distribute.Strategy:
    """Mirror over this process's first ``count`` devices of a kind; one device needs no strategy."""
    if count == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"{kind}:{index}" for index in range(count)])


def _strategy_over_workers(group: WorkerGroup) -> tf.distribute.Strategy:
    """Meet the peers and mirror over all their devices. Time-outs are set before: they cannot be later."""
    _meet(group)
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(group.hosts))],
        cluster_register_timeout_in_ms=int(REGISTER_SECONDS * 1000),
        heartbeat_timeout_in_ms=int(HEARTBEAT_SECONDS * 1000),
    )
    # Without it the chief would wait an hour for the devices of a peer that was lost after it had answered.
    context.context().coordination_service.cluster_register_with_barrier = True
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(group.hosts)}),
        task_type="worker",
        task_id=group.index,
        rpc_layer="grpc",
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except tf.errors.OpError as error:
        raise ResourceUnavailable(
            f"worker {group.index} lost a peer while they met: {error.message[:200]}"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what TensorFlow writes to standard error."""
    sys.stderr.flush()
    real, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        os.close(real)
        os.close(nowhere)


def _meet(group: WorkerGroup) -> None:
    """Wait until every peer's address answers.

    TensorFlow's own wait names nobody, knows no limit and holds Python's lock, so that no signal is heard in
    it (2.21). A peer answers from here on, by this listener first and by TensorFlow's server later.
    """
    deadline, announced = time.monotonic() + PEERS_SECONDS, time.monotonic()
    port = int(group.hosts[group.index].rsplit(":", 1)[1])
    with _listener(port) as listener:
        listener.setblocking(False)
        while missing := ", ".join(_unreachable(group)):
            if time.monotonic() > deadline:
                raise ResourceUnavailable(
                    f"worker {group.index} waited {PEERS_SECONDS:g} s for its peers, but misses {missing}; "
                    "check that their pods run and that a NetworkPolicy lets workers reach each other"
                )
            if time.monotonic() - announced > ANNOUNCE_SECONDS:
                announced = time.monotonic()
                log.warning("worker %d waits for its peers; missing: %s", group.index, missing)
            _hang_up(listener)
            time.sleep(0.5)


def _listener(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=128)
    except OSError as error:
        raise ResourceUnavailable(
            f"this worker's port {port} cannot be opened: {error.strerror}; end what uses it, or give "
            "--worker-hosts another"
        ) from error


def _hang_up(listener: socket.socket) -> None:
    """Drop the peers' calls: once the queue of a listener is full, it answers nobody any more."""
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()


def _unreachable(group: WorkerGroup) -> list[str]:
    return [
        f"worker {number} ({host})"
        for number, host in enumerate(group.hosts)
        if number != group.index and not _answers(host)
    ]


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def cpu_name() -> str:
    """The processor's name and the cores this process may use."""
    name = startup.processor_line("model name") or "CPU"
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} core{'s' * (cores > 1)}"


def resolve_precision(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], *, filters: int
) -> Precision:
    """Choose the fastest precision that the hardware computes natively, where "auto" leaves the choice.

    On CPUs only oneDNN computes in bfloat16, where it is in use; without it, bfloat16
    was 4 times slower than float32 (measured: 8 filters, AMD Zen 4).
    """
    if wanted != "auto":
        return wanted
    if gpus := tf.config.list_physical_devices("GPU"):
        major, _ = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"
    computes = {"avx512_bf16", "amx_bf16"} & startup.processor_flags()
    return "bfloat16" if computes and startup.fills_vectors(filters) else "float32"


def resolve_xla(wanted: Literal["auto", "on", "off"], cluster: Cluster, *, sync_batch_norm: bool) -> bool:
    """Whether forward and backward are compiled by XLA.

    Raises:
        UsageError: XLA cannot hold the collectives of synchronized batch normalization.
    """
    possible = cluster.replicas == 1 or not sync_batch_norm
    if wanted == "on" and not possible:
        raise UsageError(
            f"--xla on does not work with batch norm synchronized over {cluster.replicas} replicas; "
            "example: --xla on --no-sync-batch-norm"
        )
    return wanted == "on" or (wanted == "auto" and cluster.on_gpu and possible)


def look_for_devices() -> None:
    """Make TensorFlow look for devices now, with the notes that it writes about them."""
    tf.config.list_physical_devices()
