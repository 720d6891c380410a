"""The comparison: the table's numbers, pairs and interval, warnings, what is skipped, figures' content."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from scipy import stats

from job.cli import cli
from job.data.records import OFFICIAL, SAMPLE, fingerprint
from job.domain.account import PARTS, Spent
from job.domain.errors import MissingInput
from job.domain.network import Network
from job.domain.recipe import RECIPES
from job.domain.record import Commit, Owner, Progress, Record, Timing
from job.domain.settings import Settings
from job.report import comparison, figures
from job.report.caveats import caveats
from job.report.finding import load_runs
from job.report.pairing import Pairing, depth_changes, pairings, recalibrated_accuracy
from job.report.summaries import NAMES, TIMES, RunSummary
from job.run.names import record_name
from job.store.location import open_store

TWENTY, FIFTY_SIX = (3, 3, 3), (9, 9, 9)
RECORD = record_name(1)
PNG = b"\x89PNG\r\n\x1a\n"


def write_run(
    folder: Path,
    model: Any = "resnet",
    *,
    accuracies: Sequence[float] = (0.5, 0.75),
    test_accuracy: float | None = None,
    state: str = "complete",
    blocks: tuple[int, ...] = TWENTY,
    filters: int = 16,
    data: str = "5a" * 32,
    precision: Any = "float32",
    planned: int | None = None,
    computed: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run folder of one epoch for each validation accuracy; training is 0.125 better."""
    network = Network(model=model, blocks=blocks, filters=filters)
    epochs = planned or len(accuracies)
    options = Settings(network=network, epochs=epochs, **settings)
    identity = options.identity(precision=precision, data_sha256=data)
    history = [epoch(index, accuracy) for index, accuracy in enumerate(accuracies)]
    # Its run is alive, and of another host.
    record = Record(attempt=1, nonce="0a", revision=1, written=time.time() - 1.0, state=state).to_json()
    record["history"] = history
    if state == "complete":
        about = result(history, network, test_accuracy) | (computed or {})
        record["finished"] = {"epochs": len(history), "result": about, "commit": None}
    folder.mkdir(parents=True)
    config = {"format": 1, "identity": identity.to_json(), "settings": {"epochs": epochs}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def epoch(index: int, accuracy: float) -> dict[str, Any]:
    return {
        "epoch": index + 1,
        "step": 391 * (index + 1),
        "wall_time": time.time() - 1.0,
        "train": {
            "loss": 2.0 - accuracy,
            "accuracy": accuracy + 0.125,
            "learning_rate": 0.001,
            "images_per_second": 500.0 * (index + 1),
            "seconds": 100.0 / (index + 1),
        },
        "validation": {"loss": 2.5 - accuracy, "accuracy": accuracy, "seconds": 4.0},
    }


def result(history: list[dict[str, Any]], network: Network, test_accuracy: float | None) -> dict[str, Any]:
    return {
        "layers": network.layers,
        "parameters": 272_474,
        "epochs": len(history),
        "train": {"loss": 0.25, "accuracy": 0.9375},
        "validation": {"loss": 0.5, "accuracy": history[-1]["validation"]["accuracy"]},
        "test": None if test_accuracy is None else {"loss": 1.0, "accuracy": test_accuracy},
        "images_per_second": 1234.5,
        "seconds": 3725.4,
    }


def twins(root: Path, gains: Sequence[float], **options: Any) -> list[RunSummary]:
    """A ResNet and a PlainNet for each gain in accuracy, with seeds from 0."""
    for seed, gain in enumerate(gains):
        for model, accuracy in (("resnet", 0.5 + gain), ("plainnet", 0.5)):
            folder = root / f"{model}{sum(options.get('blocks', TWENTY))}-{seed}"
            write_run(folder, model, accuracies=(0.25, accuracy), seed=seed, **options)
    return load_runs([str(root)])[0]


def cells(runs: Sequence[RunSummary], row: int = 0) -> dict[str, str]:
    """One run's line of the table; columns are two or more spaces apart."""
    lines = comparison.table(runs).splitlines()
    titles, values = (
        [cell.strip() for cell in line.split("  ") if cell] for line in (lines[0], lines[2 + row])
    )
    return dict(zip(titles, values, strict=True))


def test_the_table_shows_a_finished_run_s_own_result(tmp_path: Path) -> None:
    write_run(tmp_path / "first", accuracies=(0.5, 0.8125, 0.75), seed=7)
    runs, skipped = load_runs([str(tmp_path / "first")])

    assert not skipped
    assert cells(runs) == {
        "run": "first",
        "model": "ResNet",
        "layers": "20",
        "filters": "16",
        "parameters": "274,454",
        "recipe": "article",
        "data": "5a5a5a5a5a5a",
        "seed": "7",
        "epochs": "3",
        "validation": "75.00%",
        "on": "test set",
        "highest*": "81.25%",
        "train": "93.75%",
        "images/s": "1,234",
        "time": "1:02:05",
        "state": "complete",
    }
    assert comparison.table(runs).endswith(
        "\n* highest of all epochs, on the test set, optimistic; validation: after the last epoch;\n"
        "  train: the mean over that epoch, while the weights still moved;\n"
        "  time: of training and evaluation, over all attempts."
    )


def test_goodput_and_gaps_are_shown_where_a_run_has_them(tmp_path: Path) -> None:
    times = dict.fromkeys((f"{part}_seconds" for part in PARTS), 1.0)
    account = {"attempts": 2, "goodput": 0.875, "wall_seconds": 64.0, "gap_seconds": 75.0, **times}
    write_run(tmp_path / "a", accuracies=(0.5,), computed={"time": account})
    write_run(tmp_path / "b", "plainnet", accuracies=(0.5,))
    runs, _ = load_runs([str(tmp_path)])
    assert [(cells(runs, row)["goodput***"], cells(runs, row)["gaps"]) for row in range(2)] == [
        ("87.50%", "0:01:15"),
        ("-", "-"),
    ]
    assert "*** of the wall time of all attempts" in comparison.table(runs)
    for_programs = json.loads(comparison.json_report(runs))["runs"]
    assert [(run["goodput"], run["gap_seconds"], run["lost_seconds"]) for run in for_programs] == [
        (0.875, 75.0, 1.0),
        (None, None, None),
    ]


def test_a_run_under_way_has_an_account_as_of_its_newest_revision(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", accuracies=(0.5,), planned=20, state="running")
    spent = Spent(began=0.0, starting=5.0, training=15.0, evaluation=5.0)
    owner = Owner(attempt=1, began=5.0, host="a", process="b/1/2", version="1", revision=None, spent=spent)
    commit = Commit(
        name="x", size=1, crc32c=2, progress=Progress(), timing=Timing(trained=10.0, evaluated=5.0)
    )
    about = {"owners": [asdict(owner)], "commits": [asdict(commit)]}
    (folder / RECORD).write_text(json.dumps(json.loads((folder / RECORD).read_text()) | about))
    (run,) = load_runs([str(folder)])[0]
    assert (run.goodput, run.gap_seconds) == (15.0 / 25.0, 0.0)


def test_what_all_runs_share_is_said_once_below_the_terminals_table(tmp_path: Path) -> None:
    """Neither results nor names are left out, even where they agree."""
    write_run(tmp_path / "a", "resnet", accuracies=(0.5,))
    write_run(tmp_path / "b", "plainnet", accuracies=(0.5,))
    runs, _ = load_runs([str(tmp_path)])

    assert list(cells(runs).items()) == [
        ("run", "a"),
        ("model", "ResNet"),
        ("parameters", "274,454"),
        ("validation", "50.00%"),
        ("highest*", "50.00%"),
        ("train", "93.75%"),
        ("images/s", "1,234"),
        ("time", "1:02:05"),
    ]
    shared = (
        "all: 20 layers, 16 filters, recipe article, data 5a5a5a5a5a5a, seed 0, 1 epoch, "
        "validated on the test set, complete"
    )
    assert comparison.table(runs).splitlines()[4] == shared
    titles = (
        "| run | model | layers | filters | parameters | recipe | data | seed | epochs | validation | on |"
    )
    assert titles in comparison.markdown_report(runs)
    assert "all: " not in comparison.markdown_report(runs)


def test_columns_in_which_runs_differ_stay(tmp_path: Path) -> None:
    write_run(tmp_path / "a", accuracies=(0.5, 0.625), planned=20, state="running")
    write_run(tmp_path / "b", accuracies=(0.5, 0.625), planned=20, state="interrupted", seed=1)
    write_run(tmp_path / "c", accuracies=(0.5, 0.625), planned=20, state="running", seed=2)
    runs, _ = load_runs([str(tmp_path)])

    assert [(cells(runs, row)["seed"], cells(runs, row)["state"]) for row in range(3)] == [
        ("0", "running"),
        ("1", "interrupted"),
        ("2", "running"),
    ]
    assert comparison.table(runs).splitlines()[5] == (
        "all: 20 layers, 16 filters, 274,454 parameters, recipe article, data 5a5a5a5a5a5a, 2 of 20 epochs, "
        "validated on the test set"
    )


@pytest.mark.parametrize("state", ["running", "interrupted", "diverged"])
def test_an_unfinished_run_is_summed_up_from_its_history(tmp_path: Path, state: str) -> None:
    write_run(tmp_path / "run", accuracies=(0.5, 0.625), planned=20, state=state)
    runs, _ = load_runs([str(tmp_path / "run")])

    shown = cells(runs)
    assert (shown["state"], shown["epochs"], shown["parameters"]) == (state, "2 of 20", "274,454")
    assert (shown["validation"], shown["train"], shown["highest*"]) == ("62.50%", "75.00%", "62.50%")
    assert runs[0].seconds == 100 + 4 + 50 + 4
    assert runs[0].images_per_second == 750  # the median, as of a finished run


def test_an_unfinished_run_s_record_says_how_long_it_took_and_is_to_be(tmp_path: Path) -> None:
    """It was complete with one epoch, was asked for 20, and was interrupted in the third."""
    folder = write_run(tmp_path / "run", accuracies=(0.5, 0.625), planned=1, state="interrupted")
    record = json.loads((folder / RECORD).read_text())
    record["history"][1]["train"]["images_per_second"] = 0.0  # its only call traced
    progress, timing = Progress(step=1000, epoch=2), Timing(total=1234.5)
    commit = asdict(Commit(name="checkpoints/x", size=1, crc32c=2, progress=progress, timing=timing))
    (folder / RECORD).write_text(json.dumps(record | {"commits": [commit], "epochs": 20}))
    runs, _ = load_runs([str(folder)])

    assert (cells(runs)["epochs"], cells(runs)["time"], cells(runs)["images/s"]) == (
        "2 of 20",
        "0:20:34",
        "500",
    )
    assert dict(runs[0].conditions)["epochs"] == 20


def test_a_run_before_its_first_epoch_has_no_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", accuracies=(), planned=20, state="running")
    shown = cells(load_runs([str(tmp_path / "run")])[0])

    assert {shown[column] for column in ("validation", "highest*", "train", "images/s")} == {"-"}
    assert shown["epochs"] == "0 of 20"


def test_with_a_hold_out_the_test_set_decides(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "resnet", accuracies=(0.5, 0.875), test_accuracy=0.8125, holdout=5000)
    write_run(tmp_path / "b", "plainnet", accuracies=(0.5, 0.75), test_accuracy=0.75, holdout=5000)
    runs, _ = load_runs([str(tmp_path)])

    shown = cells(runs)
    assert (shown["validation"], shown["test"]) == ("87.50%", "81.25%")
    assert pairings(runs)[0].differences == (6.25,)
    assert "validated on the hold-out" in comparison.table(runs)
    assert "on the hold-out, optimistic" in comparison.table(runs)


def test_the_interval_agrees_with_independent_computations(tmp_path: Path) -> None:
    (pairing,) = pairings(twins(tmp_path, (0.01, 0.02, 0.03)))

    assert pairing.seeds == (0, 1, 2)
    assert pairing.differences == pytest.approx((1, 2, 3))
    assert pairing.mean == pytest.approx(2)
    # By hand: the standard deviation of 1, 2, 3 is 1, and tables give t = 4.302653 at 0.975 with 2 degrees.
    assert pairing.interval == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6
    )
    expected = stats.ttest_1samp(pairing.differences, 0).confidence_interval(0.95)
    assert pairing.interval == pytest.approx((expected.low, expected.high))
    assert str(pairing) == (
        "20 layers, 16 filters: +2.00 points, 95 % confidence interval -0.48 to +4.48, n = 3 pairs "
        "(seeds 0, 1, 2). The interval includes zero."
    )


def test_an_interval_without_zero_says_so() -> None:
    assert "The interval excludes zero." in str(Pairing(title="", seeds=(0, 1), differences=(-2.0, -2.01)))


def test_equal_differences_give_no_interval() -> None:
    equal = Pairing(title="here", seeds=(0, 1), differences=(2.0, 2.0 + 1e-14))
    assert equal.interval is None
    assert str(equal) == (
        "here: +2.00 points in every pair, n = 2 pairs (seeds 0, 1). Equal differences give no interval."
    )


def test_one_pair_proves_nothing_and_none_is_no_pair(tmp_path: Path) -> None:
    runs = twins(tmp_path, (0.0159,))
    assert str(pairings(runs)[0]) == (
        "20 layers, 16 filters: +1.59 points from one pair (seed 0). One pair proves nothing."
    )
    alone = pairings(runs[:1])[0]
    assert math.isnan(alone.mean)
    assert str(alone) == (
        "20 layers, 16 filters: no pairs: no seed was finished by both networks. Without a twin: resnet9-0."
    )


def test_each_depth_is_paired_by_itself(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01, 0.03))
    twins(tmp_path / "b", (0.25, 0.25), blocks=FIFTY_SIX)
    found = pairings(load_runs([str(tmp_path)])[0])

    assert [pairing.title for pairing in found] == ["20 layers, 16 filters", "56 layers, 16 filters"]
    assert [pairing.mean for pairing in found] == pytest.approx([2, 25])


def test_the_change_with_depth_is_taken_seed_by_seed(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01, 0.03))
    twins(tmp_path / "b", (0.25, 0.21, 0.5), blocks=FIFTY_SIX)
    twins(tmp_path / "c", (0.25, 0.25), blocks=FIFTY_SIX, filters=8)
    found = pairings(load_runs([str(tmp_path)])[0])
    (change,) = depth_changes(found)

    assert change.seeds == (0, 1)
    assert change.differences == pytest.approx((24, 18))
    expected = stats.ttest_rel([25, 21], [1, 3]).confidence_interval(0.95)
    assert change.interval == pytest.approx((expected.low, expected.high))
    assert str(change).startswith(
        "change of the difference from 20 layers to 56 layers, 16 filters: +21.00 points"
    )
    assert str(change) in comparison.text_report(load_runs([str(tmp_path)])[0])
    assert depth_changes(found[:1]) == []


def test_a_run_without_a_twin_hides_no_change_with_depth(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01, 0.03))
    twins(tmp_path / "b", (0.25, 0.21), blocks=FIFTY_SIX)
    write_run(tmp_path / "deeper", blocks=(18, 18, 18))
    twins(tmp_path / "c", (0.02, 0.02), blocks=(5, 5, 5))
    twins(tmp_path / "d", (0.02, 0.02), blocks=(5, 6, 4))  # as deep, between the two
    (change,) = depth_changes(pairings(load_runs([str(tmp_path)])[0]))

    assert change.title.startswith("change of the difference from 20 layers to 56 layers")
    assert change.differences == pytest.approx((24, 18))


def test_equal_depth_and_width_of_other_blocks_are_told_apart(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01,))
    twins(tmp_path / "b", (0.25,), blocks=(1, 7, 1))
    twins(tmp_path / "c", (0.25,), blocks=FIFTY_SIX)
    runs, _ = load_runs([str(tmp_path)])

    found = pairings(runs)
    assert [pairing.title for pairing in found] == [
        "20 layers, 16 filters, blocks 1,7,1",
        "20 layers, 16 filters, blocks 3,3,3",
        "56 layers, 16 filters",
    ]
    assert depth_changes(found) == []  # from which of the two?
    titles = [axis.get_title() for axis in figures.curves_figure(runs).axes]
    assert titles[0] == "Training accuracy, 20 layers, blocks 1,7,1"
    assert figures.depth_figure(runs) is None


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"batch_size": 64}, "batch_size: 128 (resnet9-0) against 64 (other)"),
        ({"holdout": 5000, "test_accuracy": 0.5}, "holdout: 0 (resnet9-0) against 5000 (other)"),
        ({"precision": "bfloat16"}, "precision: float32 (resnet9-0) against bfloat16 (other)"),
        ({"sync_batch_norm": False}, "sync_batch_norm: True (resnet9-0) against False (other)"),
        ({"data": "6b" * 32}, "data: 5a5a5a5a5a5a (resnet9-0) against 6b6b6b6b6b6b (other)"),
        ({"accuracies": (0.25, 0.5, 0.5)}, "epochs: 2 (resnet9-0) against 3 (other)"),
        (
            {"recipe": replace(RECIPES["article"], learning_rate=0.01)},
            "learning_rate: 0.001 (resnet9-0) against 0.01 (other)",
        ),
        ({"recipe": RECIPES["he"]}, "recipe: article (resnet9-0) against he (other); with it optimizer, "),
    ],
)
def test_runs_that_differ_are_not_paired_and_say_how(
    tmp_path: Path, options: dict[str, Any], warning: str
) -> None:
    write_run(tmp_path / "resnet9-0", "resnet")
    write_run(tmp_path / "other", "plainnet", **options)
    runs, _ = load_runs([str(tmp_path)])

    (found,) = caveats(runs)
    assert found.startswith(f"the runs differ in {warning}")
    assert found.endswith("Only runs that agree are paired")
    assert f"Warning: {found}." in comparison.text_report(runs)
    assert [pairing.seeds for pairing in pairings(runs)] == [(), ()]
    assert len({pairing.title for pairing in pairings(runs)}) == 2


def test_every_setting_has_a_title_of_its_own(tmp_path: Path) -> None:
    slow = replace(RECIPES["article"], learning_rate=0.01)
    for recipe, name in ((RECIPES["article"], "a"), (slow, "b"), (RECIPES["he"], "c")):
        twins(tmp_path / name, (0.01,), recipe=recipe)
    runs, _ = load_runs([str(tmp_path)])

    expected = ["recipe article, learning rate 0.001", "recipe article, learning rate 0.01", "recipe he"]
    titles = [pairing.title for pairing in pairings(runs)]
    assert titles == [f"20 layers, 16 filters, {text}" for text in expected]
    drawn = legend(figures.curves_figure(runs).axes[0])
    assert set(drawn) == {f"{network}, {text}, 1 seed" for network in NAMES.values() for text in expected}


CPU: dict[str, Any] = {"devices": ["AMD EPYC, 1 core"], "replicas": 1, "versions": {"tensorflow": "2.21.0"}}


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ({"replicas": 8}, "replicas: 1 (a) against 8 (b)"),
        ({"versions": {"tensorflow": "2.22.0"}}, "tensorflow: 2.21.0 (a) against 2.22.0 (b)"),
        (
            {"devices": ["NVIDIA A100"] * 2, "replicas": 2},
            "devices: AMD EPYC, 1 core (a) against NVIDIA A100 and NVIDIA A100 (b); with it replicas",
        ),
    ],
)
def test_runs_of_other_hardware_or_versions_are_paired_and_say_so(
    tmp_path: Path, other: dict[str, Any], warning: str
) -> None:
    write_run(tmp_path / "a", "resnet", computed=CPU)
    write_run(tmp_path / "b", "plainnet", computed=CPU | other)
    runs, _ = load_runs([str(tmp_path)])

    assert caveats(runs) == [f"the runs differ in {warning}. They are paired all the same"]
    assert pairings(runs)[0].seeds == (0,)


def test_replicas_with_statistics_of_their_own_are_another_computation(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "resnet", computed=CPU, sync_batch_norm=False)
    write_run(tmp_path / "b", "plainnet", computed=CPU | {"replicas": 8}, sync_batch_norm=False)
    runs, _ = load_runs([str(tmp_path)])

    assert caveats(runs) == [
        "the runs differ in replicas: 1 (a) against 8 (b). Only runs that agree are paired"
    ]
    assert [pairing.seeds for pairing in pairings(runs)] == [(), ()]


def test_runs_that_agree_get_no_warning(tmp_path: Path) -> None:
    assert caveats(twins(tmp_path, (0.01, 0.02))) == []


def test_copies_of_a_run_are_no_more_seeds_in_the_figures(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.0625,))
    write_run(tmp_path / "b" / "copy", accuracies=(0.25, 0.75))
    twins(tmp_path / "c", (0.25,), blocks=FIFTY_SIX)
    runs, _ = load_runs([str(tmp_path)])

    axis = figures.curves_figure(runs).axes[1]
    assert legend(figures.curves_figure(runs).axes[0]) == ["ResNet, 1 seed", "PlainNet, 1 seed"]
    assert y_of(axis.lines[0]) == [0.25, 0.5625]
    depth = figures.depth_figure(runs)
    assert depth is not None
    assert y_of(depth.axes[0].lines[0]) == [0.5625, 0.75]


def test_a_folder_by_another_name_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "one")
    monkeypatch.chdir(run)
    runs, _ = load_runs([".", str(run), "../one", str(tmp_path)])

    assert [run.name for run in runs] == ["one"]


def test_unfinished_and_repeated_runs_are_named(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01,))
    write_run(tmp_path / "b" / "again", "resnet", accuracies=(0.25, 0.75))
    shutil.copytree(tmp_path / "a" / "plainnet9-0", tmp_path / "b" / "copy")
    write_run(tmp_path / "c", "resnet", accuracies=(0.25,), planned=2, state="interrupted", seed=1)
    write_run(tmp_path / "d", "plainnet", seed=1)
    runs, _ = load_runs([str(tmp_path)])

    (pairing,) = pairings(runs)
    assert pairing.differences == pytest.approx((1,))
    assert pairing.unpaired == ("d",)
    assert caveats(runs) == [
        "not finished, therefore not paired: c (interrupted, 1 of 2 epochs)",
        "equal settings and seed, other results, and only the first is paired: "
        f"{tmp_path}/a/resnet9-0 (51.00%), {tmp_path}/b/again (75.00%)",
        f"one run in several places, the first is paired: {tmp_path}/a/plainnet9-0, {tmp_path}/b/copy",
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (RECORD, None, "but no record"),
        (RECORD, "{", f"{RECORD} must be a JSON object"),
        (RECORD, "[" * 100_000, f"{RECORD} must be a JSON object"),
        (RECORD, '{"format": 99}', "has format 99"),
        (RECORD, json.dumps(Record().to_json() | {"history": [{}]}), "lacks "),
        ("config.json", None, "no config.json"),
        ("config.json", '{"format": 1, "identity": {}}', "is not a run's configuration"),
        ("config.json", "[1]", "must be a JSON object"),
    ],
)
def test_foreign_and_damaged_folders_are_named_and_skipped(
    tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad")
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_text(content)

    runs, skipped = load_runs([str(tmp_path)])

    assert [run.name for run in runs] == ["good"]
    assert [item.location for item in skipped] == [str(bad)]
    assert reason in skipped[0].reason
    assert f"Skipped {bad}: " in comparison.text_report(runs, skipped)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": None},
        {"state": "asleep"},
        {"result": {"validation": {"accuracy": "x"}}},
        {"result": {"validation": {"accuracy": None}}},
        {"result": {"validation": {"accuracy": math.nan}}},
        {"result": {"validation": {"accuracy": 77.17}}},
        {"result": {"train": {"accuracy": []}}},
        {"result": {"validation": {"accuracy": 0.75}, "epochs": math.inf}},
        {"result": {"validation": {"accuracy": 0.75}, "seconds": math.nan}},
        {"result": {"validation": {"accuracy": 0.75}, "images_per_second": math.inf}},
        {"result": {"validation": {"accuracy": 0.75}, "devices": 3}},
        {"history": []},
        {"history": [{"epoch": 1, "train": {"loss": "x"}, "validation": {}}]},
    ],
    ids=str,
)
def test_a_damaged_value_costs_its_own_run_only(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad", seed=1)
    record = json.loads((bad / RECORD).read_text())
    if "result" in changes:
        changes = {"finished": record["finished"] | changes}
    (bad / RECORD).write_text(json.dumps(record | changes))

    runs, skipped = load_runs([str(tmp_path)])

    assert [run.name for run in runs] == ["good"]
    assert [item.location for item in skipped] == [str(bad)]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": "x"},
        {"seed": "1"},
        {"seed": None},
        {"recipe": None},
        {"filters": 16.0},
        {"blocks": [3.0, 3, 3]},
        {"batch_size": [1]},
    ],
    ids=str,
)
def test_a_damaged_identity_costs_its_own_run_only(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad", seed=1)
    config = json.loads((bad / "config.json").read_text())
    config["identity"] |= changes
    (bad / "config.json").write_text(json.dumps(config))

    runs, skipped = load_runs([str(tmp_path)])

    assert [run.name for run in runs] == ["good"]
    assert [item.location for item in skipped] == [str(bad)]


def test_a_folder_that_cannot_be_read_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume's lost+found; tests may run as root, whom modes do not stop."""
    write_run(tmp_path / "good")
    (tmp_path / "lost+found").mkdir()
    scan = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    runs, skipped = load_runs([str(tmp_path)])

    assert [run.name for run in runs] == ["good"]
    assert list(map(str, skipped)) == [f"{tmp_path}/lost+found: cannot be read: Permission denied"]


def test_parents_expand_and_a_run_named_twice_counts_once(tmp_path: Path) -> None:
    first = write_run(tmp_path / "deep" / "er" / "first")
    write_run(tmp_path / "second", seed=1)
    (tmp_path / "notes").mkdir()

    runs, skipped = load_runs([str(first), str(tmp_path), str(tmp_path / "notes"), str(tmp_path / "absent")])

    assert [run.name for run in runs] == ["first", "second"]
    assert list(map(str, skipped)) == [
        f"{tmp_path}/notes: holds no run (no record here or below)",
        f"{tmp_path}/absent: does not exist",
    ]


def test_runs_in_a_bucket_are_compared_too(tmp_path: Path, gcs_bucket: str) -> None:
    twins(tmp_path, (0.01, 0.03))
    with closing(open_store(gcs_bucket)) as store:
        for path in sorted(tmp_path.rglob("*.json")):
            store.create(f"runs/{path.relative_to(tmp_path)}", path.read_bytes())

    runs, skipped = load_runs([f"{gcs_bucket}/runs", f"{gcs_bucket}/absent"])

    assert [run.location for run in runs][::3] == [
        f"{gcs_bucket}/runs/{name}" for name in ("resnet9-0", "plainnet9-1")
    ]
    assert pairings(runs)[0].differences == pytest.approx((1, 3))
    assert list(map(str, skipped)) == [f"{gcs_bucket}/absent: holds no run (no record here or below)"]


def test_links_to_runs_are_followed_and_no_circle_is_endless(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere" / "run")
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "run").symlink_to(tmp_path / "elsewhere" / "run")
    (shown / "run" / "back").symlink_to(shown)
    (shown / "same").symlink_to(tmp_path / "elsewhere" / "run")

    runs, skipped = load_runs([str(shown)])

    assert [run.location for run in runs] == [str(shown / "run")]
    assert not skipped


def test_no_run_left_is_missing_input(tmp_path: Path) -> None:
    record = write_run(tmp_path / "run") / RECORD
    with pytest.raises(MissingInput) as caught:
        load_runs([str(tmp_path / "absent"), str(record)])
    assert caught.value.exit_code == 66
    assert str(caught.value) == (
        "compare found no run; example: compare runs\n"
        f"  {tmp_path}/absent: does not exist\n"
        f"  {record}: is a file, not a run's folder"
    )


def test_the_report_holds_table_findings_figures_and_raw_values(tmp_path: Path) -> None:
    twins(tmp_path / "runs" / "a", (0.01, 0.03))
    runs = twins(tmp_path / "runs" / "b", (0.25, 0.25), blocks=FIFTY_SIX)
    runs, skipped = load_runs([str(tmp_path / "runs"), str(tmp_path / "absent")])
    folder = tmp_path / "report" / "new"

    paths = comparison.write_report(runs, folder, skipped)

    assert [path.name for path in paths] == ["comparison.md", "comparison.csv", "curves.png", "depth.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths[2:])
    text = paths[0].read_text()
    assert "- 20 layers, 16 filters: +2.00 points, 95 % confidence interval -10.71 to +14.71, n = 2" in text
    assert "- 56 layers, 16 filters: +25.00 points in every pair, n = 2 pairs" in text
    assert "| resnet9-0 | ResNet | 20 | 16 | 274,454 | article | 5a5a5a5a5a5a | 0 | 2 | 51.00% |" in text
    assert "![Accuracy against depth](depth.png)" in text
    assert f"Skipped {tmp_path}/absent" in text
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8


def test_the_raw_values_are_those_of_the_run(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "held-out", accuracies=(0.5, 0.875, 0.75), test_accuracy=0.625, holdout=5000, seed=3
    )
    write_run(tmp_path / "begun", "plainnet", accuracies=(), planned=20, state="running")
    paths = comparison.write_report(load_runs([str(tmp_path)])[0], tmp_path / "report")

    with paths[1].open(newline="") as file:
        finished, begun = csv.DictReader(file)
    assert finished == {
        "run": "held-out",
        "model": "resnet",
        "layers": "20",
        "blocks": "3,3,3",
        "filters": "16",
        "parameters": "274454",
        "recipe": "article",
        "batch_size": "128",
        "seed": "3",
        "epochs": "3",
        "planned_epochs": "3",
        "validation_accuracy": "0.75",
        "validated_on": "hold-out",
        "test_accuracy": "0.625",
        "recalibrated_validation_accuracy": "",
        "recalibrated_test_accuracy": "",
        "highest_validation_accuracy": "0.875",
        "train_accuracy": "0.9375",
        "images_per_second": "1234.5",
        "seconds": "3725.4",
        **dict.fromkeys(("goodput", *TIMES), ""),
        "precision": "float32",
        "data": "5a" * 32,
        "data_sha256": "5a" * 32,
        "state": "complete",
        "location": str(folder),
    }
    assert (begun["epochs"], begun["planned_epochs"], begun["state"]) == ("0", "20", "running")
    assert begun["validation_accuracy"] == begun["test_accuracy"] == begun["images_per_second"] == ""


def test_a_report_on_one_depth_has_no_depth_figure_and_replaces_an_older_one(tmp_path: Path) -> None:
    twins(tmp_path / "deep", (0.01,), blocks=FIFTY_SIX)
    runs = twins(tmp_path / "runs", (0.01,))
    comparison.write_report(load_runs([str(tmp_path)])[0], tmp_path / "report")
    assert (tmp_path / "report" / "depth.png").exists()
    paths = comparison.write_report(runs, tmp_path / "report")

    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(p.name for p in paths)
    assert "## Depth" not in paths[0].read_text()


def test_depths_that_cannot_be_compared_have_no_figure_and_the_report_says_why(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01,))
    write_run(tmp_path / "b", blocks=FIFTY_SIX, accuracies=(0.5, 0.5, 0.5))
    paths = comparison.write_report(load_runs([str(tmp_path)])[0], tmp_path / "report")

    assert "depth.png" not in [path.name for path in paths]
    text = paths[0].read_text()
    assert "No figure: no network was finished at several depths under equal conditions." in text


def test_markdown_warns_visibly_and_escapes_the_footnote_mark(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "plainnet", batch_size=64)
    text = comparison.markdown_report(load_runs([str(tmp_path)])[0])

    assert "> **Warning:** the runs differ in batch_size" in text
    assert "| highest\\* |" in text
    assert "\n\\* highest of all epochs" in text


def legend(axis: Axes) -> list[str]:
    (found,) = axis.get_figure(root=False).legends  # type: ignore[union-attr]
    return [text.get_text() for text in found.get_texts()]


def x_of(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_xdata())]


def y_of(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]


def test_curves_show_mean_and_range_over_seeds_in_four_labelled_panels(tmp_path: Path) -> None:
    figure = figures.curves_figure(twins(tmp_path, (0.0625, 0.1875)))

    assert [axis.get_title() for axis in figure.axes] == [
        "Training accuracy, 20 layers",
        "Validation accuracy, 20 layers",
        "Training loss, 20 layers",
        "Validation loss, 20 layers",
    ]
    assert {axis.get_xlabel() for axis in figure.axes} == {"epoch"}
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "accuracy",
        "accuracy on the test set",
        "cross-entropy",
        "cross-entropy on the test set",
    ]
    assert legend(figure.axes[0]) == ["ResNet, 2 seeds", "PlainNet, 2 seeds"]
    for axis in figure.axes:
        assert [to_hex(line.get_color()) for line in axis.lines] == list(figures.COLOURS.values())
        assert len(axis.collections) == 2
    resnet, plainnet = figure.axes[1].lines
    assert x_of(resnet) == [1, 2]
    assert y_of(resnet) == [0.25, 0.625]
    assert y_of(plainnet) == [0.25, 0.5]
    band = figure.axes[1].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (0.25, 0.6875)
    assert y_of(figure.axes[0].lines[0]) == [0.375, 0.75]
    assert y_of(figure.axes[2].lines[1]) == [1.75, 1.5]
    assert y_of(figure.axes[3].lines[1]) == [2.25, 2.0]
    assert figure.get_suptitle() == "ResNet against PlainNet: mean over seeds, band from lowest to highest"


def test_curves_of_single_seeds_have_no_bands_and_do_not_speak_of_any(tmp_path: Path) -> None:
    figure = figures.curves_figure(twins(tmp_path, (0.0625,)))

    assert not any(axis.collections for axis in figure.axes)
    assert figure.get_suptitle() == "ResNet against PlainNet"


def test_all_panels_of_accuracy_have_one_scale(tmp_path: Path) -> None:
    """Training accuracy is far above the validation accuracy where a network over-fits, and must look so."""
    twins(tmp_path / "a", (0.0625,))
    twins(tmp_path / "b", (0.375,), blocks=FIFTY_SIX)
    axes = figures.curves_figure(load_runs([str(tmp_path)])[0]).axes

    scales = [axis.get_ylim() for axis in axes]
    assert len({scales[panel] for panel in (0, 1, 4, 5)}) == 1
    assert scales[0][0] < 0.25
    assert scales[0][1] > 1  # the deep ResNet's training accuracy
    assert len({scales[panel] for panel in (2, 3, 6, 7)}) > 1


def test_curves_have_a_row_of_panels_for_each_depth(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01,))
    twins(tmp_path / "b", (0.02,), blocks=FIFTY_SIX, filters=8)
    figure = figures.curves_figure(load_runs([str(tmp_path)])[0])

    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 8
    assert titles[0] == "Training accuracy, 20 layers, 16 filters"
    assert titles[5] == "Validation accuracy, 56 layers, 8 filters"
    assert legend(figure.axes[4]) == ["ResNet, 1 seed", "PlainNet, 1 seed"]


def test_runs_of_other_settings_get_lines_of_their_own(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.01,))
    write_run(tmp_path / "he", recipe=RECIPES["he"])
    axis = figures.curves_figure(load_runs([str(tmp_path)])[0]).axes[0]

    assert sorted(legend(axis)) == [
        "PlainNet, recipe article, 1 seed",
        "ResNet, recipe article, 1 seed",
        "ResNet, recipe he, 1 seed",
    ]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 3


def test_an_unfinished_run_does_not_shorten_the_curve_of_finished_ones(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.0625,))
    write_run(tmp_path / "b", accuracies=(0.75,), planned=2, state="running", seed=1)
    write_run(tmp_path / "c", accuracies=(), planned=2, state="running", seed=2, model="plainnet")
    resnet = figures.curves_figure(load_runs([str(tmp_path)])[0]).axes[1].lines[0]

    assert y_of(resnet) == [0.25, 0.5625]


def test_unfinished_runs_are_drawn_one_by_one_as_far_as_they_are(tmp_path: Path) -> None:
    write_run(tmp_path / "a", accuracies=(0.25, 0.5), planned=3, state="running")
    write_run(tmp_path / "b", accuracies=(0.75,), planned=3, state="interrupted", seed=1)
    write_run(tmp_path / "c", accuracies=(), planned=3, state="running", seed=2)
    axis = figures.curves_figure(load_runs([str(tmp_path)])[0]).axes[1]

    assert [line.get_label() for line in axis.lines] == [
        "ResNet, seed 0, unfinished",
        "ResNet, seed 1, unfinished",
    ]
    assert [y_of(line) for line in axis.lines] == [[0.25, 0.5], [0.75]]


def test_before_the_first_epoch_the_panels_say_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a", accuracies=(), planned=3, state="running")
    for axis in figures.curves_figure(load_runs([str(tmp_path)])[0]).axes:
        assert [text.get_text() for text in axis.texts] == ["no epoch is finished yet"]


def test_a_loss_that_is_not_finite_is_drawn_as_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", accuracies=(0.25, 0.5), planned=3, state="diverged")
    record = json.loads((folder / RECORD).read_text())
    record["history"][1]["validation"]["loss"] = math.inf
    (folder / RECORD).write_text(json.dumps(record))
    runs, skipped = load_runs([str(tmp_path)])

    assert not skipped
    paths = comparison.write_report(runs, tmp_path / "report")
    assert paths[2].read_bytes().startswith(PNG)


def test_depth_figure_draws_means_and_every_run(tmp_path: Path) -> None:
    twins(tmp_path / "a", (0.0625, 0.1875))
    twins(tmp_path / "b", (0.25, 0.25), blocks=FIFTY_SIX)
    write_run(
        tmp_path / "c", blocks=(2, 5, 5, 2), filters=64, accuracies=(0.5,) * 3
    )  # one depth, other epochs
    write_run(tmp_path / "d", blocks=(5, 5, 5), accuracies=(0.9,), planned=2, state="running")
    figure = figures.depth_figure(load_runs([str(tmp_path)])[0])

    assert figure is not None
    (axis,) = figure.axes
    assert legend(axis) == ["ResNet", "PlainNet"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("layers", "accuracy on the test set")
    assert [(x_of(line), y_of(line)) for line in axis.lines] == [
        ([20, 56], [0.625, 0.75]),
        ([20, 56], [0.5, 0.5]),
    ]
    dots = [
        sorted(map(tuple, np.asarray(collection.get_offsets()).tolist())) for collection in axis.collections
    ]
    assert dots[0] == [(20, 0.5625), (20, 0.6875), (56, 0.75), (56, 0.75)]
    assert list(axis.get_xticks()) == [20, 56]


def test_no_depth_figure_for_a_single_depth(tmp_path: Path) -> None:
    assert figures.depth_figure(twins(tmp_path, (0.01,))) is None


def test_no_legend_lies_over_a_curve(tmp_path: Path) -> None:
    """Ten runs of two data sets and two depths: each legend is below the axes that it speaks of."""
    for data in (fingerprint(SAMPLE), fingerprint(OFFICIAL)):
        for blocks in (TWENTY, FIFTY_SIX):
            twins(tmp_path / data[:8] / str(sum(blocks)), (0.0625,), data=data, blocks=blocks)
    write_run(tmp_path / "a", accuracies=(0.25,), planned=2, state="interrupted", seed=7, batch_size=20)
    write_run(tmp_path / "b", accuracies=(0.25,), planned=2, state="interrupted", seed=8, batch_size=50)
    runs, _ = load_runs([str(tmp_path)])
    assert len(runs) == 10
    depth = figures.depth_figure(runs)
    assert depth is not None

    for figure in (figures.curves_figure(runs), depth):
        figure.draw_without_rendering()
        renderer = figure._get_renderer()  # type: ignore[attr-defined]
        legends = [part.legends[0] for part in [figure, *figure.subfigs] if part.legends]
        assert len(legends) == len(figure.subfigs) or figure is depth
        drawn = [box.get_window_extent(renderer) for box in legends]
        axes = [axis.get_window_extent(renderer) for axis in figure.axes]
        assert not any(legend.overlaps(axis) for legend in drawn for axis in axes)
        edges = figure.bbox
        assert all(edges.x0 <= box.x0 and box.x1 <= edges.x1 for box in drawn)
    labels = legend(figures.curves_figure(runs).axes[0])
    assert "ResNet, data sample, 1 seed" in [label.replace("batch size 128, ", "") for label in labels]


def test_data_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", data=fingerprint(SAMPLE))
    write_run(tmp_path / "b", "plainnet", data=fingerprint(OFFICIAL))
    write_run(tmp_path / "c", "plainnet", seed=1)
    runs, _ = load_runs([str(tmp_path)])

    assert [cells(runs, row)["data"] for row in range(3)] == ["sample", "CIFAR-10", "5a5a5a5a5a5a"]
    assert caveats(runs)[0].startswith(
        "the runs differ in data: sample (a) against CIFAR-10 (b) against 5a5a5a5a5a5a (c)"
    )
    paths = comparison.write_report(runs, tmp_path / "report")
    assert ",sample," in paths[1].read_text()


def anew(validation: float, test: float | None = None) -> dict[str, Any]:
    """A result's part with batch statistics taken anew."""
    values = {"validation": validation, "test": test}
    return {
        "recalibrated": {
            name: None if accuracy is None else {"loss": 0.5, "accuracy": accuracy}
            for name, accuracy in values.items()
        }
    }


def test_statistics_taken_anew_have_a_column_and_differences_of_their_own(tmp_path: Path) -> None:
    for seed, gain in enumerate((0.25, 0.125)):
        write_run(tmp_path / f"r{seed}", "resnet", seed=seed, computed=anew(0.5 + gain))
        write_run(tmp_path / f"p{seed}", "plainnet", seed=seed, computed=anew(0.5))
    write_run(tmp_path / "r2", "resnet", seed=2)  # of an older program
    write_run(tmp_path / "p2", "plainnet", seed=2)
    runs, _ = load_runs([str(tmp_path)])

    assert [cells(runs, row)["recalibrated**"] for row in range(3)] == ["75.00%", "62.50%", "-"]
    assert cells(runs)["validation"] == "75.00%"
    (final,), (recalibrated,) = pairings(runs), pairings(runs, recalibrated_accuracy)
    assert (final.seeds, final.differences) == ((0, 1, 2), (0, 0, 0))
    assert (recalibrated.seeds, recalibrated.differences) == ((0, 1), (25, 12.5))
    for text in (comparison.text_report(runs), comparison.markdown_report(runs)):
        assert "ResNet minus PlainNet, final accuracy on the test set:" in text
        assert "ResNet minus PlainNet, the same with batch statistics taken anew:" in text
        assert "+18.75 points, 95 % confidence interval" in text
        assert "with batch statistics taken anew over training images." in text


def test_a_repetition_stands_in_for_a_run_without_such_results(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "resnet")  # of an older program
    write_run(tmp_path / "b", "resnet", computed=anew(0.75))
    write_run(tmp_path / "c", "plainnet", computed=anew(0.5))
    runs, _ = load_runs([str(tmp_path)])
    assert pairings(runs, recalibrated_accuracy)[0].differences == (25,)


def test_with_a_hold_out_the_test_set_decides_with_statistics_taken_anew_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"holdout": 5000, "test_accuracy": 0.5}
    write_run(tmp_path / "a", "resnet", computed=anew(0.875, 0.75), **options)
    write_run(tmp_path / "b", "plainnet", computed=anew(0.875, 0.625), **options)
    runs, _ = load_runs([str(tmp_path)])

    shown = cells(runs)
    assert (shown["recalibrated**"], shown["recalibrated test**"]) == ("87.50%", "75.00%")
    assert pairings(runs, recalibrated_accuracy)[0].differences == (12.5,)


def test_without_such_results_nothing_speaks_of_them(tmp_path: Path) -> None:
    runs = twins(tmp_path, (0.01,))

    assert "anew" not in comparison.text_report(runs) + comparison.markdown_report(runs)
    assert not any("recalibrated" in title for title in cells(runs))


def test_programs_that_differ_are_named(tmp_path: Path) -> None:
    first, second = ({"program": {"version": "0.1.0", "revision": name}} for name in ("aaaa", "bbbb"))
    write_run(tmp_path / "a", "resnet", computed=first)
    write_run(tmp_path / "b", "plainnet", computed=second)
    write_run(tmp_path / "c", "plainnet", seed=1)
    runs, _ = load_runs([str(tmp_path)])

    assert caveats(runs) == [
        "the runs differ in program version: 0.1.0 (a, b) against not recorded (c). "
        "They are paired all the same",
        "the runs differ in source revision: aaaa (a) against bbbb (b) against not recorded (c). "
        "They are paired all the same",
    ]


def test_json_holds_what_the_table_and_the_differences_say(tmp_path: Path) -> None:
    twins(tmp_path / "runs", (0.25, 0.125))
    folder = write_run(tmp_path / "runs" / "z", accuracies=(0.5,), planned=3, state="diverged", seed=9)
    record = json.loads((folder / RECORD).read_text())
    record["history"][0]["train"]["loss"] = math.nan
    (folder / RECORD).write_text(json.dumps(record))
    runs, skipped = load_runs([str(tmp_path / "runs"), str(tmp_path / "absent")])

    found = json.loads(comparison.json_report(runs, skipped))

    by_name = {run["run"]: run for run in found["runs"]}
    assert by_name["resnet9-0"]["validation_accuracy"] == 0.75
    assert [epoch["validation_accuracy"] for epoch in by_name["resnet9-0"]["history"]] == [0.25, 0.75]
    assert [epoch["number"] for epoch in by_name["resnet9-0"]["history"]] == [1, 2]
    assert by_name["z"]["history"][0]["train_loss"] is None
    (difference,) = found["differences"]
    assert difference["of"] == "final accuracy on the test set"
    assert (difference["seeds"], difference["points"], difference["mean"]) == ([0, 1], [25, 12.5], 18.75)
    assert difference["interval"] == pytest.approx(pairings(runs)[0].interval)
    assert found["warnings"] == caveats(runs)
    assert found["skipped"] == [{"location": f"{tmp_path}/absent", "reason": "does not exist"}]


def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    twins(tmp_path / "runs", (0.25,))
    arguments = ["compare", str(tmp_path / "runs"), "--format", "json", "--report", str(tmp_path / "report")]

    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)

    assert len(json.loads(done.stdout)["runs"]) == 2
    assert "curves.png" in done.stderr


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_without_the_plots_extra_the_error_names_it_before_any_run_is_read(
    tmp_path: Path, package: str
) -> None:
    """The command itself, where the package is not to be found: the absent run is not even looked for."""
    code = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)
from job.cli import cli
cli.main(["compare", {str(tmp_path / "absent")!r}], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"compare needs SciPy and Matplotlib, but {package} is not installed" in done.stderr
    assert "pip install '.[plots]'" in done.stderr


def test_importing_the_comparison_loads_neither_tensorflow_nor_the_plots_extra() -> None:
    heavy = {"tensorflow", "keras", "matplotlib", "scipy"}
    code = f"import sys, job.report.comparison; print({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
