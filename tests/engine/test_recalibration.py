"""Statistics taken anew: against NumPy in float64, on any number of replicas; and they change nothing."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

from job.data.epoch_plan import EpochPlan
from job.engine import recalibration
from job.engine.device_split import DeviceSplit
from job.engine.recalibration import combined
from job.engine.training_step import Trainer
from job.model import networks
from job.model.batch_normalization import BatchNormalization, Statistics
from tests.support import TINY, assert_same_state, cluster_of, identity_of, split_of, trainer_of

BATCH = 8
IMAGES = 43  # five batches of 8 images, and a last one of 3
Arrays = list[npt.NDArray[Any]]


def trained(replicas: int = 1, *, images: int = IMAGES, **identity: Any) -> Trainer:
    """A trainer whose averages lag behind its weights."""
    one = trainer_of(identity_of(**identity), train=split_of(images))
    plan = EpochPlan.draw(images=images, seed=3, epoch=0).batches(first=0, count=4, batch_size=BATCH)
    one.train_steps(plan, np.full(4, 0.003, np.float32))
    if replicas == 1:
        return one
    many = trainer_of(identity_of(**identity), replicas=replicas, train=split_of(images))
    many.state = one.state
    return many


def in_order(trainer: Trainer, statistics: Statistics) -> Arrays:
    """Mean and variance of each layer, in the order of the network's layers."""
    layers = [layer for layer in trainer.network.layers if isinstance(layer, BatchNormalization)]
    assert {layer.name for layer in layers} == statistics.keys()
    return [value for layer in layers for value in statistics[layer.name]]


def exact(trainer: Trainer, images: int = IMAGES) -> Arrays:
    """What each normalization of the plain network sees in training, all of it, by NumPy in float64."""
    plain = keras.models.clone_model(networks.build(TINY), clone_function=in_float64)
    plain.set_weights([variable.numpy() for variable in trainer.network.variables])
    layers = [layer for layer in plain.layers if isinstance(layer, keras.layers.BatchNormalization)]
    inputs = keras.Model(plain.input, [layer.input for layer in layers])
    order = EpochPlan.draw(images=trainer.train_split.count, seed=0, epoch=0).order[:images]
    pixels = split_of(trainer.train_split.count).images[order].astype(np.float64)
    batches = [inputs(pixels[first : first + BATCH], training=True) for first in range(0, len(pixels), BATCH)]
    assert {layer.compute_dtype for layer in layers} == {"float64"}
    seen = [
        np.concatenate([np.array(part, np.float64) for part in of_layer])  # pixels come as exact float32
        for of_layer in zip(*batches, strict=True)
    ]
    assert {len(values) for values in seen} == {images}
    return [statistic for values in seen for statistic in (values.mean((0, 1, 2)), values.var((0, 1, 2)))]


def in_float64(layer: keras.layers.Layer) -> keras.layers.Layer:
    return type(layer).from_config({**layer.get_config(), "dtype": "float64"})


def assert_close(left: Arrays, right: Arrays, tolerance: float) -> None:
    """Relative to the largest value of each array; variances may be 0 where ReLU lets nothing through."""
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("recipe", ["article", "he"])
def test_they_are_the_exact_ones_of_all_images_as_they_are(recipe: Any) -> None:
    """Also with a recipe that augments, and of the last batch by its size."""
    trainer = trained(recipe=recipe)
    found = in_order(trainer, trainer.recalibration.statistics())
    assert_close(found, exact(trainer), 1e-5)
    pixels = split_of(IMAGES).images.astype(np.float64)
    assert_close(found[:2], [pixels.mean((0, 1, 2)), pixels.var((0, 1, 2))], 1e-6)
    # The averages are others: without that, the test would hold for them, too.
    moving = [variable.numpy() for variable in trainer.network.non_trainable_variables]
    assert np.abs(found[0] - moving[0]).min() > 50


def test_in_bfloat16_they_are_off_by_its_rounding() -> None:
    trainer = trained(precision="bfloat16")
    assert_close(in_order(trainer, trainer.recalibration.statistics()), exact(trainer), 0.05)


@pytest.mark.parametrize(("replicas", "sync"), [(2, True), (3, True), (7, True), (2, False)])
def test_any_number_of_replicas_finds_the_same(replicas: int, sync: bool) -> None:
    """The last batch has 3 images: of seven replicas, four have none. Training may be unsynchronized."""
    one, many = trained(), trained(replicas, sync_batch_norm=sync)
    expected, found = (in_order(trainer, trainer.recalibration.statistics()) for trainer in (one, many))
    assert_close(found, expected, 1e-5)


def test_the_kernels_of_gpus_and_xla_find_the_same() -> None:
    one = trained()
    other = trainer_of(train=split_of(IMAGES), xla=True)
    other.state = one.state
    # Their mean of squares was off by 4e-6 on a CPU.
    assert_close(in_order(other, other.recalibration.statistics()), exact(one), 1e-4)


def test_nothing_of_the_state_changes() -> None:
    """Neither by taking them nor by evaluating by them; training and evaluation go on as if nothing was."""
    trainer, other = trained(2), trained(2)
    validation = DeviceSplit(split_of(30, seed=1), trainer._strategy)
    before, predicted = trainer.state, trainer.predict(validation, first=0, count=30)

    statistics = trainer.recalibration.statistics()
    anew = trainer.predict(validation, first=0, count=30, statistics=statistics)

    assert not np.allclose(anew.loss, predicted.loss, rtol=0.1)
    assert_same_state(trainer.state, before)
    again = trainer.predict(validation, first=0, count=30)
    np.testing.assert_array_equal(again.loss, predicted.loss)
    plan = EpochPlan.draw(images=IMAGES, seed=4, epoch=0).batches(first=0, count=2, batch_size=BATCH)
    for one in (trainer, other):
        one.train_steps(plan, np.full(2, 0.003, np.float32))
    assert_same_state(trainer.state, other.state)


def test_evaluation_by_them_is_that_of_a_network_that_has_them() -> None:
    trainer = trained()
    split = split_of(30, seed=1)
    statistics = trainer.recalibration.statistics()
    found = trainer.predict(
        DeviceSplit(split, cluster_of().strategy), first=0, count=30, statistics=statistics
    )

    plain = networks.build(TINY)
    plain.set_weights([variable.numpy() for variable in trainer.network.variables])
    for variable, value in zip(plain.non_trainable_variables, in_order(trainer, statistics), strict=True):
        variable.assign(value)
    probabilities = plain(split.images.astype(np.float32), training=False).numpy()
    expected = -np.log(probabilities[np.arange(30), split.labels])
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4)


def test_ten_thousand_images_are_seen_in_whole_batches_or_all_if_there_are_fewer(monkeypatch: Any) -> None:
    assert recalibration.IMAGES == 10_000
    few = trained()
    assert few.recalibration.images == IMAGES

    monkeypatch.setattr(recalibration, "IMAGES", 20)
    enough = trained()
    assert enough.recalibration.images == 24
    calls: list[None] = []
    found = in_order(enough, enough.recalibration.statistics(lambda: calls.append(None)))
    assert len(calls) == 3
    assert_close(found, exact(enough, images=24), 1e-5)


def test_batches_are_combined_by_their_images_in_float64() -> None:
    """With a mean so far from 0 that float32 would lose the variance of ten thousand batches."""
    values = np.random.default_rng(0).normal(1000.0, 0.1, (10_000, 7, 3))
    batches = [(len(part), part[: 7 if index % 2 else 2]) for index, part in enumerate(values)]
    parts = [(len(part), {"layer": (part.mean(0), part.var(0))}) for _, part in batches]
    mean, variance = combined(parts)["layer"]
    whole = np.concatenate([part for _, part in batches])
    assert mean.dtype == variance.dtype == np.float32
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-7)
    np.testing.assert_allclose(variance, whole.var(0), rtol=1e-6)


def test_a_channel_that_is_constant_has_no_negative_variance() -> None:
    parts = [(3, {"layer": (np.array([0.1], np.float32), np.zeros(1, np.float32))})] * 1000
    assert combined(parts)["layer"][1] >= 0
