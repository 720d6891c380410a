"""This job's own training step and evaluation, made as ``job.run.attempt`` makes them."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time

import numpy as np

from job.data.epoch_plan import EpochPlan
from job.data.records import Split
from job.domain.network import Network
from job.domain.settings import Settings
from job.engine import startup
from tests.benchmarks.turns import Turns


class Work:
    """An :class:`job.run.attempt.Attempt` without its run: calls of as many steps as that makes."""

    def __init__(self, options: argparse.Namespace) -> None:
        import tensorflow as tf

        from job.engine import cluster, devices
        from job.engine.device_split import DeviceSplit
        from job.engine.training_step import Trainer
        from job.model import keras_file
        from job.run import loop

        network = Network(
            blocks=tuple(int(count) for count in options.blocks.split(",")), filters=options.filters
        )
        settings = Settings(
            network=network,
            batch_size=options.batch_size,
            precision=options.precision,
            replicas=options.replicas,
            sync_batch_norm=options.sync_batch_norm,
        )
        identity = settings.identity(
            precision=devices.resolve_precision(settings.precision, filters=network.filters),
            data_sha256="0" * 64,
        )
        self.cluster = cluster.connect(settings)
        self.tf, self._call_seconds = tf, loop.CALL_SECONDS
        if not self.cluster.on_gpu:
            tf.config.experimental.enable_op_determinism()
        words = np.random.default_rng(0)
        split = Split(
            words.integers(0, 256, (options.images, 32, 32, 3), dtype=np.uint8),
            words.integers(0, 10, options.images, dtype=np.int32),
        )
        xla = cluster.resolve_xla("auto", self.cluster, sync_batch_norm=settings.sync_batch_norm)
        self._trainer = Trainer(identity, self.cluster, train=split, xla=xla)
        twin = keras_file.plain_twin(network, identity.recipe, precision=identity.precision, seed=0)
        self._trainer.state = keras_file.state_of(twin)
        self._evaluated = DeviceSplit(split, self.cluster.strategy) if options.evaluate else None
        self._images: int = options.images
        self._batch_size: int = options.batch_size
        self._rate = identity.recipe.learning_rate
        self._epoch, self._first, self._plan = -1, 0, self._draw(0)
        self._seconds: float | None = None  # of one step, or of one evaluation call
        self._count: int = self._trainer.predictor.batch

    def _draw(self, epoch: int) -> EpochPlan:
        return EpochPlan.draw(images=self._images, seed=0, epoch=epoch)

    def steps_of_next_call(self) -> int:
        steps = self._images // self._batch_size
        if self._first == steps:
            self._first = 0
        fitting = int(self._call_seconds / self._seconds) if self._seconds else 1
        return max(1, min(steps - self._first, fitting))

    def train(self, count: int) -> int:
        """One call of ``count`` steps; how many images they had."""
        if self._first == 0:
            self._epoch += 1
            self._plan = self._draw(self._epoch)
        plan = self._plan.batches(first=self._first, count=count, batch_size=self._batch_size)
        started = time.perf_counter()
        self._trainer.train_steps(plan, np.full(count, self._rate, np.float32))
        # As in the job, the call that traces says nothing of the next one's length.
        self._seconds = 0.0 if self._seconds is None else (time.perf_counter() - started) / count
        self._first = (self._first + count) % (self._images // self._batch_size)
        return count * self._batch_size

    def evaluate(self) -> int:
        """One call of the job's evaluation, whose calls grow until they last a quarter of a second."""
        assert self._evaluated is not None
        count = min(self._count, self._images)
        started = time.perf_counter()
        self._trainer.predict(self._evaluated, first=0, count=count)
        seconds = time.perf_counter() - started
        if self._seconds is not None and seconds < self._call_seconds / 2:
            self._count = min(2 * count, self._images)
        self._seconds = seconds
        return count

    def device_memory(self) -> int | None:
        if not self.cluster.on_gpu:
            return None
        return int(self.tf.config.experimental.get_memory_info("GPU:0")["peak"])


def start_peer() -> subprocess.Popen[bytes]:
    """Start the same program as the second of two workers on loopback; this one is the first."""
    hosts = [f"127.0.0.1:{port}" for port in random.sample(range(20_000, 32_000), 2)]
    description = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": 0}}
    os.environ["TF_CONFIG"] = json.dumps(description)
    description["task"] = {"type": "worker", "index": 1}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.job_worker", *sys.argv[1:]],
        env={**os.environ, "TF_CONFIG": json.dumps(description)},
        stdout=sys.stderr,
    )


def take_half_of_the_cores() -> None:
    """A worker has cores of its own, as a pod has. Where there is one core, both share it."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    if mine := sorted(os.sched_getaffinity(0))[index::2]:
        os.sched_setaffinity(0, mine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--filters", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--workers", type=int, choices=[1, 2], default=1)
    parser.add_argument("--no-sync-batch-norm", dest="sync_batch_norm", action="store_false")
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()

    peer = start_peer() if options.workers == 2 and "TF_CONFIG" not in os.environ else None
    if options.workers == 2:
        take_half_of_the_cores()
    startup.set_environment(filters=options.filters)
    startup.load_cusolver()
    with startup.quiet():
        import job.run.attempt  # noqa: F401
    work = Work(options)
    if not work.cluster.is_chief:
        while count := work.cluster.number_from_chief(0):
            work.train(count)
        os._exit(0)
    turns = Turns(peers=(peer.pid,) if peer else (), device_memory=work.device_memory)
    try:
        if options.evaluate:
            while turns.did(work.evaluate()):
                pass
        else:
            while turns.did(work.train(work.cluster.number_from_chief(work.steps_of_next_call()))):
                pass
        work.cluster.number_from_chief(0)
    finally:
        if peer:
            peer.kill()
            peer.wait()
    os._exit(0)  # TensorFlow's teardown can abort after a peer has left


if __name__ == "__main__":
    main()
