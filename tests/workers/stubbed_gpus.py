"""The job where TensorFlow lists so many GPUs that are not here, up to the moment at which it would use them.

``python -m tests.workers.stubbed_gpus COUNT train ...`` prints the replicas and devices of the strategy, and
ends with exit code 0; or it ends as the job does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from job.run.signals import leave
from tests.durability import driver


@dataclass(frozen=True)
class StubbedGpu:
    name: str = "stubbed A100"

    def details(self) -> dict[str, Any]:
        return {"device_name": self.name, "compute_capability": (8, 0)}


def stub(count: int) -> None:
    """Let TensorFlow list GPUs, and take its settings without using them."""
    import tensorflow as tf

    inner = tf.config.list_physical_devices
    gpus = [StubbedGpu()] * count
    tf.config.list_physical_devices = lambda kind=None: gpus if kind == "GPU" else inner(kind)
    tf.config.set_visible_devices = tf.config.experimental.set_memory_growth = lambda *_: None
    tf.config.experimental.get_device_details = StubbedGpu.details


def tell_and_leave(connect: Any, *arguments: Any) -> None:
    """Say what training would use. Never returns."""
    cluster = connect(*arguments)
    cluster.leave_together()
    print(f"{cluster.replicas} replicas, here {' '.join(cluster.strategy.extended.worker_devices)}")
    leave(0)


def main() -> None:
    """Be the job. Never returns."""
    from job.cli import commands

    count, *arguments = sys.argv[1:]
    inner = commands.import_run

    def import_and_stub(*options: Any) -> Any:
        loaded = inner(*options)
        from job.engine import cluster

        stub(int(count))
        driver.wrap(cluster, "connect", tell_and_leave)
        return loaded

    commands.import_run = import_and_stub  # type: ignore[assignment]
    driver.run({}, arguments)


if __name__ == "__main__":
    main()
