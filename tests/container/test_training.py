"""The job in its image, strictly confined: it trains, is stopped and killed, and goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.container.conftest import (
    EPOCHS,
    RESNET,
    STEPS_PER_EPOCH,
    TINY,
    Images,
    Run,
    Trained,
    only_run,
    owned,
)
from tests.container.engine import OFFLINE, USER, Engine
from tests.records import newest_record

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]


def test_the_confinement_is_what_it_says(engine: Engine, images: Images, runs: Path) -> None:
    """Else the other tests would prove less than they claim."""
    code = """if True:
        import json, os, pwd, socket
        def attempt(action):
            try: action()
            except Exception as error: return type(error).__name__
        lines = open("/proc/self/status").read().splitlines()
        status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
        print(json.dumps({
            "ids": [os.getuid(), os.getgid()],
            "home": os.environ["HOME"],
            "name": attempt(lambda: pwd.getpwuid(os.getuid())),
            "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")],
            "new privileges": status["NoNewPrivs"],
            "writes": [
                attempt(lambda: open(f"{folder}/file", "w")) for folder in ("/", "/app", "/var/tmp", "/data")
            ],
            "work": [attempt(lambda: open(f"{folder}/file", "w")) for folder in ("/tmp", "/runs")],
            "network": attempt(lambda: socket.create_connection(("192.0.2.1", 80), 3)),
            "pid": os.getpid(),
        }))
    """
    finished = engine.run(images.job, "-c", code, runs=runs, options=("--entrypoint=python",))
    assert json.loads(finished.stdout) == {
        "ids": [USER, USER],
        "home": "/",
        "name": "KeyError",
        "capabilities": [0, 0, 0, 0],
        "new privileges": "1",
        "writes": ["OSError"] * 4,
        "work": [None, None],
        "network": "OSError",
        "pid": 1,
    }, finished.stderr


def test_a_resnet_is_trained_and_everything_is_where_and_whose_it_was_promised(
    trained: Trained,
) -> None:
    run = trained.resnet
    assert f"epoch {EPOCHS}/{EPOCHS}: loss" in trained.log
    assert "Warning" not in trained.log
    result = run.json("result.json")
    assert (result["model"], result["layers"]) == ("resnet", 8)
    assert (result["epochs"], result["steps"]) == (EPOCHS, EPOCHS * STEPS_PER_EPOCH)
    assert result["train"]["accuracy"] > 0.3
    assert newest_record(run.folder)["state"] == "complete"
    for name in ("config.json", "model.keras", "train", "checkpoints"):
        assert (run.folder / name).exists(), name
    assert list(run.folder.glob("events.out.tfevents.*")), "no validation curves"
    everything = [run.folder, *run.folder.rglob("*")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in everything} == {(USER, USER)}


def test_a_plainnet_is_trained(trained: Trained) -> None:
    result = trained.plainnet.json("result.json")
    assert (result["model"], result["steps"]) == ("plainnet", STEPS_PER_EPOCH)


def test_evaluate_agrees_with_the_result(engine: Engine, images: Images, trained: Trained) -> None:
    run = trained.resnet
    finished = engine.run(images.job, "evaluate", run.folder.name, "--data", "sample", runs=run.folder.parent)
    assert finished.returncode == 0, finished.stderr
    evaluated, result = json.loads(finished.stdout), run.json("result.json")
    assert evaluated["step"] == result["steps"]
    assert evaluated["validation"]["accuracy"] == result["validation"]["accuracy"]
    assert evaluated["validation"]["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "--epochs", "none"), 2, "'none' is not a valid integer"),
        (("train", "--data", "/data/missing"), 66, "/data/missing does not exist"),
        (("train", *TINY, "--require-gpu"), 69, "--require-gpu: TensorFlow sees no GPU"),
        (("evaluate", "missing", "--data", "sample"), 66, "missing"),
    ],
)
def test_exit_codes_and_reasons_pass_through(
    engine: Engine, images: Images, runs: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    finished = engine.run(images.job, *arguments, runs=runs)
    assert finished.returncode == code, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_folder_of_somebody_else_is_refused_with_the_cure(
    engine: Engine, images: Images, tmp_path: Path
) -> None:
    finished = engine.run(images.job, *RESNET, runs=owned(tmp_path / "runs", user=0))
    assert finished.returncode == 77, finished.stderr
    assert "/runs" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(
    engine: Engine, images: Images, trained: Trained, runs: Path, way: str
) -> None:
    container = engine.start(images.job, *RESNET, options=(OFFLINE, f"--volume={runs}:/runs"))
    wait_for_epochs(engine, container, runs, 3)
    if way == "stop":
        engine("stop", "--time", "15", container)
    else:
        engine("kill", "--signal", "KILL", container)
    log = engine("logs", container).stderr
    assert engine.exit_code(container) == (75 if way == "stop" else 137), log
    run = only_run(runs)
    record = newest_record(run.folder)
    steps_committed = record["commits"][0]["progress"]["step"]
    assert 3 * STEPS_PER_EPOCH <= steps_committed < EPOCHS * STEPS_PER_EPOCH
    assert record["state"] == ("interrupted" if way == "stop" else "running")
    assert not (run.folder / "result.json").exists()

    resumed = engine.run(images.job, *RESNET, runs=runs)
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing from step {steps_committed}" in resumed.stderr
    assert newest_record(run.folder)["attempt"] == 2
    assert run.outcome() == trained.resnet.outcome()
    assert_same_weights_and_optimizer(run, trained.resnet)


def wait_for_epochs(engine: Engine, container: str, runs: Path, epochs: int) -> None:
    """Wait until a container has committed so many epochs."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for folder in {record.parent for record in runs.glob("*/record-*.json")}:
            if len(newest_record(folder)["history"]) >= epochs:
                return
        running = engine("inspect", "--format", "{{.State.Running}}", container).stdout.strip()
        assert running == "true", engine("logs", container).stderr
        time.sleep(0.1)
    raise AssertionError(f"no {epochs} epochs in time:\n{engine('logs', container).stderr}")


def assert_same_weights_and_optimizer(run: Run, other: Run) -> None:
    """Bit for bit, in the final models of two runs."""
    import keras

    from job.model import keras_file

    models = [keras.saving.load_model(path.folder / "model.keras") for path in (run, other)]
    one, two = map(keras_file.state_of, models)
    assert one.optimizer[0] == EPOCHS * STEPS_PER_EPOCH  # Keras's count of iterations: a real optimizer state
    assert len(one.weights) > 20
    for mine, theirs in zip([*one.weights, *one.optimizer], [*two.weights, *two.optimizer], strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
