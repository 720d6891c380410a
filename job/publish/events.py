"""TensorBoard segments from a run's config and record alone; TensorFlow is not needed.

A segment is a small closed event file that is created once and never appended to. What it holds depends only
on the config and on its own entry of the record's history, with the wall time kept there, so that any attempt
builds the same bytes: a segment lost in a crash is made again, and none can hold a value twice.

    events.out.tfevents.0000000000          hyperparameters, and the layout that draws all runs in one chart
    events.out.tfevents.<step>              validation scalars of one epoch
    events.out.tfevents.<steps>-final       confusion matrix, metrics of the end, end of the session
    train/events.out.tfevents.0000000000    sample images, configuration, graph
    train/events.out.tfevents.<step>        training scalars of one epoch

Steps in names have ten digits: TensorBoard reads a folder's files in the order of their names and never goes
back. The steps of the curves are epochs, counted from 1.

TensorBoard sorts everything by name, which decides what is seen first. Its first page opens the first two
groups of tags: accuracy and loss. Its hyperparameter table takes ``<run>`` for a session and ``<run>/train``
for a metric group of it, and sorts metrics by tag, then group: validation accuracy, without a group, leads.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, graph_pb2, summary_pb2, versions_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as session_metadata
from tensorboard.plugins.hparams import plugin_data_pb2 as session_pb2
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from job.data.records import data_name
from job.domain.identity import Identity
from job.domain.network import CLASSES
from job.publish.pictures import confusion_matrix

Json = Mapping[str, Any]

PREFIX = "events.out.tfevents."
FINAL = "-final"  # ends the name of what tells the run's result
SEGMENT = re.compile(rf"(train/)?{re.escape(PREFIX)}(?P<step>\d{{10}})({FINAL})?")
TRAINING = ("images_per_second", "learning_rate")
# Category -> chart -> the tags whose lines it overlays, over every run.
CHARTS = {
    "ResNet and PlainNet": {"Accuracy": "epoch_accuracy", "Loss": "epoch_loss"},
    "Training": {
        "Images per second": "training/images_per_second",
        "Learning rate": "training/learning_rate",
    },
}


def segments(
    config: Json,
    record: Json,
    sample_grid: bytes | None,
    graph: bytes | None = None,
    *,
    existing: Collection[str] = (),
) -> dict[str, bytes]:
    """Build the event files of a run that are not there yet.

    Args:
        config: content of config.json; its settings' ``created``, in seconds since 1970, dates what is no
            epoch's.
        record: content of the newest record.
        sample_grid: a PNG file with sample images of the training data.
        graph: a serialized GraphDef, for example from :func:`layer_graph`.
        existing: names that the run's store holds already; these are not built.

    Returns:
        Bytes by name, relative to the run and in the order in which they should be created: create-only.
    """
    builders = _run_builders(config, sample_grid, graph)
    for entry in record["history"]:
        name = segment_name(entry["step"])
        builders[f"train/{name}"] = partial(_epoch_segment, entry, "train")
        builders[name] = partial(_epoch_segment, entry, "validation")
    if record["finished"] is not None:
        result = record["finished"]["result"]
        builders[segment_name(result["steps"], FINAL)] = partial(_final_segment, record, result)
    return {name: build() for name, build in builders.items() if name not in existing}


def segment_name(step: int, suffix: str = "") -> str:
    """Name of the event file of an optimizer step, such that names sort by step."""
    return f"{PREFIX}{step:010d}{suffix}"


def layer_graph(layers: Iterable[tuple[str, str, Iterable[str]]]) -> bytes:
    """Serialized GraphDef of a network's layers, for TensorBoard's graph page.

    Args:
        layers: (name, kind, names of the layers it takes its input from) in topological order. Names like
            ``stage1_block2_conv1`` fold into ``stage1/block2``; ReLU and normalization join what they follow;
            what is before the first stage folds into ``stem``.
    """
    graph = graph_pb2.GraphDef(versions=versions_pb2.VersionDef(producer=22))
    paths: dict[str, str] = {}
    for name, kind, inputs in layers:
        sources = [paths[source] for source in inputs]
        in_stem = kind != "InputLayer" and not any(path.startswith("stage") for path in paths.values())
        paths[name] = _scoped(name, kind, sources) or (f"stem/{name}" if in_stem else name)
        graph.node.add(name=paths[name], op=kind, input=sources)
    return bytes(graph.SerializeToString(deterministic=True))


def _scoped(name: str, kind: str, sources: list[str]) -> str | None:
    if match := re.fullmatch(r"(stage\d+)_(block\d+)_(.+)", name):
        return "/".join(match.groups())
    follows = kind == "ReLU" or "Normalization" in kind
    if follows and sources and "/" in sources[0]:
        return f"{sources[0].rpartition('/')[0]}/{name}"
    return None


def _run_builders(
    config: Json, sample_grid: bytes | None, graph: bytes | None
) -> dict[str, Callable[[], bytes]]:
    first, created = segment_name(0), float(config["settings"].get("created", 0.0))
    return {
        first: lambda: _event_file(created, 0, [_session_start(config, created), _layout()]),
        f"train/{first}": lambda: _event_file(created, 0, _about_run(config, sample_grid), graph),
    }


def _final_segment(record: Json, result: Json) -> bytes:
    """What is known at the end of a run, at its last epoch."""
    epoch = record["finished"]["epochs"]
    time = record["history"][epoch - 1]["wall_time"]
    return _event_file(time, epoch, [*_about_result(result), _session_end(time)])


def _epoch_segment(entry: Json, split: str) -> bytes:
    """Loss and accuracy under the names of Keras's TensorBoard callback, and how the epoch was trained."""
    values = [_scalar(f"epoch_{metric}", entry[split][metric]) for metric in ("loss", "accuracy")]
    if split == "train":
        values += [_scalar(f"training/{name}", entry[split][name]) for name in TRAINING]
    return _event_file(entry["wall_time"], entry["epoch"], values)


def _about_run(config: Json, sample_grid: bytes | None) -> list[Any]:
    values = hyperparameters(config)
    options = values | {key: value for key, value in config["settings"].items() if key not in values}
    rows = [
        f"| {key} | {_cell(value)} |" for key, value in options.items() if key not in ("created", "network")
    ]
    text = _text("configuration", "\n".join(["| option | value |", "|---|---|", *rows]))
    return [text] + ([_image("images/samples", sample_grid)] if sample_grid else [])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|")


def _about_result(result: Json) -> list[Any]:
    counts = result["confusion"]
    values = [_image("images/confusion_matrix", confusion_matrix(counts, CLASSES))] if counts else []
    recalibrated = result.get("recalibrated") or {}
    for prefix, metrics in {
        "recalibrated": recalibrated.get("validation"),  # with batch statistics taken anew
        "recalibrated_test": recalibrated.get("test"),
        "test": result.get("test"),
    }.items():
        if metrics:
            values += [_scalar(f"{prefix}_{metric}", metrics[metric]) for metric in ("loss", "accuracy")]
    return values


def hyperparameters(config: Json) -> dict[str, bool | float | str]:
    """A run's identity as flat values, in the form that TensorBoard's hyperparameter table takes."""
    identity = Identity.from_json(config["identity"])
    values = {**identity.to_json(), "blocks": identity.network.blocks_text, "layers": identity.network.layers}
    values |= values.pop("recipe_values")
    values["data"] = data_name(values.pop("data_sha256"))[:12]
    return {name: value for name, value in values.items() if value is not None}


def _session_start(config: Json, created: float) -> Any:
    # Without a group name, TensorBoard makes the run its own group. Without an experiment summary, it derives
    # columns, their ranges and which of them differ from all the runs it sees, instead of from the first.
    start = session_pb2.SessionStartInfo(start_time_secs=created)
    for name, value in sorted(hyperparameters(config).items()):
        kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
        setattr(start.hparams[name], f"{kind}_value", value)
    return _session(session_metadata.SESSION_START_INFO_TAG, session_start_info=start)


def _session_end(time: float) -> Any:
    end = session_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time)
    return _session(session_metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _session(tag: str, **info: Any) -> Any:
    content = session_pb2.HParamsPluginData(version=session_metadata.PLUGIN_DATA_VERSION, **info)
    plugin = summary_pb2.SummaryMetadata.PluginData(
        # Map fields have no order: without "deterministic", equal inputs need not give equal bytes.
        plugin_name=session_metadata.PLUGIN_NAME,
        content=content.SerializeToString(deterministic=True),
    )
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin, data_class=summary_pb2.DATA_CLASS_TENSOR)
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=session_metadata.NULL_TENSOR)


def _layout() -> Any:
    layout = layout_pb2.Layout()
    for title, charts in CHARTS.items():
        category = layout.category.add(title=title)
        for chart, tag in charts.items():
            category.chart.add(title=chart, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$"]))
    tensor = tensor_util.make_tensor_proto(layout.SerializeToString(deterministic=True))
    return _value(
        layout_metadata.CONFIG_SUMMARY_TAG, layout_metadata.create_summary_metadata(), tensor, "TENSOR"
    )


def _scalar(tag: str, value: float) -> Any:
    metadata = scalar_metadata.create_summary_metadata(display_name=None, description=None)
    return _value(tag, metadata, tensor_util.make_tensor_proto(np.float32(value)), "SCALAR")


def _text(tag: str, markdown: str) -> Any:
    metadata = text_metadata.create_summary_metadata(display_name=None, description=None)
    return _value(tag, metadata, tensor_util.make_tensor_proto(markdown.encode()), "TENSOR")


def _image(tag: str, png: bytes) -> Any:
    width, height = struct.unpack(">II", png[16:24])  # the PNG header's first chunk
    tensor = tensor_util.make_tensor_proto([b"%d" % width, b"%d" % height, png])
    metadata = image_metadata.create_summary_metadata(display_name=None, description=None)
    return _value(tag, metadata, tensor, "BLOB_SEQUENCE")


def _value(tag: str, metadata: Any, tensor: Any, data_class: str) -> Any:
    metadata.data_class = summary_pb2.DataClass.Value(f"DATA_CLASS_{data_class}")
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _event_file(wall_time: float, step: int, values: Iterable[Any], graph: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    events = [event_pb2.Event(wall_time=wall_time, file_version="brain.Event:2")]
    events += [
        event_pb2.Event(wall_time=wall_time, step=step, summary=summary_pb2.Summary(value=[value]))
        for value in values
    ]
    if graph is not None:
        events.append(event_pb2.Event(wall_time=wall_time, graph_def=graph))
    for event in events:
        writer.write(event.SerializeToString(deterministic=True))
    return buffer.getvalue()
