"""The benchmark itself, on a network that is too small to say anything: its numbers must be right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click.testing import CliRunner, Result

from job.engine import prediction
from tests.benchmarks import __main__ as command
from tests.benchmarks import contenders, job_worker, report
from tests.benchmarks.contenders import Contender, Machine, Workload
from tests.benchmarks.harness import Player, clean_environment, play
from tests.test_house import parse_lock

TINY = Workload("tiny", "1,1", 8, 8)
CPU = Machine("a processor", 2, (), bfloat16=False, memory_bytes=8 << 30)
NEWER_CPU = Machine("a processor", 2, (), bfloat16=True, memory_bytes=8 << 30)
GPU = Machine("a processor", 8, ("a GPU",), bfloat16=True, memory_bytes=8 << 30)


def player(name: str, *turns: tuple[int, float], first: float = 1.0) -> Player:
    """A contender that has said so many images in so many seconds."""
    found = Player(Contender(name, f"label of {name}", "no_worker"), [])
    found.turns = [
        {"images": images, "seconds": seconds, "peak_memory_bytes": 1 << 30} for images, seconds in turns
    ]
    found.first_unit_seconds = [first]
    return found


def cells(text: str, *, first: str) -> dict[str, list[str]]:
    """The rows of the table whose first title is given, by their first cell."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            break
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        label, *values = (cell.strip() for cell in line.strip("|").split("|"))
        found[label] = values
    return found


# --- sums


def test_speeds_are_medians_over_turns_and_ratios_are_of_medians() -> None:
    slow = player("keras", (100, 10.0), (100, 4.0), (100, 5.0))  # 10, 25, 20 images/s
    ours = player("job", (90, 2.0), (80, 2.0), (60, 2.0))  # 45, 40, 30 images/s
    reference, job = report.rows([slow, ours])
    assert reference["speed"] == {"median": 20.0, "min": 10.0, "max": 25.0}
    assert (reference["ratio"], reference["ours"]) == (1.0, 2.0)
    assert (job["ratio"], job["ours"]) == (2.0, 1.0)


def test_who_failed_half_way_has_no_speed() -> None:
    failed = player("keras", (100, 10.0))
    failed.failure = "failed: ended with -9"
    failed_row, job = report.rows([failed, player("job", (90, 2.0))])
    assert failed_row["speed"] is None
    assert failed_row["ours"] is None
    assert job["ratio"] is None


def test_a_commits_share_is_that_of_an_epoch_with_its_evaluation() -> None:
    values = report.workload_report(
        TINY,
        training=[player("job", (500, 1.0))],
        evaluation=[player("job", (1000, 1.0))],
        first_steps={
            "data": "sample",
            "begins": [3.0, 1.0, 2.0],
            "is_done": [4.0],
            "resumed": [5.0],
            "bare": [3.5],
        },
        commits={"folder": [0.9, 1.1, 1.9]},
    )
    assert values["first_step"]["begins_seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert values["commits"]["folder"]["share_of_epoch"] == pytest.approx(1.1 / 110)


# --- who is measured


@pytest.mark.parametrize("machine", [CPU, NEWER_CPU, GPU])
def test_names_are_unique_and_hold_the_reference_and_the_job(machine: Machine) -> None:
    names = [one.name for one in contenders.contenders(machine, torch=True)]
    assert len(set(names)) == len(names)
    assert {contenders.REFERENCE, contenders.OURS} <= set(names)


def runnable(machine: Machine, *, torch: bool = True) -> set[str]:
    return {one.name for one in contenders.contenders(machine, torch=torch) if one.not_run is None}


def test_bfloat16_runs_where_the_hardware_has_it_only() -> None:
    assert not {name for name in runnable(CPU) if "bfloat16" in name}
    assert {"keras-xla-off-bfloat16", "torch-compiled-bfloat16", "job-float32"} <= runnable(NEWER_CPU)


def test_without_pytorch_its_rows_say_how_to_get_it() -> None:
    rows = contenders.contenders(CPU, torch=False)
    assert {one.not_run for one in rows if one.group == "torch"} == {"no PyTorch here; make bench TORCH=1"}


def test_one_gpu_is_not_shared() -> None:
    assert not {"job-2-replicas", "job-2-workers"} & runnable(GPU)
    assert {"job-2-replicas", "job-2-workers"} <= runnable(CPU)


def test_all_evaluate_as_many_images_at_a_time_as_the_job() -> None:
    assert contenders.EVALUATION_BATCH == prediction.EVALUATION_BATCH
    everyone = contenders.evaluators(contenders.contenders(NEWER_CPU, torch=True))
    assert {"torch-bfloat16", "keras-xla-off-bfloat16", "job-float32"} <= {one.name for one in everyone}
    assert {one.options[-2:] for one in everyone} == {("--batch-size", str(prediction.EVALUATION_BATCH))}


@pytest.mark.parametrize(("index", "expected"), [(0, {0, 5}), (1, {2, 7})])
def test_a_worker_has_half_of_the_cores(monkeypatch: pytest.MonkeyPatch, index: int, expected: Any) -> None:
    cores = {7, 5, 0, 2}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, wanted: cores.intersection_update(wanted))
    monkeypatch.setenv("TF_CONFIG", json.dumps({"task": {"type": "worker", "index": index}}))
    job_worker.take_half_of_the_cores()
    assert cores == expected


def test_only_the_reference_runs_without_a_choice_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of this process, which tests set, is none of the contenders' business."""
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    monkeypatch.setenv("JOB_FILTERS", "3")
    assert not {"TF_ENABLE_ONEDNN_OPTS", "JOB_FILTERS"} & clean_environment().keys()
    reference, onednn, *_ = contenders.contenders(CPU, torch=False)
    assert reference.environment == {}
    assert onednn.environment == {"TF_ENABLE_ONEDNN_OPTS": "1"}


def test_pytorch_is_locked_by_hashes_and_names_no_address() -> None:
    text = (Path(contenders.__file__).parent / "requirements-torch.lock").read_text()
    assert "://" not in text
    entries = parse_lock(text)
    assert "torch" in {requirement.name for requirement, _ in entries}
    assert all(len(requirement.specifier) == 1 and hashes for requirement, hashes in entries)


# --- turns

ECHO = """
import time
from tests.benchmarks.turns import Turns
turns = Turns()
print("noise that a library prints")
while turns.did(5):
    print("more noise")
    time.sleep(0.01)
"""


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders that need no library: 5 images in 10 ms."""

    programs = {"bad": "raise SystemExit('cannot work')", "slow": "import time; time.sleep(60)"}

    def start(contender: Contender, command: list[str], *, gpu: bool) -> Player:
        return Player(contender, [sys.executable, "-c", programs.get(contender.name, ECHO)], gpu=gpu)

    monkeypatch.setattr("tests.benchmarks.harness.Player", start)


@pytest.mark.usefixtures("echo")
def test_contenders_alternate_in_processes_that_stay() -> None:
    told: list[str] = []
    everyone = [Contender(name, name, "echo") for name in ("a", "b")]
    players = play(everyone, TINY, turns=3, seconds=0.1, say=told.append)
    assert [line.split(": ")[1].split()[0] for line in told] == ["a", "b"] * 3
    for one in players:
        assert len(one.first_unit_seconds) == 1
        assert [turn["images"] for turn in one.turns] == [5 * turn["units"] for turn in one.turns]
        assert all(turn["seconds"] >= 0.1 for turn in one.turns)
        assert all(0 < turn["images"] / turn["seconds"] <= 500 for turn in one.turns)


@pytest.mark.usefixtures("echo")
def test_a_process_does_not_stay_where_memory_would_not_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.harness._free_memory", lambda: 0)
    (one,) = play([Contender("a", "a", "echo")], TINY, turns=2, seconds=0.01)
    assert len(one.first_unit_seconds) == len(one.turns) == 2


@pytest.mark.usefixtures("echo")
def test_a_contender_that_ends_says_why_and_the_others_go_on() -> None:
    bad, good = play(
        [Contender("bad", "bad", "echo"), Contender("good", "good", "echo")], TINY, turns=2, seconds=0.01
    )
    assert bad.failure == "failed: ended with 1: cannot work"
    assert (bad.turns, len(good.turns)) == ([], 2)


@pytest.mark.usefixtures("echo")
def test_who_does_not_answer_in_time_is_too_slow_which_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.harness.ANSWER_SECONDS", 0.5)
    (slow,) = play([Contender("slow", "slow", "echo")], TINY, turns=2, seconds=0.01)
    assert slow.failure == "its first call takes over 0.5 s"
    assert command._failures({"workloads": [{"training": report.rows([slow]), "evaluation": []}]}) == 0


@pytest.mark.usefixtures("echo")
def test_nobody_computes_on_the_cpu_beside_a_gpu() -> None:
    (one,) = play([Contender("a", "a", "echo")], TINY, turns=1, seconds=0.01, gpu=True)
    assert one.failure is not None
    assert one.failure.startswith("failed: computes on the CPU, beside a GPU")


# --- the command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command.main, arguments)


def test_a_workload_is_a_name_or_a_shape() -> None:
    result = run("--workload", "large")
    assert result.exit_code == 2
    assert "must be resnet30, small or blocks/filters/batch, not 'large'" in " ".join(result.output.split())


def test_only_names_contenders() -> None:
    result = run("--only", "jax")
    assert result.exit_code == 2
    assert "not jax; they are: keras, " in result.output


@pytest.mark.timeout(900)  # seconds: two contenders that import TensorFlow, on a machine that may be busy
def test_it_measures_and_its_table_holds_the_numbers_of_its_json(tmp_path: Path) -> None:
    """Really, in processes: one turn of a tiny network."""
    options = ["--workload", "1,1/8/8", "--turns", "1", "--seconds", "0.1", "--images", "80"]
    options += ["--only", "keras", "--only", "job", "--part", "training", "--part", "help"]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *options, "--json", "all.json", "--markdown", "all.md"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    text, values = Path("all.md").read_text(), json.loads(Path("all.json").read_text())
    assert finished.stdout == text
    assert_rows_hold(values["workloads"][0]["training"], cells(text, first="trains"))
    assert f"`python -m job --help`: {median(values['help_seconds']):.3f} s" in text
    assert values["versions"]["tensorflow"] in text
    assert values["hardware"]["processor"] in text


def assert_rows_hold(rows: list[dict[str, Any]], table: dict[str, list[str]]) -> None:
    assert set(table) == {row["label"] for row in rows} == {"Keras `fit` as in the article", "this job"}
    medians = {}
    for row in rows:
        (turn,) = row["turns"]
        assert turn["images"] % 8 == 0
        assert turn["images"] >= 3 * 8
        medians[row["label"]] = turn["images"] / turn["seconds"]
        shown = table[row["label"]]
        assert shown[:3] == [f"{medians[row['label']]:.1f}"] * 3
        assert shown[5] == f"{row['first_unit_seconds'][0]:.1f} s"
        assert shown[6] == f"{turn['peak_memory_bytes'] / 2**30:.2f} GiB"
        assert turn["peak_memory_bytes"] > 100 << 20
        assert turn["device_memory_bytes"] is None or turn["device_memory_bytes"] > 0
    article, job = medians["Keras `fit` as in the article"], medians["this job"]
    assert table["this job"][3:5] == [f"{job / article:.2f}", "1.00"]
    assert table["Keras `fit` as in the article"][3:5] == ["1.00", f"{job / article:.2f}"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seconds: a dozen contenders and probes, each a process that imports TensorFlow
def test_the_other_contenders_and_measures_work(tmp_path: Path) -> None:
    """PyTorch apart, which is not among the job's packages."""
    options = ["--workload", "1,1/8/8", "--turns", "1", "--seconds", "0.1", "--images", "80"]
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *options, "--json", "all.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    (values,) = json.loads(Path("all.json").read_text())["workloads"]
    for row in (*values["training"], *values["evaluation"]):
        assert (row["speed"] is None) == (row["not_run"] is not None)
    measured = {row["name"] for row in values["training"] if row["speed"]}
    assert {"keras", "keras-xla-off", "keras-xla-on", "job", "job-2-replicas", "job-2-workers"} <= measured
    assert {row["name"] for row in values["evaluation"] if row["speed"]} >= {"keras", "job"}
    first = values["first_step"]
    assert all(0 < begins < done for begins, done in zip(first["begins"], first["is_done"], strict=True))
    assert len(first["resumed"]) == len(first["bare"]) == 3
    assert min(first["resumed"] + first["bare"]) > 1
    for store in ("folder", "bucket"):
        assert len(values["commits"][store]["blocked_seconds"]) == 3
        assert 0 < values["commits"][store]["share_of_epoch"] < 1
    assert f"{values['commits']['bucket']['blocked']['median']:.3f} s" in result.stdout
