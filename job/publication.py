"""What people read of a run, made from its record alone: TensorBoard segments, model.keras, result.json.

All of it is written after the swap that makes it true, create-only, and made again by any later start where
it is missing. So a kill between the swap and these files loses nothing, and nothing is ever written twice
(but the segments of epochs that are trained again, because their commit was damaged: those are withdrawn).

The result of a run that was extended is the one thing that gets old. An attempt that was frozen before it
wrote the shorter result may write it at any time later, so whoever publishes a result replaces one that
differs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import keras
import numpy as np

from job import cifar10, events, pictures
from job.checkpoints import MODEL, RESULT, Record, read_record
from job.errors import InvalidData
from job.storage import AlreadyExists, Store

log = logging.getLogger("job")


class Publication:
    """Writes one run's readable files."""

    def __init__(
        self, store: Store, config: dict[str, Any], sample: cifar10.Split, model: keras.Model
    ) -> None:
        self._store = store
        self._config = config
        fewest = int(np.bincount(sample.labels, minlength=len(cifar10.CLASSES)).min())
        self._grid = pictures.png(cifar10.class_grid(sample, per_class=min(10, fewest)))
        self._graph = layer_graph(model)

    def publish(self, record: Record) -> None:
        """Write what the record implies and the run lacks."""
        existing = {entry.name: entry.version for entry in self._store.list()}
        content = record.to_json()
        for name, data in events.segments(
            self._config, content, self._grid, self._graph, existing=existing
        ).items():
            create_once(self._store, name, data)
        if record.state == "complete":
            self._publish_result(record, existing)

    @staticmethod
    def names(history: Iterable[dict[str, Any]]) -> set[str]:
        """Files that these epochs lead to: their segments, and the result of a run that ends with them."""
        segments = [
            name
            for entry in history
            for names in (events.epoch_segments(entry), events.final_segments(entry["step"]))
            for name in names.values()
        ]
        return {MODEL, RESULT, *segments}

    def _publish_result(self, record: Record, existing: dict[str, str]) -> None:
        """Write model and result, unless a newer attempt owns the run.

        The record is read after ``existing`` was listed. So what was listed and differs is older than the
        record, and its version can be deleted: nobody newer can have written it.
        """
        if read_record(self._store).to_bytes() != record.to_bytes():
            return
        data = (json.dumps(record.result, indent=1) + "\n").encode()
        self._replace(MODEL, existing, lambda: self._copy_model(record, existing))
        self._replace(RESULT, existing, lambda: self._store.create(RESULT, data))

    def _replace(self, name: str, existing: dict[str, str], create: Callable[[], None]) -> None:
        try:
            create()
        except AlreadyExists:
            if name in existing:
                self._store.delete(name, existing[name])
                with suppress(AlreadyExists):
                    create()

    def _copy_model(self, record: Record, existing: dict[str, str]) -> None:
        """Make model.keras of the newest checkpoint; where that is not whole, the model there will do."""
        for commit in record.commits[:1]:
            if self._store.holds(commit.name, commit.size, commit.crc32c):
                self._store.copy(commit.name, MODEL)
                return
            log.warning("%s/%s is damaged or gone", self._store.location, commit.name)
        if MODEL not in existing:
            raise InvalidData(
                f"{self._store.location} is complete, but its newest checkpoint is damaged or gone, and "
                f"{MODEL} is missing; restore one of them"
            )


def create_once(store: Store, name: str, data: bytes) -> None:
    """Create an object, or keep the one that an earlier attempt made of the same entry."""
    with suppress(AlreadyExists):
        store.create(name, data)


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
