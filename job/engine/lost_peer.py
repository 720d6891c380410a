"""Who is meant where TensorFlow tells that a collective among several workers has failed."""

from __future__ import annotations

import re

import tensorflow as tf

# "Error reported from /job:worker/task:2: ..." by the coordination service, when heartbeats stay away;
# "from remote target /job:worker/replica:0/task:2" by gRPC, when a connection breaks.
ORIGIN = re.compile(r"(?:reported from|remote target) /job:worker/(?:replica:0/)?task:(\d+)")
# Lines that tell where in the graph and in which source line, before what went wrong.
WHERE = ("Graph execution error", "Detected at node", "File ", "<stack traces unavailable>", "[[{{node")


def lost_peer(message: str, strategy: tf.distribute.Strategy, index: int) -> str:
    """The peers that a failure comes from, as "worker 1 at HOST:PORT".

    Of two workers it is the other one; of more, those that the message names, else "a peer".
    """
    resolver = strategy.cluster_resolver
    hosts = list(resolver.cluster_spec().job_tasks("worker")) if resolver else []
    numbers = {int(number) for number in ORIGIN.findall(message)}
    others = sorted(number for number in numbers if number != index and number < len(hosts))
    if len(hosts) == 2:
        others = [1 - index]
    return " and ".join(f"worker {number} at {hosts[number]}" for number in others) or "a peer"


def cause(message: str) -> str:
    """What went wrong, at most 200 characters of it, without the place in the graph."""
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(WHERE))[:200]
