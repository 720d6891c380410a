"""What hardware is here: replicas, workers, precision, XLA."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tensorflow as tf

from job.config import Settings
from job.errors import ResourceUnavailable, UsageError

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


def connect(settings: Settings) -> Cluster:
    """Take every GPU (or ``--replicas`` of them), else logical CPU devices.

    One device needs no strategy. Must run before TensorFlow touches a device.

    Raises:
        ResourceUnavailable: ``--require-gpu`` and no GPU.
        UsageError: more replicas than GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if settings.require_gpu and not gpus:
        raise ResourceUnavailable(
            "--require-gpu: TensorFlow sees no GPU on this machine; check the driver, the "
            "container's GPU access "
            "(docker run --gpus all; nvidia.com/gpu in a pod), or leave the option out to train on the CPU"
        )
    return _on_gpus(gpus, settings.replicas) if gpus else _on_cpus(settings.replicas or 1)


def _on_gpus(gpus: list[tf.config.PhysicalDevice], replicas: int | None) -> Cluster:
    count = replicas or len(gpus)
    if count > len(gpus):
        raise UsageError(
            f"--replicas must not exceed the {len(gpus)} GPUs here, not {count}; example: --replicas 1"
        )
    tf.config.set_visible_devices(gpus[:count], "GPU")
    for gpu in gpus[:count]:
        tf.config.experimental.set_memory_growth(gpu, True)
    names = tuple(
        str(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name))
        for gpu in gpus[:count]
    )
    return Cluster(local_strategy("GPU", count), names, on_gpu=True, replicas=count)


def _on_cpus(replicas: int) -> Cluster:
    physical = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(physical, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return Cluster(local_strategy("CPU", replicas), (cpu_name(),) * replicas, on_gpu=False, replicas=replicas)


def local_strategy(kind: str, count: int) -> tf.distribute.Strategy:
    """Mirror over this process's first ``count`` devices of a kind; one device needs no strategy."""
    if count == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"{kind}:{index}" for index in range(count)])


def cpu_name() -> str:
    """The processor's name and the cores this process may use."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def resolve_precision(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], cluster: Cluster
) -> Precision:
    """Choose the fastest precision that the hardware computes natively, where "auto" leaves the choice."""
    if wanted != "auto":
        return wanted
    if cluster.on_gpu:
        gpu = tf.config.get_visible_devices("GPU")[0]
        major, _ = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
        return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "").split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


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
