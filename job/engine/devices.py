"""Which devices this process computes on, and in which precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from job.domain.errors import ResourceUnavailable, UsageError
from job.domain.settings import Settings
from job.engine import startup

log = logging.getLogger("job")

DRIVER = "/proc/driver/nvidia/version"  # exists where NVIDIA's driver is loaded
NEEDS = (
    "check the driver, the container's GPU access (docker run --gpus all; nvidia.com/gpu in a pod), and "
    "CUDA's libraries (the image has them; else pip install --no-deps -r requirements/gpu.lock)"
)
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Devices:
    """The devices of this process, all of one kind."""

    kind: Literal["GPU", "CPU"]
    names: tuple[str, ...]  # as people name them, one a device
    capabilities: tuple[str, ...] = ()  # of GPUs: the distinct compute capabilities, as in "9.0"

    @property
    def addresses(self) -> tuple[str, ...]:
        """As TensorFlow numbers them: GPU:0, GPU:1."""
        return tuple(f"{self.kind}:{index}" for index in range(len(self.names)))

    def to_json(self) -> dict[str, Any]:
        """What all workers must have alike."""
        return {"kind": self.kind, "count": len(self.names), "capabilities": list(self.capabilities)}

    def __str__(self) -> str:
        capability = f", compute capability {' and '.join(self.capabilities)}" if self.capabilities else ""
        return f"{len(self.names)} x {self.kind} ({'; '.join(dict.fromkeys(self.names))}{capability})"


def take_devices(settings: Settings, *, workers: int = 1) -> Devices:
    """Every GPU or the first ``--replicas`` of them; without a GPU, logical CPU devices.

    Must run before TensorFlow touches a device.

    Raises:
        ResourceUnavailable: ``--require-gpu`` and no GPU.
        UsageError: more replicas than GPUs, or several CPU devices in each of several workers.
    """
    gpus = gpus_of(settings)
    if gpus:
        return _take_gpus(gpus)
    if settings.require_gpu:
        raise ResourceUnavailable(
            f"--require-gpu: TensorFlow sees no GPU on this machine; {NEEDS}, or leave the option out to use "
            "the CPU"
        )
    if os.path.exists(DRIVER) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        log.warning("TensorFlow sees no GPU, though NVIDIA's driver is here; to use one, %s", NEEDS)
    replicas = settings.replicas or 1
    if workers > 1 and replicas > 1:
        raise UsageError(
            f"--replicas must be 1 where {workers} workers compute on CPUs, not {replicas}: TensorFlow gives "
            "each worker one CPU device, which uses all cores; example: --workers "
            f"{workers * replicas} --replicas 1"
        )
    return _take_cpus(replicas)


def gpus_of(settings: Settings) -> list[Any]:
    """The physical GPUs that these settings use: all, or the first ``--replicas``.

    Raises:
        UsageError: there are GPUs, but fewer than ``--replicas``.
    """
    gpus: list[Any] = tf.config.list_physical_devices("GPU")
    count = settings.replicas or len(gpus)
    if gpus and count > len(gpus):
        raise UsageError(
            f"--replicas must not exceed the {len(gpus)} GPUs here, not {count}; example: --replicas 1"
        )
    return gpus[:count]


def _take_gpus(gpus: Sequence[Any]) -> Devices:
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:  # else TensorFlow takes all memory at once, also what another process needs
        tf.config.experimental.set_memory_growth(gpu, True)
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    capabilities = {tuple(detail.get("compute_capability", (0, 0))) for detail in details}
    return Devices(
        "GPU",
        tuple(str(detail.get("device_name", "GPU")) for detail in details),
        tuple(".".join(map(str, capability)) for capability in sorted(capabilities)),
    )


def _take_cpus(replicas: int) -> Devices:
    physical = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(physical, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return Devices("CPU", (cpu_name(),) * replicas)


def cpu_name() -> str:
    """The processor's name and the cores this process may use."""
    name = startup.processor_line("model name") or "CPU"
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} core{'s' * (cores > 1)}"


def local_strategy(devices: Devices) -> tf.distribute.Strategy:
    """Mirror over this process's devices; one device needs no strategy."""
    if len(devices.names) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(devices.addresses)


def check_strategy(strategy: tf.distribute.Strategy, devices: Devices, *, workers: int = 1) -> None:
    """Compare what TensorFlow computes on with what the log, the record and result.json will say.

    Raises:
        ResourceUnavailable: they differ.
    """
    used = _used_by(strategy)
    wanted = len(devices.names) * workers
    if used == devices.addresses and strategy.num_replicas_in_sync == wanted:
        return
    raise ResourceUnavailable(
        f"TensorFlow must compute on {', '.join(devices.addresses)} with {wanted} replicas in all, but it "
        f"computes on {', '.join(used)} with {strategy.num_replicas_in_sync}; check what hides devices from "
        "it (CUDA_VISIBLE_DEVICES), or choose them with --replicas"
    )


def _used_by(strategy: tf.distribute.Strategy) -> tuple[str, ...]:
    """This process's devices that the strategy computes on, as GPU:0; TensorFlow starts them for it."""
    if strategy is tf.distribute.get_strategy() and not tf.distribute.has_strategy():
        names = [tf.identity(tf.constant(0.0)).device]  # where TensorFlow puts what has no device
    else:
        names = strategy.extended.worker_devices
    places = [tf.DeviceSpec.from_string(name) for name in names]
    return tuple(f"{place.device_type}:{place.device_index}" for place in places)


def resolve_precision(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], *, filters: int, replicas: int | None = None
) -> Precision:
    """Choose the fastest precision that all devices compute natively, where "auto" leaves the choice.

    A node may hold GPUs of two kinds; the weakest of those that are used decides. On CPUs only oneDNN
    computes in bfloat16, where it is in use; without it, bfloat16 was 4 times slower than float32
    (measured: 8 filters, AMD Zen 4).
    """
    gpus = tf.config.list_physical_devices("GPU")[:replicas]
    if wanted == "bfloat16" and not gpus and not startup.adds_bfloat16_in_float32():
        log.warning(
            "This processor has no AVX-512 and adds up in bfloat16: float32 is faster and more accurate"
        )
    if wanted != "auto":
        return wanted
    if gpus:
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        major = min(detail.get("compute_capability", (0, 0))[0] for detail in details)
        return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"
    faster = startup.computes_bfloat16() and startup.fills_vectors(filters)
    return "bfloat16" if faster else "float32"
