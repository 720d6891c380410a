"""What the workers of one run agree on, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from job import __version__
from job.domain.errors import (
    Diverged,
    IdentityConflict,
    Interrupted,
    InvalidData,
    ResourceUnavailable,
    StorageFailed,
)
from job.domain.identity import Identity
from job.domain.record import Record
from job.domain.settings import Settings
from job.engine.cluster import Cluster
from job.engine.lost_peer import cause, lost_peer
from job.model.keras_file import State
from job.run.reader import read_commit
from job.run.versions import source_revision
from job.store.contract import NotFound, Store

# Errors that are this worker's own, never the sign of a lost peer.
OWN_FAILURES = (
    tf.errors.ResourceExhaustedError,
    tf.errors.InvalidArgumentError,
    tf.errors.UnimplementedError,
)


def agreed_identity(identity: Identity, settings: Settings, cluster: Cluster) -> Identity:
    """The chief's identity, for all workers: they must have been asked for the same run.

    Raises:
        IdentityConflict: some worker was asked for another.
    """
    if cluster.workers == 1:
        return identity
    mine = {**identity.to_json(), "epochs": settings.epochs, "name": settings.name, "program": program()}
    chiefs: dict[str, Any] = json.loads(cluster.from_chief(json.dumps(mine).encode()))
    if settings.precision == "auto":  # the chief's hardware decides for all
        mine["precision"] = chiefs["precision"]
    differences = [
        f"{key}: {mine[key]!r}, not {chiefs.get(key)!r}" for key in mine if mine[key] != chiefs.get(key)
    ]
    if cluster.any_worker(bool(differences)):
        cluster.leave_together()
        who = f"worker {cluster.index}" if differences else "another worker"
        how = "; ".join(differences) or "its log says how they differ"
        raise IdentityConflict(
            f"{who} was asked for another run than worker 0 ({how}); give all workers the same options"
        )
    return replace(identity, precision=chiefs["precision"])


def program() -> str:
    """What computes: programs that differ would train nonsense together, or wait for each other for ever."""
    return f"{__version__}, source {source_revision() or 'unknown'}, TensorFlow {tf.__version__}"


@contextmanager
def leaving_together(cluster: Cluster) -> Iterator[None]:
    """End together where all end; say that a peer was lost where a collective among several workers fails."""
    try:
        yield
        cluster.leave_together()
    except (Interrupted, Diverged):
        cluster.leave_together()
        raise
    except tf.errors.OpError as error:
        if cluster.workers == 1 or isinstance(error, OWN_FAILURES):
            raise
        raise ResourceUnavailable(
            f"worker {cluster.index} lost {lost_peer(error.message, cluster.strategy, cluster.index)}: "
            f"{cause(error.message)}; the last commit is intact, start all workers again to continue"
        ) from error


def restored(store: Store, record: Record, cluster: Cluster, load: Callable[[Path], State]) -> State | None:
    """The commit that the chief restored, and no other: workers of different steps would train nonsense.

    Raises:
        StorageFailed: this worker cannot read it.
    """
    if not record.restorable:
        return None
    try:
        return read_commit(store, record.restorable[0], load)
    except (NotFound, InvalidData) as error:
        raise StorageFailed(
            f"worker {cluster.index} cannot read the commit from which worker 0 continues: {error}; several "
            "workers need the same --output"
        ) from error
