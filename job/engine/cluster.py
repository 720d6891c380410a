"""The devices that train together, over all workers, and what the workers tell each other."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.domain.errors import IdentityConflict, ResourceUnavailable, UsageError
from job.domain.settings import Settings
from job.engine import rendezvous
from job.engine.devices import Devices, check_strategy, local_strategy, take_devices
from job.engine.rendezvous import WorkerGroup
from job.engine.startup import silence

LEAVING_SECONDS = 5.0  # workers that end together leave within milliseconds of each other


@dataclass(frozen=True)
class Cluster:
    """The devices that train together."""

    strategy: tf.distribute.Strategy
    devices: tuple[str, ...]  # of this worker, as people name them
    on_gpu: bool
    workers: int = 1
    index: int = 0  # of this worker

    @property
    def replicas(self) -> int:
        """Over all workers, as the strategy counts them."""
        count: int = self.strategy.num_replicas_in_sync
        return count

    @property
    def is_chief(self) -> bool:
        """Whether this worker commits and writes for all."""
        return self.index == 0

    def any_worker(self, wish: bool) -> bool:
        """Whether some worker wishes it: the same answer on all, which all must ask for."""
        return wish if self.workers == 1 else bool(self._sum_over_workers(np.array([wish], np.int64))[0])

    def from_chief(self, data: bytes) -> bytes:
        """The chief's bytes, on all workers, which all must ask for."""
        if self.workers == 1:
            return data
        length = self.number_from_chief(len(data))
        mine = np.frombuffer(data, np.uint8) if self.is_chief else np.zeros(length)
        return self._sum_over_workers(mine.astype(np.int64)).astype(np.uint8).tobytes()

    def number_from_chief(self, value: int) -> int:
        """The chief's number, on all workers, which all must ask for."""
        if self.workers == 1:
            return value
        return int(self._sum_over_workers(np.array([value if self.is_chief else 0], np.int64))[0])

    def wait_for_chief(self, *, or_leave: bool) -> None:
        """Wait until the chief has done its last act; all workers must, and the chief, too.

        ``or_leave``: it is no error here if a worker is lost meanwhile.

        Raises:
            ResourceUnavailable: the chief has ended without it.
        """
        try:
            done = self.number_from_chief(1)  # in leave_together it is 0
        except tf.errors.OpError:
            if or_leave:
                return
            raise
        if not done and not or_leave:
            raise ResourceUnavailable(f"worker {self.index}: worker 0 has ended; its log says why")

    def leave_together(self) -> None:
        """Wait for all workers after the last common act, which ends for some before it does for others.

        A worker that left at once would take what it still has to send along, and its peers would report a
        lost peer. Here they have all they need, so a failure means no more than that somebody has left.
        """
        if self.workers > 1:
            _in_silence(lambda: self.number_from_chief(0))

    def _sum_over_workers(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        summed = _sum_function(self.strategy, self.replicas // self.workers)
        result: npt.NDArray[np.int64] = summed(tf.constant(values)).numpy()
        return result


def _in_silence(last_act: Callable[[], Any]) -> None:
    """Do it for at most ``LEAVING_SECONDS``; neither its failure nor TensorFlow's notes matter any more."""

    def act() -> None:
        with suppress(tf.errors.OpError):
            last_act()

    with silence():
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(LEAVING_SECONDS)


@functools.cache
def _sum_function(strategy: tf.distribute.Strategy, replicas_of_worker: int) -> Any:
    """Sum a vector [N] over the workers, each counted once however many replicas it has.

    In int64: TensorFlow adds int32 on the host only, and the ring of GPUs would hand it their memory.
    """

    def of_first_replica(values: tf.Tensor) -> tf.Tensor:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return values * tf.cast(tf.equal(replica % replicas_of_worker, 0), tf.int64)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def summed(values: tf.Tensor) -> tf.Tensor:
        each = strategy.run(of_first_replica, args=(values,))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None)

    return summed


def connect(settings: Settings) -> Cluster:
    """Take every GPU (or ``--replicas`` of them), else logical CPU devices, and meet the other workers.

    Must run before TensorFlow touches a device.

    Raises:
        ResourceUnavailable: ``--require-gpu`` and no GPU, a peer did not come, or TensorFlow computes on
            other devices than those.
        UsageError: more replicas than GPUs, or an impossible group of workers.
        IdentityConflict: the workers have different devices.
    """
    group = WorkerGroup.of(settings)
    if group is None:
        return connect_alone(settings)
    workers = len(group.hosts)
    devices = take_devices(settings, workers=workers)
    strategy = rendezvous.strategy_over(group, devices)
    check_strategy(strategy, devices, workers=workers)
    _check_same_devices(group, devices)
    return Cluster(strategy, devices.names, devices.kind == "GPU", workers, group.index)


def connect_alone(settings: Settings) -> Cluster:
    """The same without other workers, also where the environment names some. Raises as :func:`connect`."""
    devices = take_devices(settings, workers=settings.workers)
    strategy = local_strategy(devices)
    check_strategy(strategy, devices)
    return Cluster(strategy, devices.names, devices.kind == "GPU")


def _check_same_devices(group: WorkerGroup, devices: Devices) -> None:
    """Compare the workers' devices before they share a batch: TensorFlow takes it for granted.

    Raises:
        IdentityConflict: on all workers, if some have other devices than the chief.
    """
    told = rendezvous.tell_all(group, "devices", {**devices.to_json(), "text": str(devices)})
    texts = [one.pop("text") for one in told]
    others = [number for number, one in enumerate(told) if one != told[0]]
    if not others:
        return
    _in_silence(lambda: rendezvous.wait_for_all("job/unequal devices", LEAVING_SECONDS))
    raise IdentityConflict(
        f"all workers must have equally many devices of one kind, but worker 0 has {texts[0]} and worker "
        f"{others[0]} has {texts[others[0]]}; give each worker the same GPUs, or the same --replicas"
    )


def use_determinism(wanted: bool | None, cluster: Cluster) -> None:
    """Let TensorFlow compute the same bits each time, where that is wanted; by default on CPUs alone."""
    if wanted or (wanted is None and not cluster.on_gpu):
        tf.config.experimental.enable_op_determinism()


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
