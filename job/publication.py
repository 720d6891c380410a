"""What people read of a run, made from its record alone: TensorBoard segments, model.keras, result.json.

All of it is written after the swap that makes it true, create-only, and made again by any later start where it is
missing. So a kill between the swap and these files loses nothing, and nothing is ever written twice.
"""

from __future__ import annotations

import json
from typing import Any

import keras

from job import cifar10, events, pictures
from job.checkpoints import Record
from job.storage import AlreadyExists, Store

MODEL, RESULT = "model.keras", "result.json"


class Publication:
    """Writes one run's readable files."""

    def __init__(self, store: Store, config: dict[str, Any], sample: cifar10.Split, model: keras.Model) -> None:
        self._store = store
        self._config = config
        self._grid = pictures.png(cifar10.class_grid(sample))
        self._graph = layer_graph(model)

    def publish(self, record: Record) -> None:
        """Write what the record implies and the run lacks."""
        existing = {entry.name for entry in self._store.list()}
        content = record.to_json()
        for name, data in events.segments(
            self._config, content, self._grid, self._graph, existing=existing
        ).items():
            create_once(self._store, name, data)
        if record.state == "complete":
            self._publish_result(record, existing)

    def _publish_result(self, record: Record, existing: set[str]) -> None:
        if MODEL not in existing:
            self._store.copy(record.commits[0].name, MODEL)
        if RESULT not in existing:
            create_once(self._store, RESULT, (json.dumps(record.result, indent=1) + "\n").encode())

    def withdraw_result(self) -> None:
        """Remove what an earlier, shorter completion of this run left, before it trains on."""
        for entry in self._store.list():
            if entry.name in (MODEL, RESULT):
                self._store.delete(entry.name, entry.version)


def create_once(store: Store, name: str, data: bytes) -> None:
    """Create an object, or keep the one that an earlier attempt made of the same entry."""
    try:
        store.create(name, data)
    except AlreadyExists:
        pass


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
