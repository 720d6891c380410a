"""The story in this process, on a tiny network: what a run leaves, and that no interruption changes a bit."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import pytest

from job import cifar10, portable, training
from job import cluster as hardware
from job.checkpoints import Record
from job.config import Cadence, Settings, recipe_of
from job.errors import Diverged, IdentityConflict, Interrupted, MissingInput, UsageError
from job.reporting import Reporter
from job.trainer import Trainer
from tests.support import TINY, assert_same_state, cluster_of, dataset_of

TIMES = {"wall_time", "seconds", "images_per_second"}
SETTINGS = Settings(network=TINY, epochs=2, batch_size=16, data="tiny", name="run", log_format="plain")


class Signal:
    """An interruption that a test asks for, after so many training calls."""

    def __init__(self, after_calls: int | None = None) -> None:
        self.calls = 0
        self.after_calls = after_calls
        self.seconds_left = 10.0

    @property
    def requested(self) -> bool:
        return self.after_calls is not None and self.calls >= self.after_calls

    def unsaved(self, value: bool) -> None:
        self.calls += value


class Evaluated(Signal):
    """An interruption once the record holds so many epochs."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries

    @property
    def requested(self) -> bool:
        record = Path("runs/other/record.json")
        return record.exists() and len(json.loads(record.read_text())["history"]) >= self.entries


@pytest.fixture(autouse=True)
def tiny_world(monkeypatch: Any) -> None:
    """108 training images, 30 test images and this process's devices."""
    monkeypatch.setattr(cifar10, "load", lambda source: dataset_of())
    monkeypatch.setattr(cifar10, "locate", lambda data: data)
    monkeypatch.setattr(hardware, "connect", lambda settings: cluster_of(settings.replicas or 1))


def train(settings: Settings = SETTINGS, signal: Signal | None = None) -> dict[str, Any]:
    return training.train(settings, cast(Any, signal or Signal()), Reporter("plain"))


def record_of(run: str) -> Record:
    return Record.from_bytes(Path(run, "record.json").read_bytes(), run)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list | tuple) else value


def newest_state(run: str) -> portable.State:
    commit = record_of(run).commits[0]
    return replace(portable.load(Path(run, commit.name)), loss_scale=commit.progress.loss_scale)


def assert_same_run(left: str, right: str) -> None:
    assert_same_state(newest_state(left), newest_state(right))
    assert without_times(record_of(left).history) == without_times(record_of(right).history)
    assert record_of(left).confusion == record_of(right).confusion


def test_a_run_leaves_what_it_promises() -> None:
    result = train()
    run = Path("runs/run")
    assert json.loads((run / "result.json").read_text()) == result
    assert result["epochs"] == 2
    assert result["steps"] == 14
    assert result["layers"] == 6
    assert result["parameters"] == keras.saving.load_model(run / "model.keras").count_params()
    assert sum(map(sum, result["confusion"])) == 30
    assert result["validation"]["on"] == "test set"
    assert result["test"] is None
    record = record_of("runs/run")
    assert record.state == "complete"
    assert [entry["step"] for entry in record.history] == [7, 14]
    assert [commit.progress.step for commit in record.commits] == [14, 7]
    assert result["validation"]["accuracy"] == record.history[-1]["validation"]["accuracy"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        Path(commit.name).name for commit in record.commits
    }
    assert (run / "model.keras").read_bytes() == (run / record.commits[0].name).read_bytes()


def test_a_finished_run_says_so_and_mends_its_files() -> None:
    first = train()
    Path("runs/run/result.json").unlink()
    Path("runs/run/train/events.out.tfevents.0000000007").unlink()
    attempt = record_of("runs/run").attempt
    assert train() == json.loads(Path("runs/run/result.json").read_text()) == first
    assert Path("runs/run/train/events.out.tfevents.0000000007").exists()
    assert record_of("runs/run").attempt == attempt


@pytest.mark.parametrize(
    ("recipe", "after_calls"),
    [("article", 1), ("article", 7), ("he", 11), ("fast", 10)],
    ids=["first step", "epoch's last step", "mid-epoch, augmented", "mid-epoch, muon"],
)
def test_interrupted_anywhere_it_ends_with_the_bits_of_an_undisturbed_run(
    recipe: Any, after_calls: Any, monkeypatch: Any
) -> None:
    settings = replace(SETTINGS, recipe=recipe_of(recipe))
    train(replace(settings, name="whole"))
    monkeypatch.setattr(training, "CALL_SECONDS", 1e-9)  # one step a call
    with pytest.raises(Interrupted, match="run the same command again"):
        train(settings, Signal(after_calls))
    stopped = record_of("runs/run")
    assert stopped.state == "interrupted"
    assert stopped.commits[0].progress.step == after_calls
    train(settings)
    assert_same_run("runs/run", "runs/whole")
    assert record_of("runs/run").attempt == 2


def test_a_signal_that_finds_everything_committed_is_recorded(monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "CALL_SECONDS", 1e-9)  # one step a call
    with pytest.raises(Interrupted, match="step 3 is committed"):
        train(replace(SETTINGS, commit_every=Cadence.parse("1steps")), Signal(3))
    assert record_of("runs/run").state == "interrupted"


def test_the_length_of_calls_and_the_cadence_of_commits_change_no_bit(monkeypatch: Any) -> None:
    train(replace(SETTINGS, name="whole"))
    monkeypatch.setattr(training, "CALL_SECONDS", 1e-9)  # one step a call
    train(replace(SETTINGS, commit_every=Cadence.parse("4steps")))
    assert_same_run("runs/run", "runs/whole")


def test_more_epochs_extend_a_finished_run_to_the_bits_of_a_longer_one() -> None:
    train(replace(SETTINGS, epochs=1))
    result = train(replace(SETTINGS, epochs=2))
    train(replace(SETTINGS, epochs=2, name="whole"))
    assert_same_run("runs/run", "runs/whole")
    assert json.loads(Path("runs/run/result.json").read_text()) == result
    assert result["epochs"] == 2


def test_a_schedule_that_depends_on_the_length_is_not_extended() -> None:
    he = replace(SETTINGS, recipe=recipe_of("he"), epochs=1)
    train(he)
    with pytest.raises(IdentityConflict, match="epochs: 1, not 2"):
        train(replace(he, epochs=2))


def test_fewer_epochs_than_trained() -> None:
    train()
    assert train(replace(SETTINGS, epochs=1))["epochs"] == 2
    unfinished = replace(SETTINGS, epochs=6, name="other")
    with pytest.raises(Interrupted):
        train(unfinished, Evaluated(entries=2))
    with pytest.raises(UsageError, match=r"must not be below the [2-5] epochs that runs/other has .*, not 1"):
        train(replace(unfinished, epochs=1))


def test_the_same_name_with_another_identity_is_refused_and_says_what_differs() -> None:
    train()
    with pytest.raises(IdentityConflict) as caught:
        train(replace(SETTINGS, seed=1, batch_size=8))
    assert "batch_size: 16, not 8" in str(caught.value)
    assert "seed: 0, not 1" in str(caught.value)


def test_a_holdout_validates_and_the_test_set_is_evaluated_once(monkeypatch: Any) -> None:
    counts: list[int] = []
    inner = Trainer.predict

    def count(self: Trainer, split: Any, **images: Any) -> Any:
        counts.append(split.count)
        return inner(self, split, **images)

    monkeypatch.setattr(Trainer, "predict", count)
    result = train(replace(SETTINGS, holdout=20))
    assert counts == [20, 20, 30]
    assert result["validation"]["on"] == "hold-out"
    assert set(result["test"]) == {"loss", "accuracy"}
    assert sum(map(sum, result["confusion"])) == 30
    assert result["steps"] == 2 * 6


@pytest.mark.parametrize(
    ("replicas", "sync"), [(1, True), (2, True), (2, False)], ids=["one", "synchronized", "unsynchronized"]
)
def test_evaluate_agrees_to_the_last_digit(replicas: Any, sync: Any) -> None:
    result = train(replace(SETTINGS, replicas=replicas, sync_batch_norm=sync))
    evaluated = training.evaluate("runs/run", data="tiny")
    assert evaluated["validation"] == {key: result["validation"][key] for key in ("loss", "accuracy")}


def test_a_run_continues_on_another_number_of_replicas() -> None:
    train(replace(SETTINGS, name="whole"))
    with pytest.raises(Interrupted):
        train(SETTINGS, Signal(3))
    train(replace(SETTINGS, replicas=2))
    mine, whole = (
        [entry["train"]["loss"] for entry in record_of(run).history] for run in ("runs/run", "runs/whole")
    )
    np.testing.assert_allclose(mine, whole, rtol=1e-2)
    assert mine != whole


def test_divergence_names_the_step_and_the_last_good_commit(monkeypatch: Any) -> None:
    inner, calls = Trainer.train_steps, itertools.count(1)

    def explode(self: Trainer, plan: Any, rates: Any, **rest: Any) -> Any:
        sums = inner(self, plan, rates, **rest)
        return replace(sums, loss=sums.loss * np.float32("nan")) if next(calls) == 8 else sums

    monkeypatch.setattr(Trainer, "train_steps", explode)
    monkeypatch.setattr(training, "CALL_SECONDS", 1e-9)
    with pytest.raises(Diverged, match=r"loss of step 8 is nan.*commit is of step 7"):
        train()
    record = record_of("runs/run")
    assert record.state == "diverged"
    assert record.commits[0].progress.step == 7


def test_evaluate_needs_a_run_and_its_data(monkeypatch: Any) -> None:
    with pytest.raises(MissingInput, match="runs/none"):
        training.evaluate("runs/none", data="tiny")
    train()
    monkeypatch.setattr(cifar10, "load", lambda source: replace(dataset_of(), sha256="6" * 64))
    with pytest.raises(IdentityConflict, match=r"5555.*6666"):
        training.evaluate("runs/run", data="tiny")


def test_batches_that_replicas_cannot_share_are_refused_with_valid_ones() -> None:
    with pytest.raises(
        UsageError, match=r"divide by the 2 replicas.*--batch-size 15.*valid near it: .*\b14\b"
    ):
        train(replace(SETTINGS, replicas=2, batch_size=15))


def test_too_large_a_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="must not exceed the 108 training images, but is 109"):
        train(replace(SETTINGS, batch_size=109))
