"""Segments: the same bytes from any attempt, and what a real TensorBoard makes of them, live and fresh."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import urlencode

import google_crc32c
import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto import event_pb2, graph_pb2
from tensorboard.util import tensor_util

from job.data.records import OFFICIAL, SAMPLE, fingerprint
from job.domain.network import CLASSES, Network
from job.domain.settings import Settings
from job.publish import events
from job.publish.pictures import CELL, DARK_BLUE, HEADER, MARGIN, confusion_matrix, png

GRID = png(np.arange(64 * 96 * 3, dtype=np.uint32).reshape(64, 96, 3).astype(np.uint8))
GRAPH = events.layer_graph([("images", "InputLayer", []), ("logits", "Dense", ["images"])])
EPOCHS = 3
ROOT = "events.out.tfevents.0000000000"
# TensorBoard as in the light image: without TensorFlow, which would also cost seconds to import.
LAUNCH = """
import sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
from tensorboard.main import run_main
run_main()
"""


CONFUSION = (90 * np.eye(10, dtype=int) + np.arange(10)).tolist()  # no mirror image of itself


def config(model: Any = "resnet", seed: int = 0, data_sha256: str = "5a" * 32) -> dict[str, Any]:
    network = Network(model=model, blocks=(3, 3, 3), filters=16)
    identity = Settings(network=network, seed=seed).identity(precision="float32", data_sha256=data_sha256)
    settings = {"epochs": EPOCHS, "created": 1732450000.0}
    return {"format": 1, "identity": identity.to_json(), "settings": settings}


def entry(epoch: int, gain: float = 0.0) -> dict[str, Any]:
    return {
        "epoch": epoch + 1,
        "step": 391 * (epoch + 1),
        "wall_time": 1732450060.5 + 90 * epoch,
        "train": {
            "loss": 1.5 - 0.25 * epoch,
            "accuracy": 0.5 + 0.125 * epoch + gain,
            "learning_rate": 0.001,
            "images_per_second": 600.0 + epoch,
            "seconds": 83.0,
        },
        "validation": {"loss": 1.75 - 0.25 * epoch, "accuracy": 0.375 + 0.125 * epoch + gain, "seconds": 3.0},
    }


def record(epochs: int, *, done: bool = False, gain: float = 0.0, holdout: bool = False) -> dict[str, Any]:
    result = {
        "steps": 391 * epochs,
        "confusion": CONFUSION,
        "test": {"loss": 0.75, "accuracy": 0.625} if holdout else None,
    }
    finished = {"epochs": epochs, "result": result, "commit": None} if done else None
    return {"history": [entry(epoch, gain) for epoch in range(epochs)], "finished": finished}


def read(segment: bytes) -> list[Any]:
    """Events of a file, read independently of TensorBoard's reader and with every checksum checked."""
    stream, found = BytesIO(segment), []
    while header := stream.read(12):
        size = struct.unpack("<Q", header[:8])[0]
        data = stream.read(size)
        checksums = struct.unpack("<I", header[8:]) + struct.unpack("<I", stream.read(4))
        assert checksums == (masked_crc32c(header[:8]), masked_crc32c(data))
        found.append(event_pb2.Event.FromString(data))
    return found


def masked_crc32c(data: bytes) -> int:
    value = int(google_crc32c.value(data))
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def values(segment: bytes) -> dict[str, Any]:
    found = {v.tag: v for event in read(segment) for v in event.summary.value}
    assert len(found) == sum(len(event.summary.value) for event in read(segment))
    return found


def scalars(segment: bytes) -> dict[str, float]:
    found = values(segment)
    assert {v.metadata.plugin_data.plugin_name for v in found.values()} == {"scalars"}
    return {tag: float(tensor_util.make_ndarray(v.tensor)) for tag, v in found.items()}


def test_segments_are_named_after_steps_and_created_in_the_order_tensorboard_reads() -> None:
    names = list(events.segments(config(), record(2, done=True), GRID))

    assert names == [
        "events.out.tfevents.0000000000",
        "train/events.out.tfevents.0000000000",
        "train/events.out.tfevents.0000000391",
        "events.out.tfevents.0000000391",
        "train/events.out.tfevents.0000000782",
        "events.out.tfevents.0000000782",
        "events.out.tfevents.0000000782-final",
    ]
    for folder in ("", "train/"):
        inside = [name for name in names if name.rpartition("/")[0] == folder.rstrip("/")]
        assert inside == sorted(inside)
    longer = events.segments(config(), record(30, done=True), GRID)
    train = [name for name in longer if name.startswith("train/")]
    assert train == sorted(train)


def test_epoch_scalars_carry_keras_names_the_epoch_from_1_and_the_record_s_time() -> None:
    found = events.segments(config(), record(2), GRID)

    train = found["train/events.out.tfevents.0000000782"]
    assert scalars(train) == {
        "epoch_loss": 1.25,
        "epoch_accuracy": 0.625,
        "training/learning_rate": pytest.approx(0.001),
        "training/images_per_second": 601.0,
    }
    validation = found["events.out.tfevents.0000000782"]
    assert scalars(validation) == {"epoch_loss": 1.5, "epoch_accuracy": 0.5}
    for segment in (train, validation):
        assert {event.wall_time for event in read(segment)} == {1732450150.5}
        assert {event.step for event in read(segment)[1:]} == {2}  # the second epoch
        assert read(segment)[0].file_version == "brain.Event:2"


def test_a_segment_depends_on_its_own_entry_alone() -> None:
    first, last = (events.segments(config(), record(n, done=n == 3), GRID, GRAPH) for n in (1, 3))

    assert len(first) == 4
    assert {name: last[name] for name in first} == first


def test_equal_inputs_give_equal_bytes_in_any_process() -> None:
    shuffled = json.loads(json.dumps(config(), sort_keys=True))
    shuffled["identity"] = dict(reversed(shuffled["identity"].items()))
    shuffled["identity"]["recipe_values"] = dict(reversed(shuffled["identity"]["recipe_values"].items()))
    expected = events.segments(config(), record(2, done=True), GRID, GRAPH)
    assert events.segments(shuffled, record(2, done=True), GRID, GRAPH) == expected

    code = """
import hashlib, sys
import tests.publish.test_events as t
built = t.events.segments(t.config(), t.record(2, done=True), t.GRID, t.GRAPH)
print(hashlib.sha256(repr(built).encode()).hexdigest())
assert not {"tensorflow", "keras", "matplotlib"} & set(sys.modules)
"""
    digest = hashlib.sha256(repr(expected).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert printed.strip() == digest


def test_existing_segments_are_not_built_again() -> None:
    every = events.segments(config(), record(2, done=True), GRID)
    missing = "events.out.tfevents.0000000391"

    rebuilt = events.segments(
        config(), record(2, done=True), b"no picture", existing=every.keys() - {missing}
    )

    assert rebuilt == {missing: every[missing]}


def test_first_segments_hold_hyperparameters_layout_samples_configuration_and_graph() -> None:
    found = events.segments(config(), record(0), GRID, GRAPH)

    assert found.keys() == {ROOT, f"train/{ROOT}"}
    assert values(found[ROOT]).keys() == {"_hparams_/session_start_info", "custom_scalars__config__"}
    about = values(found[f"train/{ROOT}"])
    assert tensor_util.make_ndarray(about["images/samples"].tensor).tolist() == [b"96", b"64", GRID]
    text = tensor_util.make_ndarray(about["configuration"].tensor).item().decode()
    assert "| model | resnet |\n" in text
    assert "| learning_rate | 0.001 |\n" in text
    assert "| blocks | 3,3,3 |\n" in text
    graphs = [event.graph_def for event in read(found[f"train/{ROOT}"]) if event.HasField("graph_def")]
    assert graphs == [GRAPH]
    assert not any(
        event.HasField("graph_def")
        for event in read(events.segments(config(), record(0), GRID)[f"train/{ROOT}"])
    )


def test_hyperparameters_are_the_flat_identity() -> None:
    found = events.hyperparameters(config("plainnet", seed=7))

    expected = {"model": "plainnet", "layers": 20, "blocks": "3,3,3", "filters": 16, "seed": 7, "flip": False}
    assert expected.items() <= found.items()
    assert found["learning_rate"] == 0.001
    assert found["data"] == "5a5a5a5a5a5a"
    for files, name in ((SAMPLE, "sample"), (OFFICIAL, "CIFAR-10")):
        assert events.hyperparameters(config(data_sha256=fingerprint(files)))["data"] == name
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


FINAL = "events.out.tfevents.0000000782-final"
SESSION_END = "_hparams_/session_end_info"


def test_the_end_brings_the_confusion_matrix_and_with_a_hold_out_the_test_metrics() -> None:
    plain = values(events.segments(config(), record(2, done=True), GRID)[FINAL])
    assert plain.keys() == {"images/confusion_matrix", SESSION_END}
    drawn = tensor_util.make_ndarray(plain["images/confusion_matrix"].tensor).tolist()[2]
    assert drawn == confusion_matrix(CONFUSION, CLASSES)

    held_out = events.segments(config(), record(2, done=True, holdout=True), GRID)[FINAL]
    assert values(held_out).keys() == {"images/confusion_matrix", "test_loss", "test_accuracy", SESSION_END}
    assert value_of(held_out, "test_accuracy") == 0.625
    assert {event.step for event in read(held_out)[1:]} == {2}


def value_of(segment: bytes, tag: str) -> float:
    return float(tensor_util.make_ndarray(values(segment)[tag].tensor))


def test_the_end_brings_the_metrics_of_statistics_taken_anew() -> None:
    done = record(2, done=True, holdout=True)
    done["finished"]["result"]["recalibrated"] = {
        "validation": {"loss": 0.5, "accuracy": 0.75},
        "test": {"loss": 0.25, "accuracy": 0.875},
    }
    final = events.segments(config(), done, GRID)[FINAL]
    assert value_of(final, "recalibrated_accuracy") == 0.75
    assert value_of(final, "recalibrated_loss") == 0.5
    assert value_of(final, "recalibrated_test_accuracy") == 0.875

    done["finished"]["result"]["recalibrated"]["test"] = None
    assert "recalibrated_test_accuracy" not in values(events.segments(config(), done, GRID)[FINAL])


def test_a_finished_result_stays_at_its_epoch_while_the_run_is_extended() -> None:
    done, longer = record(2, done=True), record(3)
    longer["finished"] = done["finished"]

    extended = events.segments(config(), longer, GRID)

    assert extended[FINAL] == events.segments(config(), done, GRID)[FINAL]
    assert "events.out.tfevents.0000001173-final" not in extended


def test_tags_sort_such_that_accuracy_then_loss_are_seen_first() -> None:
    """TensorBoard opens the first two groups; a tag's group is what stands before its first slash."""
    done = record(2, done=True, holdout=True)
    done["finished"]["result"]["recalibrated"] = {"validation": {"loss": 0.5, "accuracy": 0.75}, "test": None}
    built = events.segments(config(), done, GRID)
    plugins = {"scalars", "images"}
    shown = {
        value.tag.partition("/")[0]
        for segment in built.values()
        for value in values(segment).values()
        if value.metadata.plugin_data.plugin_name in plugins
    }
    assert sorted(shown)[:2] == ["epoch_accuracy", "epoch_loss"]


def test_confusion_matrix_shades_by_share_of_the_true_class() -> None:
    counts = np.zeros((10, 10), int)
    counts[0, 0], counts[1, 0], counts[1, 1] = (
        5,
        50,
        50,
    )  # row 0: all right; row 1: half are taken for class 0
    picture = np.asarray(Image.open(BytesIO(confusion_matrix(counts.tolist(), list("abcdefghij")))))

    def corner(row: int, column: int) -> list[int]:
        return [int(value) for value in picture[HEADER + row * CELL + 3, MARGIN + column * CELL + 3]]

    assert corner(0, 0) == DARK_BLUE.tolist()
    assert corner(1, 0) == corner(1, 1)
    assert corner(0, 0)[0] < corner(1, 0)[0] < 255
    assert corner(0, 1) == corner(9, 9) == [255, 255, 255]


def test_layer_graph_folds_blocks_and_keeps_every_edge() -> None:
    graph = graph_pb2.GraphDef.FromString(
        events.layer_graph(
            [
                ("images", "InputLayer", []),
                ("stage1_block1_conv1", "Conv2D", ["images"]),
                ("re_lu_3", "ReLU", ["stage1_block1_conv1"]),
                ("batch_normalization_3", "FusedBatchNormalization", ["re_lu_3"]),
                ("stage1_block1_add", "Add", ["images", "batch_normalization_3"]),
                ("pool", "AveragePooling2D", ["stage1_block1_add"]),
            ]
        )
    )

    assert [(node.name, list(node.input)) for node in graph.node] == [
        ("images", []),
        ("stage1/block1/conv1", ["images"]),
        ("stage1/block1/re_lu_3", ["stage1/block1/conv1"]),
        ("stage1/block1/batch_normalization_3", ["stage1/block1/re_lu_3"]),
        ("stage1/block1/add", ["images", "stage1/block1/batch_normalization_3"]),
        ("pool", ["stage1/block1/add"]),
    ]


class TensorBoard:
    """A real server on loopback, asked through the interface that its pages use."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.address}{path}?{urlencode(query)}", timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def steps(self, run: str, tag: str) -> list[int]:
        """Steps of a curve, as often as the server has them; empty while it has none."""
        try:
            points = self.get("/data/plugin/scalars/scalars", run=run, tag=tag)
        except urllib.error.HTTPError:
            return []
        return [int(step) for _, step, _ in points]

    def every_curve(self) -> dict[tuple[str, str], list[int]]:
        tags = self.get("/data/plugin/scalars/tags")
        return {(run, tag): self.steps(run, tag) for run in tags for tag in tags[run]}


@contextmanager
def tensorboard(folder: Path, *, fast: bool) -> Iterator[TensorBoard]:
    command = [sys.executable, "-c", LAUNCH, "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    command += ["--reload_interval", "1", f"--load_fast={str(fast).lower()}"]
    with NamedTemporaryFile("r+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield TensorBoard(wait_for(lambda: address_in(Path(log.name).read_text())))
        finally:
            process.terminate()


def address_in(log: str) -> str | None:
    found = re.search(r"http://127\.0\.0\.1:\d+", log)
    return found and found[0]


def wait_for(look: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "TensorBoard did not get there in time"
        time.sleep(0.1)
    return found


def store(run: Path, built: dict[str, bytes]) -> None:
    """As a Store creates them: whole, never overwritten, under a name TensorBoard ignores until complete."""
    for name, data in built.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(".new")
        hidden.write_bytes(data)
        os.link(hidden, path)
        hidden.unlink()


EXPECTED_CURVES = {
    (f"{run}{group}", tag): list(range(1, EPOCHS + 1))
    for run in ("resnet20", "plainnet20")
    for group in ("", "/train")
    for tag in ("epoch_loss", "epoch_accuracy", *(f"training/{name}" for name in events.TRAINING if group))
}


@pytest.mark.slow
def test_tensorboard_shows_every_value_once_live_and_fresh_with_both_readers(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    resnet, plainnet = runs / "resnet20", runs / "plainnet20"
    store(plainnet, events.segments(config("plainnet"), record(EPOCHS, done=True), GRID, GRAPH))
    with ExitStack() as stack:
        live = [stack.enter_context(tensorboard(runs, fast=fast)) for fast in (True, False)]
        for epochs in range(EPOCHS + 1):
            existing = {str(path.relative_to(resnet)) for path in resnet.rglob("events*")}
            now = record(epochs, done=epochs == EPOCHS, gain=0.0625)
            store(resnet, events.segments(config(), now, GRID, GRAPH, existing=existing))
            for board in live:
                wait_for_epochs(board, epochs)
        for board in live:
            check_pages(board)
    with ExitStack() as stack:
        fresh = [stack.enter_context(tensorboard(runs, fast=fast)) for fast in (True, False)]
        for board in fresh:
            check_pages(board)


def wait_for_epochs(board: TensorBoard, epochs: int) -> None:
    wait_for(lambda: board.steps("resnet20", "epoch_accuracy") == list(range(1, epochs + 1)))


def check_pages(board: TensorBoard) -> None:
    wait_for(lambda: complete_sessions(board) == 2 and len(board.get("/data/plugin/images/tags")) == 4)
    assert board.every_curve() == EXPECTED_CURVES
    accuracy = board.get("/data/plugin/scalars/scalars", run="resnet20", tag="epoch_accuracy")
    assert accuracy == [[1732450060.5, 1, 0.4375], [1732450150.5, 2, 0.5625], [1732450240.5, 3, 0.6875]]
    check_one_chart_for_both_networks(board)
    check_hyperparameter_table(board)
    check_pictures_text_and_graph(board)


def sessions(board: TensorBoard) -> list[dict[str, Any]]:
    """Rows of the hyperparameter table."""
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    query = {"experimentName": "", "allowedStatuses": statuses, "startIndex": 0, "sliceSize": 100}
    found: list[dict[str, Any]] = board.post("/data/plugin/hparams/session_groups", **query)["sessionGroups"]
    return found


def complete_sessions(board: TensorBoard) -> int:
    return sum(
        session["status"] == "STATUS_SUCCESS" for row in sessions(board) for session in row["sessions"]
    )


def check_one_chart_for_both_networks(board: TensorBoard) -> None:
    categories = board.get("/data/plugin/custom_scalars/layout")["category"]
    assert [category["title"] for category in categories] == ["ResNet and PlainNet", "Training"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in categories[0]["chart"]}
    assert charts == {"Accuracy": ["^epoch_accuracy$"], "Loss": ["^epoch_loss$"]}
    for run in ("resnet20", "plainnet20"):
        lines = board.get("/data/plugin/custom_scalars/scalars", run=run, tag=charts["Accuracy"][0])
        assert len(lines["tag_to_events"]["epoch_accuracy"]) == EPOCHS


def check_hyperparameter_table(board: TensorBoard) -> None:
    experiment = board.post("/data/plugin/hparams/experiment", experimentName="")
    differing = [column["name"] for column in experiment["hparamInfos"] if column["differs"]]
    assert differing == ["model"]
    first = experiment["metricInfos"][0]["name"]
    assert (first["group"], first["tag"]) == ("", "epoch_accuracy")  # on the validation images
    rows = sessions(board)
    models = {row["name"]: row["hparams"]["model"] for row in rows}
    assert models == {"resnet20": "resnet", "plainnet20": "plainnet"}
    assert len(rows) == 2
    for row in rows:
        metrics = {(m["name"]["group"], m["name"]["tag"]): m["value"] for m in row["metricValues"]}
        gain = 0.0625 * (row["name"] == "resnet20")
        assert metrics["", "epoch_accuracy"] == 0.625 + gain
        assert metrics["train", "epoch_accuracy"] == 0.75 + gain


def check_pictures_text_and_graph(board: TensorBoard) -> None:
    images = board.get("/data/plugin/images/tags")
    assert {run: list(tags) for run, tags in images.items()} == {
        f"{run}{group}": [tag]
        for run in ("resnet20", "plainnet20")
        for group, tag in (("/train", "images/samples"), ("", "images/confusion_matrix"))
    }
    sample = board.get("/data/plugin/images/images", run="resnet20/train", tag="images/samples", sample=0)[0]
    address = f"{board.address}/data/plugin/images/individualImage?{sample['query']}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.read() == GRID
    text = board.get("/data/plugin/text/text", run="resnet20/train", tag="configuration")
    assert "<td>resnet</td>" in text[0]["text"]
    assert board.get("/data/plugin/graphs/info")["resnet20/train"]["run_graph"]
