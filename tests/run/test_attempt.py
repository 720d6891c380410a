"""The story in this process, on a tiny network: what a run leaves, and that no interruption changes a bit."""

from __future__ import annotations

import errno
import itertools
import json
import time
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.compat.proto import event_pb2

from job.console import Reporter
from job.data import fetch, sources
from job.data.epoch_plan import EpochPlan
from job.domain.errors import (
    Diverged,
    IdentityConflict,
    Interrupted,
    MissingInput,
    ResourceUnavailable,
    StorageFailed,
    UsageError,
)
from job.domain.identity import Identity
from job.domain.network import CLASSES
from job.domain.recipe import RECIPES
from job.domain.record import Record
from job.domain.settings import Cadence, Settings
from job.engine import cluster as hardware
from job.engine import devices
from job.engine.recalibration import Recalibration
from job.engine.training_step import Trainer
from job.model import keras_file
from job.publish import events
from job.publish.publication import Publication
from job.run import agreement, attempt, cadence, chief, evaluate, loop, position
from job.run.committer import Committer
from job.run.reader import read_config, read_record
from job.store.local import LocalStore
from job.store.location import open_store
from tests.support import TINY, assert_same_state, cluster_of, dataset_of

TIMES = {"time", "wall_time", "seconds", "images_per_second"}
SETTINGS = Settings(
    network=TINY,
    epochs=2,
    batch_size=16,
    data="tiny",
    name="run",
    commit_every=Cadence.parse("1epoch"),  # whatever the speed of the machine
    log_format="plain",
)


class Signal:
    """An interruption that a test asks for, after so many training calls."""

    def __init__(self, after_calls: int | None = None) -> None:
        self.calls = 0
        self.after_calls = after_calls
        self.seconds_left = 10.0

    @property
    def requested(self) -> bool:
        return self.after_calls is not None and self.calls >= self.after_calls

    def note_unsaved_work(self, value: bool) -> None:
        self.calls += value


class Evaluated(Signal):
    """An interruption once the record holds so many epochs."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries

    @property
    def requested(self) -> bool:
        return Path("runs/other").exists() and len(record_of("runs/other").history) >= self.entries


@pytest.fixture(autouse=True)
def tiny_world(monkeypatch: Any) -> None:
    """108 training images, 30 test images and this process's devices."""
    monkeypatch.setattr(sources, "load", lambda source: dataset_of())  # of `evaluate`
    monkeypatch.setattr(fetch, "locate", lambda data, _: data)
    monkeypatch.setattr(sources, "digest_of", lambda source: "5" * 64)
    for connect in ("connect", "connect_alone"):
        monkeypatch.setattr(hardware, connect, lambda settings: cluster_of(settings.replicas or 1))


def train(settings: Settings = SETTINGS, signal: Signal | None = None) -> dict[str, Any]:
    return attempt.train(settings, cast(Any, signal or Signal()), dataset_of, Reporter("plain"))


def record_of(run: str) -> Record:
    with closing(open_store(run)) as store:
        return read_record(store)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list | tuple) else value


def newest_state(run: str) -> keras_file.State:
    commit = record_of(run).commits[0]
    scale = (commit.progress.loss_scale, commit.progress.finite_steps)
    return replace(keras_file.load(twin_of(run), Path(run, commit.name)), loss_scale=scale)


def twin_of(run: str) -> keras.Model:
    with closing(open_store(run)) as store:
        config = read_config(store)
    assert config is not None
    identity = Identity.from_json(config["identity"])
    return keras_file.plain_twin(identity.network, identity.recipe, precision=identity.precision, seed=1)


def assert_same_run(left: str, right: str) -> None:
    assert_same_state(newest_state(left), newest_state(right))
    assert without_times(record_of(left).history) == without_times(record_of(right).history)
    assert record_of(left).confusion == record_of(right).confusion
    assert anew_in(left) == anew_in(right)


def anew_in(run: str) -> Any:
    """What the result of a run has by batch statistics taken anew; None while there is no result."""
    finished = record_of(run).finished
    return finished.result["recalibrated"] if finished else None


def test_a_run_leaves_what_it_promises() -> None:
    result = train()
    run = Path("runs/run")
    assert json.loads((run / "result.json").read_text()) == result
    assert result["epochs"] == 2
    assert result["steps"] == 14
    assert result["layers"] == 6
    assert result["classes"] == json.loads((run / "config.json").read_text())["classes"] == list(CLASSES)
    assert result["parameters"] == keras.saving.load_model(run / "model.keras").count_params()
    assert sum(map(sum, result["confusion"])) == 30
    assert result["validation"]["on"] == "test set"
    assert result["test"] is None
    anew = result["recalibrated"]
    assert anew.keys() == {"images", "validation", "test"}
    assert anew["images"] == 108
    assert anew["test"] is None
    record = record_of("runs/run")
    assert record.state == "complete"
    assert [entry["step"] for entry in record.history] == [7, 14]
    assert [commit.progress.step for commit in record.commits] == [14, 7]
    assert result["validation"]["accuracy"] == record.history[-1]["validation"]["accuracy"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        Path(commit.name).name for commit in record.commits
    }
    assert (run / "model.keras").read_bytes() == (run / record.commits[0].name).read_bytes()


def test_the_account_of_two_attempts_adds_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # one step a call
    began = time.time()
    with pytest.raises(Interrupted):
        train(signal=Signal(10))
    account = train()["time"]
    record = record_of("runs/run")
    first, second = (owner.spent for owner in record.owners)
    assert first is not None
    assert second is not None
    assert first.ended
    assert second.ended
    assert account["attempts"] == 2
    assert account["wall_seconds"] == pytest.approx(first.seconds + second.seconds)
    assert account["training_seconds"] == pytest.approx(first.training + second.training, rel=1e-2)
    assert account["lost_seconds"] == pytest.approx(0.0, abs=1e-2)
    timing = record.commits[0].timing
    kept = account["training_seconds"] + account["evaluation_seconds"]
    assert account["training_seconds"] == pytest.approx(timing.trained)  # by the same clock
    assert account["goodput"] == pytest.approx(kept / account["wall_seconds"], rel=1e-2)
    # One process, whose age both attempts count.
    assert first.began == pytest.approx(second.began, abs=0.1)
    assert first.starting > began - first.began
    assert account["gap_seconds"] == 0.0
    assert first.restoring > 0.0
    assert second.committing > 0.0
    assert timing.trained < timing.total


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
    settings = replace(SETTINGS, recipe=RECIPES[recipe])
    train(replace(settings, name="whole"))
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # one step a call
    with pytest.raises(Interrupted, match="run the same command again"):
        train(settings, Signal(after_calls))
    stopped = record_of("runs/run")
    assert stopped.state == "interrupted"
    assert stopped.commits[0].progress.step == after_calls
    train(settings)
    assert_same_run("runs/run", "runs/whole")
    assert record_of("runs/run").attempt == 2


def test_a_signal_that_finds_everything_committed_is_recorded(monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # one step a call
    with pytest.raises(Interrupted, match="step 3 is committed"):
        train(replace(SETTINGS, commit_every=Cadence.parse("1steps")), Signal(3))
    assert record_of("runs/run").state == "interrupted"


@pytest.mark.parametrize("commit_every", ["4steps", "auto"])
def test_the_length_of_calls_and_the_cadence_of_commits_change_no_bit(
    commit_every: str, monkeypatch: Any
) -> None:
    train(replace(SETTINGS, name="whole"))
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # one step a call
    monkeypatch.setattr(cadence, "auto_seconds", lambda _: 0.0)
    train(replace(SETTINGS, commit_every=Cadence.parse(commit_every)))
    assert_same_run("runs/run", "runs/whole")


def failing_to_save(monkeypatch: Any, failures: set[int]) -> list[int]:
    """Let the disk be full at some of the checkpoints, counted from 1; the list grows with each try."""
    save = keras_file.save
    tries: list[int] = []

    def full(*arguments: Any) -> None:
        tries.append(len(tries) + 1)
        if tries[-1] in failures:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(keras_file, "save", full)
    submit = Committer.submit

    def submitted(committer: Committer, *arguments: Any) -> None:
        """What a commit met is known before the next call, however fast that is."""
        submit(committer, *arguments)
        wait([committer._in_flight] if committer._in_flight else [])

    monkeypatch.setattr(Committer, "submit", submitted)
    return tries


@pytest.mark.parametrize("failed", [1, 2], ids=["the first epoch's", "the last epoch's"])
def test_storage_that_failed_a_commit_gets_the_next_at_once(
    failed: int, monkeypatch: Any, capsys: Any
) -> None:
    """And a disk that is full no more has cost nothing."""
    train(replace(SETTINGS, name="undisturbed"))
    tries = failing_to_save(monkeypatch, {failed})
    train()
    assert_same_run("runs/run", "runs/undisturbed")
    assert len(tries) == 3
    assert "A commit failed, and what there is now is committed in its place" in capsys.readouterr().err
    if failed == 1:  # what replaced it was no epoch's end
        assert 7 < record_of("runs/run").commits[1].progress.step <= 14


def test_storage_that_fails_twice_ends_the_attempt(monkeypatch: Any) -> None:
    failing_to_save(monkeypatch, {2, 3})
    with pytest.raises(StorageFailed, match="No space left on device"):
        train(replace(SETTINGS, epochs=4))
    assert [commit.progress.step for commit in record_of("runs/run").commits] == [7]


def test_a_signal_commits_what_storage_failed_before(monkeypatch: Any) -> None:
    failing_to_save(monkeypatch, {1})
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # calls of one step
    monkeypatch.setattr(Committer, "failed", False)  # it becomes known only while the signal is obeyed
    settings = replace(SETTINGS, commit_every=Cadence(count=3, unit="steps"))
    with pytest.raises(Interrupted, match="step 3 is committed, run the same"):
        train(settings, Signal(after_calls=3))


@pytest.mark.parametrize(("left", "seconds"), [(11.5, 8.0), (59.5, 56.0), (2.0, 1.0)])
def test_a_longer_grace_gives_the_last_save_longer(left: float, seconds: float, monkeypatch: Any) -> None:
    given: list[float] = []
    monkeypatch.setattr(LocalStore, "finish_within", lambda _, seconds: given.append(seconds))
    signal = Signal(after_calls=1)
    signal.seconds_left = left
    with pytest.raises(Interrupted):
        train(signal=signal)
    assert given == [seconds]


def test_sums_do_not_depend_on_how_the_steps_were_split() -> None:
    losses = 10 ** np.random.default_rng(0).uniform(-7, 3, 391).astype(np.float32)
    whole = position._added_one_by_one(0.0, losses)
    split = 0.0
    for part in np.array_split(losses, 50):
        split = position._added_one_by_one(split, part)
    assert split == whole == np.cumsum(losses, dtype=np.float64)[-1]


def test_more_epochs_extend_a_finished_run_to_the_bits_of_a_longer_one() -> None:
    train(replace(SETTINGS, epochs=1))
    result = train(replace(SETTINGS, epochs=2))
    train(replace(SETTINGS, epochs=2, name="whole"))
    assert_same_run("runs/run", "runs/whole")
    assert json.loads(Path("runs/run/result.json").read_text()) == result
    assert result["epochs"] == 2


def test_a_finished_result_stays_while_the_run_is_extended(monkeypatch: Any) -> None:
    short = train(replace(SETTINGS, epochs=1))
    published = {name: Path("runs/run", name).read_bytes() for name in ("model.keras", "result.json")}
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # one step a call
    with pytest.raises(Interrupted):
        train(replace(SETTINGS, epochs=3), Signal(9))
    record = record_of("runs/run")
    assert (record.state, len(record.history)) == ("interrupted", 2)
    assert record.finished
    assert (record.finished.epochs, record.finished.result) == (1, short)
    assert record.finished.commit in record.restorable
    assert {name: Path("runs/run", name).read_bytes() for name in published} == published
    assert train(replace(SETTINGS, epochs=1)) == short, "it is asked for no more than it has finished"
    with pytest.raises(UsageError, match="must not be below the 3 epochs that runs/run has begun, not 2"):
        train(replace(SETTINGS, epochs=2))  # the state is two steps beyond them
    longer = train(replace(SETTINGS, epochs=3))
    train(replace(SETTINGS, epochs=3, name="whole"))
    assert_same_run("runs/run", "runs/whole")
    assert json.loads(Path("runs/run/result.json").read_text()) == longer
    assert len(record_of("runs/run").restorable) == 2, "the shorter one's checkpoint is let go"


def test_a_schedule_that_depends_on_the_length_is_not_extended() -> None:
    he = replace(SETTINGS, recipe=RECIPES["he"], epochs=1)
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
    assert counts == [20, 20, 30, 20, 30]  # the last two by batch statistics taken anew
    assert result["validation"]["on"] == "hold-out"
    assert set(result["test"]) == {"loss", "accuracy"}
    assert result["recalibrated"]["images"] == 108 - 20
    for name in ("validation", "test"):
        assert result["recalibrated"][name].keys() == {"loss", "accuracy"}
        assert result["recalibrated"][name]["loss"] != result[name]["loss"]
    evaluated = evaluate.evaluate("runs/run", data="tiny")
    assert evaluated["test"] == result["test"]
    assert evaluated["recalibrated"] == result["recalibrated"]
    assert sum(map(sum, result["confusion"])) == 30
    assert result["steps"] == 2 * 6


@pytest.mark.parametrize(
    ("replicas", "sync"), [(1, True), (2, True), (2, False)], ids=["one", "synchronized", "unsynchronized"]
)
def test_evaluate_agrees_to_the_last_digit(replicas: Any, sync: Any) -> None:
    result = train(replace(SETTINGS, replicas=replicas, sync_batch_norm=sync))
    evaluated = evaluate.evaluate("runs/run", data="tiny")
    assert evaluated["validation"] == {key: result["validation"][key] for key in ("loss", "accuracy")}
    assert evaluated["recalibrated"]["images"] == result["recalibrated"]["images"] == 108
    anew, expected = (one["recalibrated"]["validation"] for one in (evaluated, result))
    if replicas == 1:
        assert anew == expected
    else:  # statistics are summed in another order, and maps rounded to bfloat16, where the processor has it
        assert anew["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert anew["accuracy"] == pytest.approx(expected["accuracy"], abs=1.5 / 30)


def test_the_accuracy_by_statistics_taken_anew_is_that_of_the_saved_model_with_them() -> None:
    """By plain Keras and NumPy: 7 batches of training images, each layer's statistics over all of them."""
    result = train(replace(SETTINGS, precision="float32"))
    model = keras.saving.load_model("runs/run/model.keras")
    averages = [variable.numpy() for variable in model.non_trainable_variables]
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    inputs = keras.Model(model.input, [layer.input for layer in layers])
    data = dataset_of()
    order = EpochPlan.draw(images=108, seed=0, epoch=0).order
    batches = [
        inputs(data.train.images[order[first : first + 16]], training=True) for first in range(0, 108, 16)
    ]
    for layer, parts in zip(layers, zip(*batches, strict=True), strict=True):
        seen = np.concatenate([np.array(part, np.float64) for part in parts])
        layer.moving_mean.assign(seen.mean((0, 1, 2)))
        layer.moving_variance.assign(seen.var((0, 1, 2)))
    probabilities = model(data.test.images, training=False).numpy()
    loss = -np.log(probabilities[np.arange(30), data.test.labels]).mean()
    accuracy = (probabilities.argmax(1) == data.test.labels).mean()
    assert result["recalibrated"]["validation"] == pytest.approx(
        {"loss": loss, "accuracy": accuracy}, rel=1e-4
    )
    # The file has the averages that training left.
    found = keras.saving.load_model("runs/run/model.keras").non_trainable_variables
    assert all(np.array_equal(one, other.numpy()) for one, other in zip(averages, found, strict=True))
    assert result["validation"]["loss"] != pytest.approx(loss, rel=0.01)


class DuringRecalibration(Signal):
    """An interruption that is noticed the so many-th time that the attempt looks, after it began this."""

    def __init__(self, looks: int, monkeypatch: Any) -> None:
        super().__init__()
        self.left = looks
        self.begun = False
        inner = Recalibration.statistics

        def begin(*arguments: Any) -> Any:
            self.begun = True
            return inner(*arguments)

        monkeypatch.setattr(Recalibration, "statistics", begin)

    @property
    def requested(self) -> bool:
        self.left -= self.begun
        return self.left <= 0


@pytest.mark.parametrize("looks", [1, 7, 8], ids=["first batch", "all statistics", "evaluated"])
def test_a_signal_while_statistics_are_taken_anew_saves_those_of_training(
    looks: int, monkeypatch: Any
) -> None:
    """Where storage failed the last commit, so that the signal's is made from the devices."""
    train(replace(SETTINGS, name="whole"))
    tries = failing_to_save(monkeypatch, {2})
    settings = replace(SETTINGS, commit_every=Cadence.parse("1epoch"))
    with pytest.raises(Interrupted, match="step 14 is committed"):
        train(settings, DuringRecalibration(looks, monkeypatch))
    assert tries == [1, 2, 3]
    assert record_of("runs/run").finished is None
    train()
    assert_same_run("runs/run", "runs/whole")


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
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)
    with pytest.raises(Diverged, match=r"the loss of step 8 is nan.*; step 7 is committed"):
        train()
    record = record_of("runs/run")
    assert record.state == "diverged"
    assert record.commits[0].progress.step == 7


def test_weights_that_are_not_finite_are_not_committed_and_the_record_says_so(monkeypatch: Any) -> None:
    """Also where the loss of the step before is finite still."""
    inner = attempt.Attempt._snapshot

    def exploded(self: attempt.Attempt) -> Any:
        state, position = inner(self)
        weights = [np.full_like(array, np.nan) for array in state.weights]
        return replace(state, weights=weights), position

    monkeypatch.setattr(attempt.Attempt, "_snapshot", exploded)
    with pytest.raises(Diverged, match=r"the weights are not finite.*; nothing is committed yet"):
        train()
    record = record_of("runs/run")
    assert (record.state, record.commits) == ("diverged", ())


def test_a_validation_loss_that_is_not_finite_names_the_step_before_it(monkeypatch: Any) -> None:
    inner = Trainer.predict

    def explode(self: Trainer, split: Any, **rest: Any) -> Any:
        predictions = inner(self, split, **rest)
        return replace(predictions, loss=predictions.loss * np.float32("inf"))

    monkeypatch.setattr(Trainer, "predict", explode)
    with pytest.raises(Diverged, match=r"validation loss after step 7 is inf.*; nothing is committed yet"):
        train()


def test_a_smaller_last_batch_does_not_lengthen_the_calls_after_it(monkeypatch: Any) -> None:
    """At 0.01 s an image, 3 steps of 16 images fit in half a second; the last step of an epoch has 12."""
    clock, calls = itertools.count(), []
    now = [0.0]
    inner = Trainer.train_steps

    def timed(self: Trainer, batches: Any, rates: Any) -> Any:
        calls.append(len(rates))
        sums = inner(self, batches, rates)
        now[0] += 0.01 * batches.order.size
        return sums

    monkeypatch.setattr(Trainer, "train_steps", timed)
    clocks = SimpleNamespace(monotonic=lambda: now[0] + 1e-9 * next(clock), time=time.time)
    monkeypatch.setattr("job.run.stopwatch.time", clocks)
    train()
    assert calls == [1, 1, 3, 1, 1, 3, 3, 1]


def test_a_signal_whose_commit_could_not_be_published_has_saved_everything(monkeypatch: Any) -> None:
    publish = Publication.publish

    def fail(publication: Publication, record: Record) -> None:
        if record.state == "interrupted":
            raise StorageFailed("the time for storage was used up")
        publish(publication, record)

    monkeypatch.setattr(Publication, "publish", fail)
    monkeypatch.setattr(loop, "CALL_SECONDS", 1e-9)  # calls of one step
    with pytest.raises(Interrupted, match="step 3 is committed, run the same"):
        train(SETTINGS, Signal(after_calls=3))


def damage_newest_commit(run: str) -> None:
    Path(run, record_of(run).commits[0].name).write_bytes(b"garbage")


@pytest.mark.parametrize("outage", [False, True], ids=["at once", "after an outage"])
def test_epochs_that_are_trained_again_are_shown_as_they_were_trained_last(
    outage: bool, monkeypatch: Any
) -> None:
    train()
    before = record_of("runs/run").history
    damage_newest_commit("runs/run")

    def fail(*_: Any) -> None:
        raise StorageFailed("after the record was cut, before what it has no more was withdrawn")

    if outage:
        with monkeypatch.context() as patch:
            patch.setattr(chief, "withdraw", fail)
            with pytest.raises(StorageFailed, match="after the record was cut"):
                train(replace(SETTINGS, epochs=3))
        assert len(record_of("runs/run").history) == 1
    train(replace(SETTINGS, epochs=3))
    after = record_of("runs/run").history
    assert [entry["step"] for entry in after] == [7, 14, 21]
    assert not Path("runs/run", events.segment_name(14, events.FINAL)).exists()
    assert after[0] == before[0]
    assert after[1]["wall_time"] > before[1]["wall_time"]
    for entry in after:
        validation = events.segment_name(entry["step"])
        for name in (validation, f"train/{validation}"):
            loader = event_file_loader.RawEventFileLoader(str(Path("runs/run", name)))
            times = {event_pb2.Event.FromString(data).wall_time for data in loader.Load()}
            assert times == {entry["wall_time"]}


def test_evaluate_takes_the_newest_whole_commit() -> None:
    train()
    damage_newest_commit("runs/run")
    evaluated = evaluate.evaluate("runs/run", data="tiny")
    assert evaluated["step"] == 7
    first = record_of("runs/run").history[0]["validation"]
    assert evaluated["validation"] == {key: first[key] for key in ("loss", "accuracy")}


def test_evaluate_needs_no_leave_to_write_where_the_run_is(monkeypatch: Any) -> None:
    train()
    monkeypatch.setattr(LocalStore, "_new_file", None)
    assert evaluate.evaluate("runs/run", data="tiny")["step"] == 14


# --- what run it is


def test_a_run_stays_in_the_precision_that_it_began_in(monkeypatch: Any, capsys: Any) -> None:
    settings = replace(SETTINGS, name=None, epochs=1)
    fastest = "float32"

    def resolve(wanted: str, *, filters: int, replicas: int | None) -> str:
        return fastest if wanted == "auto" else wanted

    monkeypatch.setattr(devices, "resolve_precision", resolve)
    train(settings)
    (run,) = Path("runs").glob("resnet*")
    fastest = "bfloat16"  # the next attempt finds other hardware
    train(replace(settings, epochs=2))
    assert list(Path("runs").glob("resnet*")) == [run]
    assert len(record_of(str(run)).history) == 2
    assert (
        f"{run.name} computes in float32, as it began; bfloat16 would be faster here"
        in capsys.readouterr().err
    )
    train(replace(settings, precision="bfloat16"))
    assert len(list(Path("runs").glob("resnet*"))) == 2


def worker(index: int, chiefs: Settings) -> Any:
    """A worker whose chief was started with these settings."""
    identity = chiefs.identity(precision="float32", data_sha256="5" * 64)
    asked = {"epochs": chiefs.epochs, "name": chiefs.name, "program": agreement.program()}
    data = json.dumps({**identity.to_json(), **asked}).encode()
    calls = {"from_chief": lambda mine: data, "any_worker": bool, "leave_together": lambda: None}
    strategy = tf.distribute.get_strategy()
    return SimpleNamespace(index=index, workers=2, is_chief=False, strategy=strategy, **calls)


def test_workers_take_the_chiefs_precision_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = SETTINGS.identity(precision="bfloat16", data_sha256="5" * 64)
    agreed = agreement.agreed_identity(mine, SETTINGS, worker(1, SETTINGS))
    assert agreed == replace(mine, precision="float32")
    for other, message in (
        (replace(SETTINGS, seed=1), "seed: 0, not 1"),
        (replace(SETTINGS, epochs=3), "epochs: 2, not 3"),
        (replace(SETTINGS, name="other"), "name: 'run', not 'other'"),
        (replace(SETTINGS, recipe=replace(RECIPES["article"], learning_rate=0.5)), "recipe_values: "),
    ):
        with pytest.raises(IdentityConflict, match=f"worker 1 was asked for another run .*{message}"):
            agreement.agreed_identity(mine, SETTINGS, worker(1, other))
    older = worker(1, SETTINGS)
    monkeypatch.setattr(agreement, "__version__", "99.0")
    with pytest.raises(IdentityConflict, match=r"program: '99\.0, source .*, TensorFlow .*', not '"):
        agreement.agreed_identity(mine, SETTINGS, older)
    monkeypatch.undo()
    with pytest.raises(IdentityConflict, match="precision: 'bfloat16', not 'float32'"):
        agreement.agreed_identity(mine, replace(SETTINGS, precision="bfloat16"), worker(1, SETTINGS))


def test_workers_restore_the_chiefs_commit_or_none() -> None:
    train()
    record, twin = record_of("runs/run"), twin_of("runs/run")

    def load(path: Path) -> keras_file.State:
        return keras_file.load(twin, path)

    with closing(open_store("runs/run")) as store:
        assert agreement.restored(store, Record(), worker(1, SETTINGS), load) is None
        restored = agreement.restored(store, record, worker(1, SETTINGS), load)
        assert restored
        assert_same_state(
            replace(restored, loss_scale=newest_state("runs/run").loss_scale), newest_state("runs/run")
        )
        damage_newest_commit("runs/run")
        with pytest.raises(StorageFailed, match="worker 1 cannot read the commit from which worker 0"):
            agreement.restored(store, record, worker(1, SETTINGS), load)


def test_only_what_a_lost_peer_can_cause_is_called_a_lost_peer() -> None:
    with pytest.raises(tf.errors.ResourceExhaustedError), agreement.leaving_together(worker(1, SETTINGS)):
        raise tf.errors.ResourceExhaustedError(None, None, "no memory")
    with (
        pytest.raises(ResourceUnavailable, match="worker 1 lost a peer: reset"),
        agreement.leaving_together(worker(1, SETTINGS)),
    ):
        raise tf.errors.UnavailableError(None, None, "reset")


def test_evaluate_needs_a_run_and_its_data(monkeypatch: Any) -> None:
    with pytest.raises(MissingInput, match="runs/none"):
        evaluate.evaluate("runs/none", data="tiny")
    train()
    monkeypatch.setattr(sources, "digest_of", lambda source: "6" * 64)
    with pytest.raises(IdentityConflict, match=r"5555.*6666"):
        evaluate.evaluate("runs/run", data="tiny")


def test_a_batch_without_an_image_for_each_replica_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--batch-size must be at least 2, .* but is 1; example: --batch-size 2"
    ):
        train(replace(SETTINGS, replicas=2, batch_size=1))


def test_too_large_a_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="must not exceed the 108 training images, but is 109"):
        train(replace(SETTINGS, batch_size=109))
