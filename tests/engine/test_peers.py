"""Whom a failed collective names, from messages that TensorFlow 2.21 gave when workers were killed."""

from __future__ import annotations

import pytest
import tensorflow as tf

from job.engine.lost_peer import cause, lost_peer

HEARTBEAT = """\
Graph execution error:

Detected at node while/CollectiveReduceV2_1 defined at (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main

  File "/app/job/engine/trainer.py", line 88, in _step

Error reported from /job:worker/task:2: The following tasks are unhealthy (stopped sending heartbeats):
/job:worker/replica:0/task:2
The tasks have crashed. Check the task logs for an earlier error.
\t [[{{node while/CollectiveReduceV2_1}}]] [Op:__inference_train_123]"""
RESET = """\
Collective ops is aborted by: Socket closed
Additional GRPC error information from remote target /job:worker/replica:0/task:1 while calling \
/tensorflow.WorkerService/RecvBuf:"""


def strategy_of(workers: int) -> tf.distribute.Strategy:
    """One that knows its workers' addresses; it connects to nobody."""
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    hosts = [f"resnet-{index}.workers:2222" for index in range(workers)]
    spec = tf.train.ClusterSpec({"worker": hosts})
    strategy.extended._cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec)
    return strategy


@pytest.mark.parametrize(
    ("workers", "index", "message", "expected"),
    [
        (4, 0, HEARTBEAT, "worker 2 at resnet-2.workers:2222"),
        (4, 3, RESET, "worker 1 at resnet-1.workers:2222"),
        (
            4,
            3,
            f"{HEARTBEAT}\n{RESET}",
            "worker 1 at resnet-1.workers:2222 and worker 2 at resnet-2.workers:2222",
        ),
        (4, 1, RESET, "a peer"),  # nobody loses itself
        (4, 0, "Connection reset by peer", "a peer"),
        (2, 0, "Connection reset by peer", "worker 1 at resnet-1.workers:2222"),
        (2, 1, "Connection reset by peer", "worker 0 at resnet-0.workers:2222"),
    ],
)
def test_the_lost_peer_is_named(workers: int, index: int, message: str, expected: str) -> None:
    assert lost_peer(message, strategy_of(workers), index) == expected


def test_the_cause_is_told_without_the_place_in_the_graph() -> None:
    assert cause(HEARTBEAT).startswith(
        "Error reported from /job:worker/task:2: The following tasks are unhealthy"
    )
    assert len(cause(HEARTBEAT * 3)) == 200
    assert cause(RESET).startswith("Collective ops is aborted by: Socket closed Additional GRPC")
    assert cause("reset") == "reset"
