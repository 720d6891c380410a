"""The job on a device that is carved into several, and what it saw, written to a file.

``python -m tests.gpu.carved SPEC train ...`` is ``python -m job train ...``. SPEC is JSON:

    kind        "GPU" or "CPU"
    devices     as how many the one device counts; 1 leaves it whole
    memory_mb   of each logical GPU
    report      the file for losses and memory, written when training ends
    driver      a SPEC of tests/durability/driver.py, which stops the process at a point

The job sees logical GPUs as it would see physical ones: what stands in between are functions of TensorFlow.
For CPUs, whose logical devices TensorFlow uses in one process only, TensorFlow is also told to use those of
each worker: so this is how several devices in each of several workers are run without GPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.durability import driver


def carve(kind: str, devices: int, memory_mb: int) -> None:
    """Let the job find so many devices of a kind. TensorFlow must not have used one yet."""
    import tensorflow as tf

    # TF32 rounds float32 to 10 bits of mantissa on Ampere and newer: no comparison with a CPU could be close.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if devices > 1:
        (_carve_gpu if kind == "GPU" else _carve_cpu)(devices, memory_mb)


def _carve_gpu(count: int, memory_mb: int) -> None:
    import tensorflow as tf

    inner_list, inner_show = tf.config.list_physical_devices, tf.config.set_visible_devices
    logical = [tf.config.LogicalDeviceConfiguration(memory_limit=memory_mb)] * count

    def listed(kind: str | None = None) -> list[Any]:
        found: list[Any] = inner_list(kind)
        return found[:1] * count if kind == "GPU" else found

    def show(gpus: list[Any], kind: str) -> None:
        inner_show(gpus[:1], kind)

    def configure(gpu: Any, _: bool) -> None:  # logical GPUs have a limit and cannot grow
        tf.config.set_logical_device_configuration(gpu, logical)

    tf.config.list_physical_devices, tf.config.set_visible_devices = listed, show
    tf.config.experimental.set_memory_growth = configure


def _carve_cpu(count: int, _: int) -> None:
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    from job.engine import cluster

    def of_worker(_: Any, resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{index}" for index in range(count)), "CPU"

    CollectiveAllReduceExtended._initialize_local_devices = of_worker
    driver.wrap(cluster, "take_devices", lambda take, settings, **_: take(settings))  # it would refuse


def write_report(path: Path, losses: list[float], images_on: set[str]) -> None:
    """Write the loss of each step, the bytes that each device had in use, and what kind holds the images."""
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = dict.fromkeys(f"{one.device_type}:{one.name[-1]}" for one in devices)  # a peer's are listed, too
    memory = [tf.config.experimental.get_memory_info(name) for name in names]
    seen = {"losses": losses, "memory_bytes": memory, "images_on": sorted(images_on)}
    path.write_text(json.dumps(seen))


def watch(loaded: Any, report: Path) -> None:
    """Note the losses of all steps, and report at the end of training."""
    import tensorflow as tf

    from job.engine.training_step import Trainer

    losses: list[float] = []
    images_on: set[str] = set()

    def note(inner: Any, trainer: Any, plan: Any, rates: Any) -> Any:
        copies = trainer._strategy.experimental_local_results(trainer.train_split.words)
        images_on.update(str(tf.DeviceSpec.from_string(copy.device).device_type) for copy in copies)
        sums = inner(trainer, plan, rates)
        losses.extend(float(loss) / plan.order.shape[1] for loss in sums.loss)
        return sums

    def train(inner: Any, *arguments: Any) -> Any:
        answer = inner(*arguments)
        write_report(report, losses, images_on)
        return answer

    driver.wrap(Trainer, "train_steps", note)
    driver.wrap(loaded.attempt, "train", train)


def main() -> None:
    """Be the job. Never returns."""
    spec = json.loads(sys.argv[1])
    from job.cli import commands

    inner = commands.import_run

    def import_and_carve(*arguments: Any) -> Any:
        loaded = inner(*arguments)
        carve(spec["kind"], spec["devices"], spec["memory_mb"])
        if spec.get("report"):
            watch(loaded, Path(spec["report"]))
        return loaded

    commands.import_run = import_and_carve  # type: ignore[assignment]
    driver.run(spec.get("driver") or {}, sys.argv[2:])


if __name__ == "__main__":
    main()
