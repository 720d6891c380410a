from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job import portable
from job.batches import EpochPlan
from job.cifar10 import Split
from job.config import recipe_of
from job.normalization import COMPOSED, FUSED, BatchNormalization, normalize
from job.startup import processor_flags
from job.trainer import DeviceSplit, Predictions, Trainer
from tests.support import assert_same_state, cluster_of, identity_of, split_of, trainer_of

RATE = 0.001


def plan_of(images: int = 40, **changes: Any) -> EpochPlan:
    return EpochPlan.draw(**{"images": images, "seed": 0, "epoch": 0, **changes})


def steps(trainer: Trainer, count: int, *, first: int = 0, batch: int = 8, **changes: Any) -> Any:
    plan = plan_of(trainer.train_split.count, **changes).batches(first=first, count=count, batch_size=batch)
    return trainer.train_steps(plan, np.full(count, RATE, np.float32))


def spy_on_batches(trainer: Trainer, seen: list[tuple[int, np.ndarray]], change: Any = None) -> None:
    """Record each replica's images (their first pixel tells which) before the trainer sees them."""
    inner = trainer._forward_backward

    def forward_backward(images: Any, labels: Any, global_batch: Any, scale: Any) -> Any:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group

        def note(replica: Any, pixels: Any) -> np.int32:
            seen.append((int(replica), np.array(pixels)))
            return np.int32(0)

        with tf.control_dependencies([tf.numpy_function(note, [replica, images[:, 0, 0]], tf.int32)]):
            loss, correct, gradients = inner(tf.identity(images), labels, global_batch, scale)
        return loss, correct, change(replica, gradients) if change else gradients

    trainer._forward_backward = forward_backward


def numbered(count: int) -> Split:
    split = split_of(count)
    split.images[:, 0, 0, 0] = np.arange(count) // 200
    split.images[:, 0, 0, 1] = np.arange(count) % 200
    return split


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_image_is_trained_once_an_epoch_and_evaluated_once(replicas: Any) -> None:
    trainer = trainer_of(replicas=replicas, train=numbered(44))
    seen: list[tuple[int, np.ndarray]] = []
    spy_on_batches(trainer, seen)
    steps(trainer, 5)
    steps(trainer, 1, first=5)  # the smaller last batch: 4 images
    ids = [int(pixel[0]) * 200 + int(pixel[1]) for _, pixels in seen for pixel in pixels]
    assert Counter(ids) == Counter(range(44))
    assert {replica for replica, _ in seen} == set(range(replicas))
    sizes = Counter(len(pixels) for _, pixels in seen)
    assert sizes == Counter({8 // replicas: 5 * replicas, 4 // replicas: replicas})

    split = split_of(30)
    parts = [trainer.predict(DeviceSplit(split, cluster_of(replicas).strategy), first=0, count=30)]
    one = trainer_of(train=numbered(44))
    one.state = trainer.state
    whole = one.predict(DeviceSplit(split, cluster_of().strategy), first=0, count=30)
    assert len(parts[0].loss) == 30
    np.testing.assert_array_equal(parts[0].loss, whole.loss)
    np.testing.assert_array_equal(parts[0].predicted, whole.predicted)


@pytest.mark.parametrize("recipe", ["article", "he", "fast"])
def test_one_and_two_replicas_agree_with_synchronized_statistics(recipe: Any) -> None:
    one, two = (trainer_of(identity_of(recipe=recipe), replicas=replicas) for replicas in (1, 2))
    for step in range(5):
        np.testing.assert_allclose(steps(two, 1, first=step).loss, steps(one, 1, first=step).loss, rtol=1e-5)
    for left, right in zip(one.state.weights, two.state.weights, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


def test_without_synchronization_all_replicas_hold_the_mean_of_their_statistics() -> None:
    trainer = trainer_of(identity_of(sync_batch_norm=False), replicas=2)
    for step in range(2):
        steps(trainer, 1, first=step)
        for variable in trainer.network.non_trainable_variables:
            left, right = (value.numpy() for value in variable.value.values)
            np.testing.assert_array_equal(left, right)
    # Each replica normalizes by its own half: what moves is the mean of both halves' means.
    order = plan_of().order[:16].reshape(2, 2, 4)
    pixels = split_of(40).images[order].astype(np.float64)  # [step, replica, image, height, width, channel]
    expected = np.zeros(3)
    for step_pixels in pixels:
        expected = 0.99 * expected + 0.01 * step_pixels.mean(axis=(1, 2, 3)).mean(axis=0)
    np.testing.assert_allclose(trainer.network.non_trainable_variables[0].numpy(), expected, rtol=1e-5)


def test_synchronized_and_unsynchronized_statistics_are_different_things() -> None:
    losses = [
        steps(trainer_of(identity_of(sync_batch_norm=sync), replicas=2), 2).loss for sync in (True, False)
    ]
    assert not np.allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("bad_replica", [0, 1])
def test_float16_infinity_on_one_replica_skips_the_step_on_all(bad_replica: Any) -> None:
    trainer = trainer_of(identity_of(precision="float16"), replicas=2)

    def spoil(replica: Any, gradients: list[Any]) -> list[Any]:
        spoiled = gradients[3] + tf.where(tf.equal(replica, bad_replica), np.inf, 0.0)
        return [*gradients[:3], spoiled, *gradients[4:]]

    before = trainer.state
    spy_on_batches(trainer, [], change=spoil)
    steps(trainer, 1)
    after = trainer.state
    trainable = {id(variable) for variable in trainer.network.trainable_variables}
    for variable, left, right in zip(trainer.network.variables, before.weights, after.weights, strict=True):
        if id(variable) in trainable:
            np.testing.assert_array_equal(left, right)
    learning_rate = 1  # is set at every step
    for index, (left, right) in enumerate(zip(before.optimizer, after.optimizer, strict=True)):
        if index != learning_rate:
            np.testing.assert_array_equal(left, right)
    assert after.loss_scale == (before.loss_scale[0] / 2, 0)


def test_float16_finite_step_trains() -> None:
    trainer = trainer_of(identity_of(precision="float16"))
    before = trainer.state
    steps(trainer, 1)
    assert trainer.state.loss_scale == (before.loss_scale[0], 1)
    assert not np.array_equal(before.weights[4], trainer.state.weights[4])


def test_a_float16_step_is_scaled_back() -> None:
    """By SGD, whose steps are as long as the gradients are."""
    half, whole = (trainer_of(identity_of(recipe="he", precision=name)) for name in ("float16", "float32"))
    before = whole.state
    for trainer in (half, whole):
        steps(trainer, 1)
    for old, left, right in zip(before.weights, half.state.weights, whole.state.weights, strict=True):
        assert np.linalg.norm(left - right) <= 0.3 * np.linalg.norm(right - old) + 1e-6


def test_the_recipe_fast_moves_convolutions_by_orthogonal_steps() -> None:
    trainer = trainer_of(identity_of(recipe="fast"))
    (kernel, *_) = [variable for variable in trainer.network.trainable_variables if len(variable.shape) == 4]
    before = kernel.numpy()
    steps(trainer, 1)
    moved = np.linalg.svd((kernel.numpy() - before).reshape(-1, kernel.shape[-1]), compute_uv=False)
    assert np.median(moved) == pytest.approx(RATE, rel=0.35)
    assert moved.max() < 1.3 * RATE


@pytest.mark.parametrize("split", [(1, 1, 1, 1), (4,), (1, 3), (2, 2)])
def test_no_bit_depends_on_how_steps_are_split_into_calls(split: Any) -> None:
    reference, trainer = trainer_of(), trainer_of()
    expected = steps(reference, 4)
    losses: list[float] = []
    for count in split:
        losses += steps(trainer, count, first=len(losses)).loss.tolist()
    assert losses == expected.loss.tolist()
    assert_same_state(trainer.state, reference.state)


@pytest.mark.parametrize("nesterov", [False, True])
def test_coupled_weight_decay_and_momentum_match_numpy_steps(nesterov: Any) -> None:
    identity = identity_of(recipe="he")
    trainer = trainer_of(replace(identity, recipe=replace(identity.recipe, nesterov=nesterov)))
    gradients: list[list[np.ndarray]] = []
    inner = trainer._forward_backward

    def record(*arguments: Any) -> Any:
        loss, correct, values = inner(*arguments)

        def store(*arrays: Any) -> np.int32:
            gradients.append([np.array(array) for array in arrays])
            return np.int32(0)

        with tf.control_dependencies([tf.numpy_function(store, values, tf.int32)]):
            return tf.identity(loss), correct, values

    trainer._forward_backward = record
    variables = trainer.network.trainable_variables
    weights = [variable.numpy().astype(np.float64) for variable in variables]
    velocity = [np.zeros_like(weight) for weight in weights]
    for step in range(3):
        steps(trainer, 1, first=step)
        for index, variable in enumerate(variables):
            decayed = 1e-4 * weights[index] if variable.name == "kernel" else 0.0
            descent = -RATE * (gradients[step][index] + decayed)
            velocity[index] = 0.9 * velocity[index] + descent
            weights[index] = weights[index] + (
                0.9 * velocity[index] + descent if nesterov else velocity[index]
            )
    for variable, expected in zip(variables, weights, strict=True):
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-5, atol=1e-7)
    assert len([variable for variable in variables if variable.name == "kernel"]) == 7


def test_label_smoothing_matches_numpy() -> None:
    """Szegedy et al. 2016, *Rethinking the Inception Architecture*, section 7: q' = (1 - e) q + e / 10."""
    identity = identity_of()
    recipe = replace(identity.recipe, label_smoothing=0.1)
    words = np.random.default_rng(0)
    logits, labels = words.normal(size=(6, 10)), np.array([0, 3, 9, 3, 1, 5])
    losses = trainer_of(replace(identity, recipe=recipe))._image_losses(
        tf.constant(logits, tf.float32), tf.constant(labels, tf.int32)
    )
    targets = 0.9 * np.eye(10)[labels] + 0.01
    expected = -(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_the_rate_follows_its_schedule() -> None:
    def rates(name: str, total: int = 100) -> list[float]:
        return [recipe_of(name, 0.5).rate(step, total) for step in range(total)]

    np.testing.assert_allclose(rates("article"), np.full(100, 0.5))
    np.testing.assert_allclose(rates("he"), np.repeat([0.5, 0.05, 0.005], [50, 25, 25]))
    # Up over the first fifth, from the rate's first share to the highest, and down to nothing.
    np.testing.assert_allclose(rates("fast"), np.interp(range(100), [-1, 20, 100], [0, 0.5, 0]))
    assert all(0 < rate <= 0.5 for total in range(1, 8) for rate in rates("fast", total))


def test_labels_survive_order_and_augmentation() -> None:
    """With one image a class, training on shuffled and cropped images must see each image's own label."""
    trainer = trainer_of(identity_of(recipe="he"), train=numbered(40))
    pairs: list[tuple[int, int]] = []
    inner = trainer._forward_backward

    def record(images: Any, labels: Any, global_batch: Any, scale: Any) -> Any:
        def note(brightness: Any, classes: Any) -> np.int32:
            pairs.extend(zip(brightness.tolist(), classes.tolist(), strict=True))
            return np.int32(0)

        brightness = tf.reduce_max(tf.cast(images, tf.int32), axis=[1, 2, 3])
        with tf.control_dependencies([tf.numpy_function(note, [brightness, labels], tf.int32)]):
            return inner(tf.identity(images), labels, global_batch, scale)

    trainer._forward_backward = record
    steps(trainer, 5, crop_padding=4, flip=True)
    assert len(pairs) == 40
    assert all(abs(brightness - (119 + 13 * label)) <= 3 for brightness, label in pairs)


def test_rates_are_applied_step_by_step() -> None:
    trainer = trainer_of()
    plan = plan_of().batches(first=0, count=3, batch_size=8)
    trainer.train_steps(plan, np.array([1e-3, 1e-3, 0.0], np.float32))
    stopped = trainer.state
    reference = trainer_of()
    reference.train_steps(plan_of().batches(first=0, count=2, batch_size=8), np.full(2, 1e-3, np.float32))
    kernels = [index for index, variable in enumerate(trainer.network.variables) if variable.name == "kernel"]
    for index in kernels:
        np.testing.assert_array_equal(stopped.weights[index], reference.state.weights[index])
    assert stopped.optimizer[1] == 0.0


@pytest.mark.parametrize("recipe", ["article", "fast"])
def test_xla_computes_the_same(recipe: Any) -> None:
    plain, compiled = (trainer_of(identity_of(recipe=recipe), xla=xla) for xla in (False, True))
    before = plain.state
    np.testing.assert_allclose(steps(compiled, 3).loss, steps(plain, 3).loss, rtol=1e-4)
    for old, left, right in zip(before.weights, compiled.state.weights, plain.state.weights, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-3)
        assert np.abs(left - old).max() > np.abs(left - right).max()  # moving statistics, too


def test_predictions_are_summed_in_float64_over_every_image() -> None:
    loss = np.full(3, 0.1, np.float32)
    predictions = Predictions(loss, np.array([1, 2, 2], np.int32))
    labels = np.array([1, 2, 3])
    assert predictions.summary(labels) == {"loss": float(np.float64(loss[0])), "accuracy": 2 / 3}
    confusion = predictions.confusion(labels)
    assert (confusion[1][1], confusion[2][2], confusion[3][2]) == (1, 1, 1)
    assert sum(map(sum, confusion)) == 3


@pytest.mark.parametrize("recipe", ["article", "fast"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_saved_state_comes_back_bit_for_bit_and_opens_in_plain_keras(
    tmp_path: Any, precision: Any, recipe: Any
) -> None:
    identity = identity_of(precision=precision, recipe=recipe)
    trainer = trainer_of(identity)
    steps(trainer, 2)
    state = trainer.state
    twin = portable.plain_twin(identity.network, identity.recipe, precision=precision, seed=1)
    portable.save(twin, state, tmp_path / "x.keras")
    loaded = portable.load(tmp_path / "x.keras")
    assert_same_state(portable.State(loaded.weights, loaded.optimizer, state.loss_scale), state)
    model = keras.saving.load_model(tmp_path / "x.keras")
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert type(model.optimizer) is {"article": keras.optimizers.Adam, "fast": keras.optimizers.SGD}[recipe]
    assert int(model.optimizer.iterations) == 2
    split = split_of(30)
    probabilities = model(split.images.astype(np.float32), training=False).numpy()
    mine = trainer.predict(DeviceSplit(split, cluster_of().strategy), first=0, count=30)
    expected = -np.log(probabilities[np.arange(30), split.labels])
    np.testing.assert_allclose(mine.loss, expected, rtol={"float32": 1e-4}.get(precision, 0.05), atol=1e-3)


KERNELS = pytest.mark.parametrize("kernels", [FUSED, COMPOSED], ids=["fused", "composed"])


@KERNELS
@pytest.mark.parametrize("shape", [(8, 4, 4, 3), (4, 2, 2, 5), (1, 1, 1, 16), (6, 32, 32, 3)])
def test_normalization_equals_kerass(shape: Any, kernels: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = tf.constant(rng.normal(3.0, 2.0, shape), tf.float32)
    weights = tf.constant(rng.normal(size=shape), tf.float32)
    results = []
    for kind in (keras.layers.BatchNormalization, partial(BatchNormalization, kernels=kernels)):
        layer = kind()
        layer.build(shape)
        layer.gamma.assign(np.linspace(0.5, 2, shape[-1]))
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            total = tf.reduce_sum(outputs * weights)
        gradients = tape.gradient(total, [inputs, layer.gamma.value, layer.beta.value])
        results.append(
            [outputs, *gradients, layer.moving_mean, layer.moving_variance, layer(inputs, training=False)]
        )
    for expected, ours in zip(*results, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=2e-4, atol=2e-5)


@KERNELS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_normalization_is_as_accurate_as_its_numbers(precision: Any, kernels: Any) -> None:
    """Against float64, at a size where TensorFlow's own kernel is off by 3e-4 in the variance."""
    rng = np.random.default_rng(0)
    inputs = tf.cast(np.maximum(rng.normal(0.3, 1.0, (128, 32, 32, 16)), 0), precision)
    upstream = tf.cast(rng.normal(0.02, 1.0, inputs.shape), precision)
    gamma, beta = tf.constant(rng.uniform(0.5, 1.5, 16), tf.float32), tf.zeros(16)
    with tf.GradientTape() as tape:
        tape.watch([inputs, gamma, beta])
        outputs, mean, variance = normalize(
            inputs, gamma, beta, epsilon=1e-3, kernels=kernels, all_reduce=tf.identity
        )
    gradients = tape.gradient(outputs, [inputs, gamma, beta], output_gradients=upstream)

    x, dy = (np.asarray(tf.cast(values, tf.float64)) for values in (inputs, upstream))
    pixels, deviation = (0, 1, 2), np.sqrt(x.var((0, 1, 2)) + 1e-3)
    standardized = (x - x.mean(pixels)) / deviation
    to_gamma, to_beta = (dy * standardized).sum(pixels), dy.sum(pixels)
    to_inputs = dy - dy.mean(pixels) - standardized * (dy * standardized).mean(pixels)

    assert off(mean, x.mean(pixels)) < 1e-6
    # Without AVX-512, oneDNN leaves bfloat16 to TensorFlow's kernels. Unfolded, both are off by more.
    own = precision == "bfloat16" and kernels is FUSED and "avx512f" not in processor_flags()
    assert off(variance, x.var(pixels)) < (1e-5 if own else 1e-6)
    assert off(gradients[1], to_gamma) < 1e-5
    assert off(gradients[2], to_beta) < 1e-5
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-6}[precision]
    assert off(outputs, standardized * gamma.numpy()) < rounding
    assert off(gradients[0], gamma.numpy() / deviation * to_inputs) < rounding


def off(ours: Any, expected: np.ndarray) -> float:
    """The largest error, relative to the largest value."""
    return float(np.abs(np.asarray(tf.cast(ours, tf.float64)) - expected).max() / np.abs(expected).max())
