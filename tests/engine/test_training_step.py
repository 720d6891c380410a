from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.data.epoch_plan import EpochPlan
from job.data.records import Split
from job.domain.recipe import RECIPES
from job.engine.device_split import DeviceSplit, my_share
from job.engine.prediction import Predictions
from job.engine.training_step import Trainer
from job.model import keras_file
from tests.support import assert_same_state, cluster_of, identity_of, split_of, trainer_of

RATE = 0.001


def plan_of(images: int = 40, **changes: Any) -> EpochPlan:
    return EpochPlan.draw(**{"images": images, "seed": 0, "epoch": 0, **changes})


def steps(trainer: Trainer, count: int, *, first: int = 0, batch: int = 8, **changes: Any) -> Any:
    plan = plan_of(trainer.train_split.count, **changes).batches(first=first, count=count, batch_size=batch)
    return trainer.train_steps(plan, np.full(count, RATE, np.float32))


def spy_on_batches(trainer: Trainer, seen: list[tuple[int, np.ndarray]], change: Any = None) -> None:
    """Record each replica's images (their first pixel tells which) before the trainer sees them.

    Who has no image of a batch computes with one that is not counted, which is therefore not recorded.
    """
    inner = trainer._forward_backward

    def forward_backward(images: Any, labels: Any, *rest: Any) -> Any:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group

        def note(replica: Any, pixels: Any, counted: Any) -> np.int32:
            seen.append((int(replica), np.array(pixels) if counted else np.array(pixels)[:0]))
            return np.int32(0)

        counted = tf.constant(1.0) if rest[-1] is None else rest[-1]
        noted = tf.numpy_function(note, [replica, images[:, 0, 0], counted], tf.int32)
        with tf.control_dependencies([noted]):
            sums, gradients = inner(tf.identity(images), labels, *rest)
        return sums, change(replica, gradients) if change else gradients

    trainer._forward_backward = forward_backward


def numbered(count: int) -> Split:
    split = split_of(count)
    split.images[:, 0, 0, 0] = np.arange(count) // 200
    split.images[:, 0, 0, 1] = np.arange(count) % 200
    return split


@pytest.mark.parametrize(
    ("replicas", "images", "shares"),
    [
        (1, 44, {8: 5, 4: 1}),
        (2, 44, {4: 10, 2: 2}),
        (3, 42, {3: 10, 2: 5, 1: 2, 0: 1}),  # 8 = 3 + 3 + 2, and the last batch of 2 leaves one without
        (7, 45, {2: 5, 1: 35, 0: 2}),  # 8 = 2 + 6 x 1, and 5 = 5 x 1
    ],
)
def test_every_image_is_trained_once_an_epoch_and_evaluated_once(
    replicas: int, images: int, shares: dict[int, int]
) -> None:
    trainer = trainer_of(replicas=replicas, train=numbered(images))
    seen: list[tuple[int, np.ndarray]] = []
    spy_on_batches(trainer, seen)
    steps(trainer, 5)
    steps(trainer, 1, first=5)  # the smaller last batch
    ids = [int(pixel[0]) * 200 + int(pixel[1]) for _, pixels in seen for pixel in pixels]
    assert Counter(ids) == Counter(range(images))
    assert {replica for replica, _ in seen} == set(range(replicas))
    sizes = Counter(len(pixels) for _, pixels in seen)
    assert sum(sizes.values()) == 6 * replicas
    assert sizes == Counter(shares)

    split = split_of(30)
    part = trainer.predict(DeviceSplit(split, cluster_of(replicas).strategy), first=0, count=30)
    one = trainer_of(train=numbered(images))
    one.state = trainer.state
    whole = one.predict(DeviceSplit(split, cluster_of().strategy), first=0, count=30)
    assert len(part.loss) == 30
    np.testing.assert_array_equal(part.loss, whole.loss)
    np.testing.assert_array_equal(part.predicted, whole.predicted)


def test_shares_differ_by_one_image_at_most_and_join_to_the_batch() -> None:
    for replicas in (1, 2, 3, 5, 7):
        strategy = cluster_of(replicas).strategy
        for batch in (1, 2, 3, 7, 8, 80, 128):
            shares = strategy.run(my_share, args=(tf.constant(batch),))
            firsts, sizes = ([int(x) for x in strategy.experimental_local_results(each)] for each in shares)
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
            assert firsts == [sum(sizes[:replica]) for replica in range(replicas)]
            assert sum(sizes) == batch


@pytest.mark.parametrize("replicas", [2, 3, 5, 7])
def test_any_number_of_replicas_follows_one_device_over_an_epoch(replicas: int) -> None:
    """5 steps of 16 images, and a last one of 3, in which some replicas have no image."""
    one, many = (trainer_of(replicas=count, train=split_of(83)) for count in (1, replicas))
    for step in range(6):
        sums, expected = (steps(trainer, 1, first=step, batch=16) for trainer in (many, one))
        np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-5 if step < 5 else 1e-4)
        np.testing.assert_array_equal(sums.correct, expected.correct)
    for variable, left, right in zip(
        one.network.variables, one.state.weights, many.state.weights, strict=True
    ):
        # Adam moves a weight by the rate whatever its gradient's size, so rounding is amplified.
        tolerance = 2e-5 if "moving" in variable.name else 1e-3
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=tolerance * max(1.0, np.abs(left).max()))


@pytest.mark.parametrize("replicas", [5, 7])
def test_replicas_without_an_image_add_nothing_to_a_step(replicas: int) -> None:
    """By SGD, whose step is the gradient; a last batch of 3 images leaves 2 or 4 replicas without."""
    one, many = (
        trainer_of(identity_of(recipe="he"), replicas=count, train=split_of(3)) for count in (1, replicas)
    )
    before = one.state.weights
    for trainer in (one, many):
        steps(trainer, 1, batch=3)
    for old, left, right in zip(before, one.state.weights, many.state.weights, strict=True):
        moved = np.abs(left - old).max()
        np.testing.assert_allclose(right - old, left - old, rtol=1e-3, atol=1e-3 * moved + 1e-7)


@pytest.mark.parametrize("replicas", [3, 7])
def test_one_step_of_uneven_shares_moves_the_weights_as_one_device_does(replicas: int) -> None:
    """By SGD, whose step is the gradient; 80 images are 27 + 27 + 26, and 12 or 11 each of seven."""
    one, many = (
        trainer_of(identity_of(recipe="he"), replicas=count, train=split_of(80)) for count in (1, replicas)
    )
    before = one.state.weights
    for trainer in (one, many):
        steps(trainer, 1, batch=80)
    for old, left, right in zip(before, one.state.weights, many.state.weights, strict=True):
        moved = np.abs(left - old).max()
        np.testing.assert_allclose(right - old, left - old, rtol=1e-3, atol=1e-4 * moved + 1e-7)


@pytest.mark.parametrize("recipe", ["article", "he", "fast"])
def test_one_and_two_replicas_agree_with_synchronized_statistics(recipe: Any) -> None:
    one, two = (trainer_of(identity_of(recipe=recipe), replicas=replicas) for replicas in (1, 2))
    for step in range(5):
        np.testing.assert_allclose(steps(two, 1, first=step).loss, steps(one, 1, first=step).loss, rtol=1e-5)
    for left, right in zip(one.state.weights, two.state.weights, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("replicas", "batches"), [(2, (8, 8)), (3, (8, 8)), (7, (16, 16, 3))], ids=["even", "uneven", "none"]
)
def test_without_synchronization_all_replicas_hold_the_mean_of_their_statistics_by_images(
    replicas: int, batches: tuple[int, ...]
) -> None:
    images = sum(batches)
    trainer = trainer_of(identity_of(sync_batch_norm=False), replicas=replicas, train=split_of(images))
    for step in range(len(batches)):
        loss = steps(trainer, 1, first=step, batch=batches[0]).loss
        assert np.isfinite(loss).all()
        for variable in trainer.network.non_trainable_variables:
            first, *others = (value.numpy() for value in variable.value.values)
            for other in others:
                np.testing.assert_array_equal(first, other)
    # Each replica normalizes by its own share. The mean of the shares' means, by images, is the batch's mean;
    # the mean of their variances is not the batch's variance.
    order, at = plan_of(images).order, 0
    mean, variance = np.zeros(3), np.ones(3)
    for batch in batches:
        pixels = split_of(images).images[order[at : at + batch]].astype(np.float64)
        shares = np.array_split(pixels, replicas)  # the first ones are larger by one
        own = sum(len(share) * share.var(axis=(0, 1, 2)) for share in shares if len(share)) / batch
        mean = 0.99 * mean + 0.01 * pixels.mean(axis=(0, 1, 2))
        variance = 0.99 * variance + 0.01 * own
        at += batch
    by_name = {
        variable.name: variable.numpy() for variable in reversed(trainer.network.non_trainable_variables)
    }
    np.testing.assert_allclose(by_name["moving_mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(by_name["moving_variance"], variance, rtol=1e-5)


def test_synchronized_and_unsynchronized_statistics_are_different_things() -> None:
    losses = [
        steps(trainer_of(identity_of(sync_batch_norm=sync), replicas=2), 2).loss for sync in (True, False)
    ]
    assert not np.allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize(("replicas", "bad_replica"), [(2, 0), (2, 1), (3, 2)])
def test_float16_infinity_on_one_replica_skips_the_step_on_all(replicas: Any, bad_replica: Any) -> None:
    trainer = trainer_of(identity_of(precision="float16"), replicas=replicas)

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
        sums, values = inner(*arguments)

        def store(*arrays: Any) -> np.int32:
            gradients.append([np.array(array) for array in arrays])
            return np.int32(0)

        with tf.control_dependencies([tf.numpy_function(store, values, tf.int32)]):
            return tf.identity(sums), values

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
        return [replace(RECIPES[name], learning_rate=0.5).rate(step, total) for step in range(total)]

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

    def record(images: Any, labels: Any, *rest: Any) -> Any:
        def note(brightness: Any, classes: Any) -> np.int32:
            pairs.extend(zip(brightness.tolist(), classes.tolist(), strict=True))
            return np.int32(0)

        brightness = tf.reduce_max(tf.cast(images, tf.int32), axis=[1, 2, 3])
        with tf.control_dependencies([tf.numpy_function(note, [brightness, labels], tf.int32)]):
            return inner(tf.identity(images), labels, *rest)

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


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_is_traced_once_whatever_the_number_of_images_in_its_calls(replicas: int) -> None:
    trainer, split = trainer_of(replicas=replicas), split_of(600 * replicas)
    images = DeviceSplit(split, cluster_of(replicas).strategy)
    for count in (250, 250, 500, 100):
        trainer.predict(images, first=0, count=count * replicas)
    assert trainer.predictor._call.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("recipe", ["article", "fast"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_saved_state_comes_back_bit_for_bit_and_opens_in_plain_keras(
    tmp_path: Any, precision: Any, recipe: Any
) -> None:
    identity = identity_of(precision=precision, recipe=recipe)
    trainer = trainer_of(identity)
    steps(trainer, 2)
    state = trainer.state
    twin = keras_file.plain_twin(identity.network, identity.recipe, precision=precision, seed=1)
    keras_file.save(twin, state, tmp_path / "x.keras")
    fresh = keras_file.plain_twin(identity.network, identity.recipe, precision=precision, seed=2)
    loaded = keras_file.load(fresh, tmp_path / "x.keras")
    assert_same_state(keras_file.State(loaded.weights, loaded.optimizer, state.loss_scale), state)
    model = keras.saving.load_model(tmp_path / "x.keras")
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert type(model.optimizer) is {"article": keras.optimizers.Adam, "fast": keras.optimizers.SGD}[recipe]
    assert int(model.optimizer.iterations) == 2
    split = split_of(30)
    probabilities = model(split.images.astype(np.float32), training=False).numpy()
    mine = trainer.predict(DeviceSplit(split, cluster_of().strategy), first=0, count=30)
    expected = -np.log(probabilities[np.arange(30), split.labels])
    np.testing.assert_allclose(mine.loss, expected, rtol={"float32": 1e-4}.get(precision, 0.05), atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "operation"), [("article", "ResourceApplyAdam"), ("he", "ResourceApplyKerasMomentum")]
)
def test_a_variable_is_updated_by_one_operation(recipe: Any, operation: str) -> None:
    trainer = trainer_of(identity_of(recipe=recipe))
    graph = trainer._train_call.get_concrete_function().graph.as_graph_def()
    operations = [node.op for function in graph.library.function for node in function.node_def]
    assert operations.count(operation) == len(trainer.network.trainable_variables)
