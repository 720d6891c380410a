"""The experiment: what `make experiment` runs, and that the pages say what the kept runs say."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job.data import records
from job.domain.identity import FORMAT
from job.report.figures import depth_figure
from job.report.pairing import Pairing
from job.report.summaries import NAMES
from job.run.names import record_name
from tests.docs.pages import EXPERIMENT, README, table
from tests.records import newest_record
from tests.test_house import ROOT, run_make
from tests.tools import keep_results
from tests.tools.keep_results import DEPTH_FIGURE, FIGURE, KEPT
from tests.tools.regions import with_region

DATA = records.fingerprint(records.OFFICIAL)


def raw(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and record, as they lie in a folder."""
    return json.loads((folder / "config.json").read_text()), newest_record(folder)


def kept() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [raw(folder) for folder in sorted(KEPT.iterdir())]


# --- the plan


def test_the_plan_is_paired_and_cheapest_first() -> None:
    plan = keep_results.plan()

    shapes = [(run.layers, run.settings.network.model, run.settings.seed) for run in plan]
    small = [
        (layers, model, seed) for seed in (0, 1, 2) for layers in (20, 56) for model in ("resnet", "plainnet")
    ]
    assert shapes == [*small, (30, "resnet", 0), (30, "plainnet", 0)]
    assert [run.settings.epochs for run in plan] == [10] * 12 + [3] * 2
    assert {run.settings.network.filters for run in plan[:12]} == {16}
    assert {run.settings.network.filters for run in plan[12:]} == {64}
    assert {run.settings.recipe.name for run in plan} == {"article"}
    assert len({run.name for run in plan}) == len(plan)


def test_the_plan_can_be_smaller() -> None:
    plan = keep_results.plan("SEEDS=7", "SHAPES=1,1", "EPOCHS=2", "FILTERS=8")

    assert [(run.layers, run.settings.seed, run.settings.epochs) for run in plan] == [
        (6, 7, 2),
        (6, 7, 2),
        (30, 0, 2),
        (30, 0, 2),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seconds; a busy machine starts eight processes slowly
def test_make_experiment_trains_what_is_missing_and_the_second_time_nothing(tmp_path: Path) -> None:
    """The twins stand in for the article's, too, so that the first time already finds two of four done."""
    arguments = ["experiment", f"--old-file={sys.prefix}/.ready", f"VENV={sys.prefix}", "DATA=sample"]
    arguments += ["SEEDS=0", "SHAPES=1,1", "FILTERS=8", "EPOCHS=1", "ARTICLE=--blocks 1,1 --filters 8"]
    arguments += [f"EXPERIMENT={tmp_path}/runs"]

    first = run_make(*arguments)
    assert first.returncode == 0, first.stderr
    log = first.stdout + first.stderr
    assert log.count("epoch 1/1: ") == 2
    assert log.count("already complete") == 2
    assert "6 layers, 8 filters: " in log
    assert "One pair proves nothing." in log
    assert (tmp_path / "runs" / "report" / "curves.png").exists()

    before = contents(tmp_path / "runs")
    second = run_make(*arguments)
    assert second.returncode == 0, second.stderr
    log = second.stdout + second.stderr
    assert "epoch 1/1: " not in log
    assert log.count("already complete") == 4
    assert contents(tmp_path / "runs") == before


def contents(runs: Path) -> dict[Path, bytes]:
    """What counts of the runs; a start that finds a run complete writes nothing of it."""
    return {path: path.read_bytes() for path in sorted(runs.glob("*net*/**/*")) if path.is_file()}


# --- what is kept


def test_kept_runs_are_finished_runs_of_the_plan_on_the_official_data() -> None:
    planned = {run.name: run.settings.epochs for run in keep_results.plan()}
    for folder in sorted(KEPT.iterdir()):
        config, record = raw(folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", record_name(record["revision"])}
        assert config["identity"]["data_sha256"] == record["finished"]["result"]["data_sha256"] == DATA
        assert record["state"] == "complete"
        assert len(record["history"]) == record["finished"]["result"]["epochs"] == planned[folder.name]
        assert record["finished"]["result"]["steps"] == 391 * len(record["history"])
        assert sum(map(sum, record["finished"]["result"]["confusion"])) == 10_000
        correct = sum(row[index] for index, row in enumerate(record["finished"]["result"]["confusion"]))
        assert correct / 10_000 == pytest.approx(record["finished"]["result"]["validation"]["accuracy"])


def test_only_finished_runs_of_the_plan_are_kept_and_nothing_of_the_machine(tmp_path: Path) -> None:
    source, target = tmp_path / "runs", tmp_path / "kept"
    resnet, plainnet = (next(KEPT.glob(f"{model}20-*")).name for model in NAMES)
    for name, changes in {
        resnet: {"nonce": "0a"},
        plainnet: {"state": "interrupted"},
        "foreign-run": {},
    }.items():
        shutil.copytree(KEPT / resnet, source / name)
        config, record = raw(source / name)
        config["settings"]["output"] = "/somewhere/private"
        (source / name / "config.json").write_text(json.dumps(config))
        (source / name / record_name(record["revision"])).write_text(json.dumps(record | changes))

    (target / "run-of-an-older-plan").mkdir(parents=True)
    assert keep_results.keep(str(source), target) == [resnet]
    assert [folder.name for folder in target.iterdir()] == [resnet]
    config, record = raw(target / resnet)
    assert config["settings"] == {"epochs": 10}
    assert record["commits"] == []
    assert record["history"] == raw(KEPT / resnet)[1]["history"]


# --- what the pages say


def test_the_pages_say_what_the_kept_runs_say() -> None:
    """After a change of either: make keep-results EXPERIMENT=folder."""
    runs, plan = keep_results.kept_runs(), keep_results.plan()
    assert keep_results.page(runs, plan) == EXPERIMENT
    assert with_region(README, "finding", keep_results.finding(runs, plan)) == README


def test_the_table_has_the_numbers_of_the_records() -> None:
    rows = {(row["Model"], row["Layers"], row["Seed"]): row for row in table(EXPERIMENT)}
    assert len(rows) == len(kept())
    for config, record in kept():
        result = record["finished"]["result"]
        row = rows[NAMES[result["model"]], str(result["layers"]), str(config["identity"]["seed"])]
        assert row["Test accuracy"] == f"{100 * result['validation']['accuracy']:.2f}%"
        assert row["Test accuracy"] == f"{100 * record['history'][-1]['validation']['accuracy']:.2f}%"
        assert row["Training accuracy"] == f"{100 * result['train']['accuracy']:.2f}%"
        assert row["Epochs"] == str(len(record["history"]))
        assert row["Images/s"] == f"{result['images_per_second']:.0f}"
        seconds = result["steps"] / 391 * 50_000 / result["images_per_second"]
        assert row["Training time"] == f"{seconds / 60:.0f} min"


def test_every_pair_is_in_the_differences() -> None:
    """The mean difference of each depth, computed here from the records alone."""
    text = " ".join(EXPERIMENT.split())
    accuracies: dict[int, dict[str, dict[int, float]]] = {}
    for config, record in kept():
        result = record["finished"]["result"]
        models = accuracies.setdefault(result["layers"], {model: {} for model in NAMES})
        models[result["model"]][config["identity"]["seed"]] = 100 * result["validation"]["accuracy"]
    assert accuracies
    for layers, models in accuracies.items():
        seeds = models["resnet"].keys() & models["plainnet"].keys()
        if seeds:
            mean = statistics.fmean(models["resnet"][seed] - models["plainnet"][seed] for seed in seeds)
            shown = re.search(rf"{layers} layers, \d+ filters: ([+-]\d+\.\d\d) points(.*?)\.", text)
            assert shown
            assert shown[1] == f"{mean:+.2f}"
            assert ("from one pair" in shown[0]) == (len(seeds) == 1)


def test_the_training_accuracies_are_means_over_the_seeds() -> None:
    text = " ".join(EXPERIMENT.split())
    for model in ("resnet", "plainnet"):
        shown = []
        for blocks in ([3, 3, 3], [9, 9, 9]):
            accuracies = [
                record["finished"]["result"]["train"]["accuracy"]
                for config, record in kept()
                if (config["identity"]["model"], config["identity"]["blocks"]) == (model, blocks)
            ]
            shown.append(f"{100 * statistics.mean(accuracies):.1f} %")
        assert f"{NAMES[model]} {' and '.join(shown)} with 20 and 56 layers" in text


def test_degradation_is_found_only_where_a_deeper_network_is_worse_in_training() -> None:
    runs = keep_results.kept_runs()
    said = keep_results._degradation(runs)
    assert "The deeper network is worse in training already, ResNet by 10.9 points and PlainNet by" in said

    swapped = {20: 56, 56: 20}
    by_shape = {(run.model, run.layers): run.identity.network for run in runs}
    mirrored = [
        replace(
            run,
            identity=replace(run.identity, network=by_shape[run.model, swapped[run.layers]]),
        )
        for run in runs
        if run.layers in swapped
    ]
    assert "The deeper networks are no worse in training" in keep_results._degradation(mirrored)


def test_the_figures_show_the_kept_runs() -> None:
    for figure in (FIGURE, DEPTH_FIGURE):
        assert f"(pictures/{figure.name})" in EXPERIMENT
        with Image.open(figure) as picture:
            assert picture.info["Description"] == keep_results.digest()


def test_the_first_screen_shows_the_finding_and_its_figure() -> None:
    first = " ".join(" ".join(README.splitlines()[:40]).split())
    assert re.search(
        r"\*\*\[(The finding|The finding so far|No finding yet)\]\(docs/experiment\.md\)\.\*\* With skip "
        r"connections, trained on all 50,000 images, the accuracy on the test set was \d+\.\d\d points",
        first,
    )
    assert str(DEPTH_FIGURE.relative_to(ROOT)) in first


@pytest.fixture
def everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the plan is finished: each with the history of a kept run, a ResNet 1 to 3 points better."""
    _, record = raw(next(KEPT.glob("resnet20-*")))
    for run in keep_results.plan():
        identity = run.settings.identity(precision="bfloat16", data_sha256=DATA)
        gain = 0.01 * (run.settings.seed + 1) * (identity.network.model == "resnet")
        validation = record["finished"]["result"]["validation"] | {"accuracy": 0.5 + gain}
        history = record["history"][: run.settings.epochs]
        result = record["finished"]["result"] | {"validation": validation, "epochs": len(history)}
        folder = tmp_path / "all" / run.name
        folder.mkdir(parents=True)
        config = {"format": FORMAT, "identity": identity.to_json(), "settings": {"epochs": len(history)}}
        (folder / "config.json").write_text(json.dumps(config))
        finished = {"epochs": len(history), "result": result, "commit": None}
        changed = record | {"history": history, "finished": finished}
        (folder / record_name(record["revision"])).write_text(json.dumps(changed))
    monkeypatch.setattr(keep_results, "KEPT", tmp_path / "all")


@pytest.mark.usefixtures("everything")
def test_when_all_is_finished_the_finding_has_its_interval_and_nothing_is_missing() -> None:
    runs, plan = keep_results.kept_runs(), keep_results.plan()
    finding = " ".join(keep_results.finding(runs, plan).split())
    text = " ".join(keep_results.page(runs, plan).split())

    interval = "+2.00 points, 95 % confidence interval -0.48 to +4.48, n = 3 pairs (seeds 0, 1, 2)"
    assert text.count(interval) == 2  # at 20 and at 56 layers
    verdict = "it includes zero, so these pairs do not settle it"
    pairs = f"(3 pairs, 95 % confidence interval -0.48 to +4.48; {verdict})"
    assert finding.startswith(
        "**[The finding](docs/experiment.md).** With skip connections, trained on all 50,000 images, the "
        f"accuracy on the test set was 2.00 points higher at 20 layers after 10 epochs {pairs}; and "
        f"2.00 points higher at 56 layers after 10 epochs {pairs}."
    )
    change = "change of the difference from 20 layers to 56 layers, 16 filters: +0.00 points in every pair"
    assert change in text
    assert f"(pictures/{DEPTH_FIGURE.name})" in text
    assert str(DEPTH_FIGURE.relative_to(ROOT)) in finding
    assert str(FIGURE.relative_to(ROOT)) not in finding
    assert "Not finished yet" not in text
    assert "14 are finished." in text

    before = " ".join(keep_results.finding(runs[1:], plan).split())
    assert before.startswith("**[The finding so far](docs/experiment.md).** ")
    assert " 13 of 14 runs are finished. ![" in before


@pytest.mark.usefixtures("everything")
def test_statistics_taken_anew_are_shown_of_the_runs_that_have_them() -> None:
    """They were taken at 20 layers alone, and made the ResNet's gain 5 points larger."""
    plain = " ".join(keep_results.page(keep_results.kept_runs(), keep_results.plan()).split())
    assert "Recalibrated" not in plain
    assert "All of these runs ended before statistics were taken anew at a run's end:" in plain

    for folder in keep_results.KEPT.iterdir():
        config, record = raw(folder)
        result = record["finished"]["result"]
        if config["identity"]["blocks"] == [3, 3, 3]:
            accuracy = 0.75 + 0.05 * (config["identity"]["model"] == "resnet")
            accuracy += result["validation"]["accuracy"] - 0.5
            result["recalibrated"] = {"validation": {"loss": 1.0, "accuracy": accuracy}, "test": None}
            (folder / record_name(record["revision"])).write_text(json.dumps(record))
    runs, plan = keep_results.kept_runs(), keep_results.plan()

    text = keep_results.page(runs, plan)
    shown = {row["Recalibrated"] for row in table(text) if row["Layers"] == "20"}
    assert shown == {"75.00%", "81.00%", "82.00%", "83.00%"}
    assert {row["Recalibrated"] for row in table(text) if row["Layers"] != "20"} == {"-"}
    assert "The other runs ended before statistics were taken anew at a run's end:" in " ".join(text.split())
    interval = "points, 95 % confidence interval +4.52 to +9.48"
    anew = " ".join(text.partition("The same by batch statistics taken anew:")[2].split())
    assert anew.startswith(f"- 20 layers, 16 filters: +7.00 {interval}, n = 3 pairs (seeds 0, 1, 2).")
    finding = " ".join(keep_results.finding(runs, plan).split())
    assert (
        "By batch statistics taken anew, it was 7.00 points higher at 20 layers after 10 epochs (3 pairs, "
        "95 % confidence interval +4.52 to +9.48)." in finding
    )


@pytest.mark.usefixtures("everything")
def test_the_figures_stay_small_when_all_is_finished(tmp_path: Path) -> None:
    """They are wide enough for dense screens, and below what `test_pictures_are_small` allows."""
    runs = keep_results.kept_runs()
    for figure, width in ((keep_results.accuracy_figure(runs), 1680), (depth_figure(runs), 1120)):
        assert figure is not None
        keep_results.save(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size < 200_000
        with Image.open(tmp_path / "figure.png") as picture:
            assert picture.width == width
            assert picture.info["Description"] == keep_results.digest()


def test_an_interval_without_zero_speaks_for_itself() -> None:
    clear = Pairing(title="", seeds=(0, 1, 2), differences=(1.9, 2.0, 2.1), layers=20)
    assert keep_results._gain(clear, 10) == (
        "2.00 points higher at 20 layers after 10 epochs (3 pairs, 95 % confidence interval +1.75 to +2.25)"
    )


def test_equal_pairs_are_not_called_one_pair() -> None:
    equal = Pairing(title="", seeds=(0, 1), differences=(2.0, 2.0), layers=20)
    assert keep_results._gain(equal, 10).endswith("(2 pairs, all equal, which give no interval)")
    alone = Pairing(title="", seeds=(0,), differences=(-2.0,), layers=20)
    assert keep_results._gain(alone, 10).endswith(
        "2.00 points lower at 20 layers after 10 epochs (one pair, which proves nothing)"
    )


def test_what_is_not_finished_is_named() -> None:
    runs, plan = keep_results.kept_runs(), keep_results.plan()
    twenty = [run for run in runs if run.layers == 20 and run.identity.seed == 0]
    text = " ".join(keep_results.page(twenty[:1], plan).split())

    assert twenty[0].model == "resnet"
    assert "all 14 runs, many hours on two cores" in text
    assert "14 runs are planned on all 50,000 images" in text
    assert "20 layers for 10 epochs (ResNet, seeds 1, 2; PlainNet, seeds 0, 1, 2)" in text.partition("yet")[2]
    assert "56 layers for 10 epochs (both networks, seeds 0, 1, 2)" in text.partition("yet")[2]
