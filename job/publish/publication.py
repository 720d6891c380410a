"""What people read of a run, made from its record alone: TensorBoard segments, model.keras, result.json.

All of it is written after the revision that makes it true, and made again by any later start where it is
missing. So a kill between the revision and these files loses nothing. Segments are created once (those of
epochs that are trained again, because their commit was damaged, are withdrawn). Model and result are replaced
when a longer training ends; whoever writes them looks at the record once more, so that a process that was
frozen meanwhile mends what it has spoiled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import keras
import numpy as np

from job.data.grid import class_grid
from job.data.records import Split
from job.domain.errors import InvalidData
from job.domain.network import CLASS_COUNT
from job.domain.record import Commit, Finished, Record
from job.publish import events, pictures
from job.store.contract import AlreadyExists, NotFound, Store

MODEL, RESULT = "model.keras", "result.json"  # of a finished run

log = logging.getLogger("job")


class Publication:
    """Writes one run's readable files."""

    def __init__(
        self,
        store: Store,
        config: dict[str, Any],
        sample: Split,
        model: keras.Model,
        *,
        read: Callable[[Store], Record],
    ) -> None:
        """Publish into ``store``.

        Args:
            store: of the run.
            config: content of config.json.
            sample: images that the first segment shows.
            model: whose layers the graph page shows.
            read: reads the newest record of a store.
        """
        self._store, self._config, self._read = store, config, read
        fewest = int(np.bincount(sample.labels, minlength=CLASS_COUNT).min())
        self._grid = pictures.png(class_grid(sample, per_class=min(10, fewest)))
        self._graph = layer_graph(model)

    def publish(self, record: Record) -> None:
        """Write what the record implies and the run lacks."""
        existing = {entry.name for entry in self._store.list()}
        content = record.to_json()
        for name, data in events.segments(
            self._config, content, self._grid, self._graph, existing=existing
        ).items():
            with suppress(AlreadyExists):  # an earlier attempt made it of the same entry
                self._store.create(name, data)
        finished, written = record.finished, None
        while finished is not None and finished != written:
            self._publish_result(finished)
            written, finished = finished, self._read(self._store).finished

    def _publish_result(self, finished: Finished) -> None:
        """Write the model, then the result: where the result is, the model is."""
        if finished.commit is not None and not self._make_model(finished.commit):
            return
        data = (json.dumps(finished.result, indent=1) + "\n").encode()
        with suppress(NotFound):
            if self._store.read(RESULT) == data:
                return
        self._store.replace(RESULT, data)

    def _make_model(self, commit: Commit) -> bool:
        """Let model.keras equal a checkpoint; False where a newer attempt has pruned that meanwhile."""
        if self._is_whole(MODEL, commit):
            return True
        with suppress(NotFound):
            if self._is_whole(commit.name, commit):
                self._store.copy(commit.name, MODEL)
                return True
        newest = self._read(self._store).finished
        return newest is not None and newest.commit == commit and self._keep_model(commit)

    def _is_whole(self, name: str, commit: Commit) -> bool:
        with suppress(NotFound):
            return self._store.checksum(name) == (commit.size, commit.crc32c)
        return False

    def _keep_model(self, commit: Commit) -> bool:
        """Where the checkpoint is not whole any more, the model that is there will do."""
        log.warning("%s/%s is damaged or gone", self._store.location, commit.name)
        if self._store.exists(MODEL):
            return True
        raise InvalidData(
            f"{self._store.location} is complete, but its checkpoint is damaged or gone, and {MODEL} is "
            "missing; restore one of them"
        )


def withdraw(store: Store, read: Callable[[Store], Record]) -> None:
    """Delete what was published of epochs that the record lacks, and the result where it has none.

    The record is read after the list: what was listed had been published of it, or of one before it.
    """
    names = [entry.name for entry in store.list()]
    record = read(store)
    steps = {0, *(entry["step"] for entry in record.history)}
    for name in names:
        segment = events.SEGMENT.fullmatch(name)
        without_epoch = segment is not None and int(segment["step"]) not in steps
        if without_epoch or (name in (MODEL, RESULT) and record.finished is None):
            store.delete(name)


def layer_graph(model: keras.Model) -> bytes:
    """The network's layers for TensorBoard's graph page."""
    nodes = []
    for layer in model.layers:
        inputs = [tensor._keras_history.operation.name for tensor in _inputs(layer)]
        nodes.append((layer.name, type(layer).__name__, inputs))
    return events.layer_graph(nodes)


def _inputs(layer: keras.layers.Layer) -> list[Any]:
    if isinstance(layer, keras.layers.InputLayer):
        return []
    return layer.input if isinstance(layer.input, list) else [layer.input]
