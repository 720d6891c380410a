"""The compiled replica step: K optimizer steps per call, and predictions on every image once.

``tf.distribute`` underneath, no ``fit``: Keras 3's adapter refuses MultiWorkerMirroredStrategy's values,
and a call that loops on the device over device-resident images leaves the host nothing to feed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import networks
from job.batches import EpochPlan
from job.cifar10 import Split
from job.cluster import Cluster
from job.config import CLASS_COUNT, IMAGE_SIZE, Identity, Recipe
from job.muon import Muon
from job.normalization import COMPOSED, FUSED, BatchNormalization
from job.portable import LOSS_SCALE_START, State, load_state, make_optimizer

EVALUATION_BATCH = 250  # images a replica; fixed, so that an image's result does not depend on the replicas
LOSS_SCALE_GROWTH = 2000  # finite steps in a row before the scale doubles

# What is marked so branches on no tensor: AutoGraph would parse it for a second, and change nothing.
plain_python = tf.autograph.experimental.do_not_convert


@dataclass(frozen=True)
class StepSums:
    """What K steps report: sums over each global batch, in step order."""

    loss: npt.NDArray[np.float32]  # [K]
    correct: npt.NDArray[np.int32]  # [K]


@dataclass(frozen=True)
class Predictions:
    """Each image's own loss and predicted class."""

    loss: npt.NDArray[np.float32]  # [N]
    predicted: npt.NDArray[np.int32]  # [N]

    def summary(self, labels: npt.NDArray[Any]) -> dict[str, float]:
        """Mean loss, summed in float64 in image order, and accuracy from 0 to 1."""
        return {
            "loss": float(np.sum(self.loss, dtype=np.float64) / len(labels)),
            "accuracy": int(np.sum(self.predicted == labels)) / len(labels),
        }

    def confusion(self, labels: npt.NDArray[Any]) -> list[list[int]]:
        """Images of class i predicted as class j, at [i][j]."""
        cells = labels.astype(np.int64) * CLASS_COUNT + self.predicted
        return np.bincount(cells, minlength=CLASS_COUNT**2).reshape(CLASS_COUNT, CLASS_COUNT).tolist()


class DeviceSplit:
    """A split's images and labels, resident on every replica's device."""

    def __init__(self, split: Split, strategy: tf.distribute.Strategy) -> None:
        self.count = len(split.labels)
        self.labels_on_host = split.labels
        self.images = _on_each_replica(strategy, split.images)
        self.labels = _on_each_replica(strategy, split.labels.astype(np.int32))


def _on_each_replica(strategy: tf.distribute.Strategy, array: npt.NDArray[Any]) -> Any:
    if not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy():
        return tf.constant(array)
    devices = strategy.extended.worker_devices

    def place(context: tf.distribute.ReplicaContext) -> tf.Tensor:
        with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
            return tf.identity(array)

    return strategy.experimental_distribute_values_from_function(place)


class Trainer:
    """A network, its optimizer and the images, ready on every replica."""

    def __init__(self, identity: Identity, cluster: Cluster, *, train: Split, xla: bool = False) -> None:
        self._recipe = identity.recipe
        self._strategy = cluster.strategy
        self._cluster = cluster
        self._float16 = identity.precision == "float16"
        synchronized = identity.sync_batch_norm and cluster.replicas > 1
        self._average_statistics = cluster.replicas > 1 and not synchronized
        with self._strategy.scope():
            self.network = networks.build(
                identity.network,
                precision=identity.precision,
                normalization=partial(
                    BatchNormalization,
                    synchronized=synchronized,
                    kernels=COMPOSED if xla or cluster.on_gpu else FUSED,
                ),
            )
            self.optimizer = _make_optimizer(identity.recipe)
            self.optimizer.build(self.network.trainable_variables)
            self._loss_scale = tf.Variable(LOSS_SCALE_START, trainable=False)
            self._finite_steps = tf.Variable(0, trainable=False)
        self._logits = keras.Model(self.network.input, self.network.get_layer("logits").output)
        self.train_split = DeviceSplit(train, self._strategy)
        self._forward_backward = (
            tf.function(self._loss_and_gradients, jit_compile=True) if xla else self._loss_and_gradients
        )
        # Dynamic shapes: one trace serves every number of steps and the smaller last batch of an epoch.
        self._train_call = tf.function(
            self._steps,
            input_signature=[
                tf.TensorSpec([None, None], tf.int32),
                tf.TensorSpec([None, None, 2], tf.int32),
                tf.TensorSpec([None, None], tf.bool),
                tf.TensorSpec([None], tf.float32),
            ],
        )
        self._predict_call = tf.function(self._predictions, reduce_retracing=True)

    @property
    def evaluation_batch(self) -> int:
        """Images that all replicas predict in one step."""
        return EVALUATION_BATCH * self._cluster.replicas

    @property
    def state(self) -> State:
        """A copy of all that training changes. Device to host: costs one read of every variable."""
        return State(
            [variable.numpy() for variable in self.network.variables],
            [variable.numpy() for variable in self.optimizer.variables],
            (float(self._loss_scale.numpy()), int(self._finite_steps.numpy())),
        )

    @state.setter
    def state(self, state: State) -> None:
        with self._strategy.scope():
            load_state(self.network, self.optimizer, state)
            self._loss_scale.assign(state.loss_scale[0])
            self._finite_steps.assign(state.loss_scale[1])

    def train_steps(self, plan: EpochPlan, rates: npt.NDArray[np.float32]) -> StepSums:
        """Run K optimizer steps of one size.

        Args:
            plan: [K, batch, ...] as :meth:`EpochPlan.batches` cuts it.
            rates: [K] learning rates.
        """
        loss, correct = self._train_call(
            tf.constant(plan.order),
            tf.constant(plan.offsets),
            tf.constant(plan.flips),
            tf.constant(rates, tf.float32),
        )
        return StepSums(loss.numpy(), correct.numpy())

    def predict(self, split: DeviceSplit, *, first: int, count: int) -> Predictions:
        """Predict images ``first`` to ``first + count - 1``, each once."""
        batch = self.evaluation_batch
        positions = tf.range(first, first + -(-count // batch) * batch)
        # The last batch is padded by repeating the last image; its results are cut off again.
        positions = tf.reshape(tf.minimum(positions, first + count - 1), [-1, batch])
        loss, predicted = self._predict_call(split.images, split.labels, positions)
        return Predictions(loss.numpy()[:count], predicted.numpy()[:count])

    def _steps(
        self, order: tf.Tensor, offsets: tf.Tensor, flips: tf.Tensor, rates: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        count = tf.shape(order)[0]
        losses = tf.TensorArray(tf.float32, size=count)
        corrects = tf.TensorArray(tf.int32, size=count)
        for step in tf.range(count):
            self.optimizer.learning_rate.assign(rates[step])
            loss, correct, gradients = self._strategy.run(
                self._replica_gradients,
                args=(
                    self.train_split.images,
                    self.train_split.labels,
                    order[step],
                    offsets[step],
                    flips[step],
                ),
            )
            self._update(gradients)
            losses = losses.write(step, self._sum(loss))
            corrects = corrects.write(step, self._sum(correct))
        return losses.stack(), corrects.stack()

    def _sum(self, per_replica: Any) -> tf.Tensor:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)

    @plain_python
    def _replica_gradients(
        self, images: tf.Tensor, labels: tf.Tensor, order: tf.Tensor, offsets: tf.Tensor, flips: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """This replica's slice of a batch: summed loss, correct predictions, its share of the gradient."""
        mine = self._my_slice(tf.shape(order)[0])
        chosen = order[mine]
        batch = tf.gather(images, chosen)
        if self._recipe.crop_padding or self._recipe.flip:
            batch = crop_and_flip(batch, offsets[mine], flips[mine], padding=self._recipe.crop_padding)
        global_batch = tf.cast(tf.shape(order)[0], tf.float32)
        return self._forward_backward(batch, tf.gather(labels, chosen), global_batch, self._loss_scale)

    def _my_slice(self, global_batch: tf.Tensor) -> slice:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        size = global_batch // self._cluster.replicas
        return slice(replica * size, (replica + 1) * size)

    def _loss_and_gradients(
        self, images: tf.Tensor, labels: tf.Tensor, global_batch: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        images = tf.ensure_shape(images, [None, IMAGE_SIZE, IMAGE_SIZE, 3])
        with tf.GradientTape() as tape:
            logits = tf.cast(self._logits(tf.cast(images, tf.float32), training=True), tf.float32)
            loss = tf.reduce_sum(self._image_losses(logits, labels))
            # Divided by the global batch: replicas' gradients are summed, so each weighs its images alike.
            objective = loss / global_batch * (scale if self._float16 else 1.0)
        gradients = tape.gradient(objective, self.network.trainable_variables)
        correct = tf.reduce_sum(tf.cast(tf.equal(_predicted(logits), labels), tf.int32))
        return loss, correct, gradients

    def _image_losses(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Softmax cross-entropy [N], with the recipe's label smoothing."""
        if not self._recipe.label_smoothing:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        smooth = self._recipe.label_smoothing
        targets = tf.one_hot(labels, CLASS_COUNT) * (1.0 - smooth) + smooth / CLASS_COUNT
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    def _update(self, gradients: Any) -> None:
        """Apply the replicas' gradients; with float16 only if they are finite on *all* replicas."""
        if not self._float16:
            self._strategy.run(self._replica_update, args=(gradients,))
            return
        infinite = self._sum(self._strategy.run(_count_infinite, args=(gradients,)))
        if tf.equal(infinite, 0):
            self._strategy.run(self._replica_update, args=(gradients,))
            self._finite_steps.assign_add(1)
            if tf.greater_equal(self._finite_steps, LOSS_SCALE_GROWTH):
                self._loss_scale.assign(self._loss_scale * 2.0)
                self._finite_steps.assign(0)
        else:
            self._loss_scale.assign(tf.maximum(self._loss_scale / 2.0, 1.0))
            self._finite_steps.assign(0)

    @plain_python
    def _replica_update(self, gradients: list[tf.Tensor]) -> None:
        if self._float16:
            gradients = [gradient / self._loss_scale for gradient in gradients]
        if self._recipe.weight_decay:
            # The optimizer sums over replicas, so each adds its share.
            share = self._recipe.weight_decay / self._cluster.replicas
            gradients = [
                gradient + share * variable if variable.name == "kernel" else gradient
                for gradient, variable in zip(gradients, self.network.trainable_variables, strict=True)
            ]
        self.optimizer.apply(gradients, self.network.trainable_variables)
        if self._average_statistics:
            self._average_moving_statistics()

    def _average_moving_statistics(self) -> None:
        """Make the moving statistics equal on all replicas: one all-reduce of one packed vector.

        Without it every replica would silently hold its own, and a save would write the first one's.
        """
        statistics = self.network.non_trainable_variables
        packed = tf.concat([tf.convert_to_tensor(variable) for variable in statistics], axis=0)
        packed = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, packed)
        sizes = [variable.shape[0] for variable in statistics]
        for variable, value in zip(statistics, tf.split(packed, sizes), strict=True):
            variable.assign(value)

    def _predictions(self, images: Any, labels: Any, positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        count = tf.shape(positions)[0]
        losses = tf.TensorArray(tf.float32, size=count)
        predicted = tf.TensorArray(tf.int32, size=count)
        for step in tf.range(count):
            loss, classes = self._strategy.run(
                self._replica_predictions, args=(images, labels, positions[step])
            )
            losses = losses.write(step, self._strategy.gather(loss, axis=0))
            predicted = predicted.write(step, self._strategy.gather(classes, axis=0))
        return losses.concat(), predicted.concat()

    @plain_python
    def _replica_predictions(
        self, images: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        mine = positions[self._my_slice(tf.shape(positions)[0])]
        batch = tf.ensure_shape(tf.gather(images, mine), [None, IMAGE_SIZE, IMAGE_SIZE, 3])
        logits = tf.cast(self._logits(tf.cast(batch, tf.float32), training=False), tf.float32)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(labels, mine), logits)
        return loss, _predicted(logits)


def _make_optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    plain = make_optimizer(recipe)
    return Muon.from_config(plain.get_config()) if recipe.optimizer == "muon" else plain


def _predicted(logits: tf.Tensor) -> tf.Tensor:
    return tf.argmax(logits, axis=1, output_type=tf.int32)


def _count_infinite(gradients: list[tf.Tensor]) -> tf.Tensor:
    finite = [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]
    return tf.cast(tf.logical_not(tf.reduce_all(finite)), tf.int32)


def crop_and_flip(images: tf.Tensor, offsets: tf.Tensor, flips: tf.Tensor, *, padding: int) -> tf.Tensor:
    """Cut a 32x32 window at ``offsets`` out of the zero-padded images and mirror some of them.

    Args:
        images: uint8 [N, 32, 32, 3].
        offsets: int32 [N, 2], row and column, 0 to 2 * padding.
        flips: bool [N].
        padding: pixels on each side.
    """
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    window = tf.range(IMAGE_SIZE)
    columns = tf.where(flips[:, None], IMAGE_SIZE - 1 - window, window) + offsets[:, 1, None]  # [N, 32]
    rows = window + offsets[:, 0, None]
    return tf.gather(tf.gather(padded, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
