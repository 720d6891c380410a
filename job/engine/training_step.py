"""The compiled training step: K optimizer steps per call.

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

from job.data.epoch_plan import EpochPlan
from job.data.records import Split
from job.domain.identity import Identity
from job.domain.network import CLASS_COUNT, IMAGE_SIZE
from job.domain.recipe import Recipe
from job.engine.cluster import Cluster
from job.engine.device_split import DeviceSplit, counted_share, images_at, my_share
from job.engine.prediction import Predictions, Predictor, plain_python, predicted_class
from job.engine.recalibration import Recalibration
from job.engine.startup import processor_flags
from job.model import networks
from job.model.batch_normalization import (
    COMPOSED,
    FUSED,
    BatchNormalization,
    Statistics,
    counting_images,
)
from job.model.convolution import Conv2D
from job.model.keras_file import LOSS_SCALE_START, State, load_state, make_optimizer
from job.model.muon import Muon
from job.model.optimizers import SGD, Adam

LOSS_SCALE_GROWTH = 2000  # finite steps in a row before the scale doubles


@dataclass(frozen=True)
class StepSums:
    """What K steps report: sums over each global batch, in step order."""

    loss: npt.NDArray[np.float32]  # [K]
    correct: npt.NDArray[np.int32]  # [K]


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
                convolution=_convolution(plain=xla or cluster.on_gpu),
                normalization=partial(
                    BatchNormalization,
                    synchronized=synchronized,
                    kernels=COMPOSED if xla or cluster.on_gpu else FUSED,
                ),
            )
            self.optimizer = _make_optimizer(identity.recipe)
            self.optimizer.build(self.network.trainable_variables)
            self._loss_scale = tf.Variable(LOSS_SCALE_START, trainable=False)
            self._finite_steps = tf.Variable(
                0, trainable=False, dtype=tf.int64
            )  # int32 would stay on the host
        self._logits = keras.Model(self.network.input, self.network.get_layer("logits").output)
        self.predictor = Predictor(self._logits, cluster)
        self.train_split = DeviceSplit(train, self._strategy)
        self.recalibration = Recalibration(self._logits, cluster, self.train_split, identity.batch_size)
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
        sums = self._train_call(
            tf.constant(plan.order),
            tf.constant(plan.offsets),
            tf.constant(plan.flips),
            tf.constant(rates, tf.float32),
        ).numpy()
        return StepSums(sums[:, 0], sums[:, 1].astype(np.int32))

    def predict(
        self, split: DeviceSplit, *, first: int, count: int, statistics: Statistics | None = None
    ) -> Predictions:
        """Predict images ``first`` to ``first + count - 1``, each once; as :meth:`Predictor.predict`."""
        return self.predictor.predict(split, first=first, count=count, statistics=statistics)

    def _steps(self, order: tf.Tensor, offsets: tf.Tensor, flips: tf.Tensor, rates: tf.Tensor) -> tf.Tensor:
        """Loss and correct predictions, summed over each step's global batch, [K, 2]."""
        count, batch = tf.shape(order)[0], tf.shape(order)[1]
        sums = tf.TensorArray(tf.float32, size=count)
        for step in tf.range(count):
            self.optimizer.learning_rate.assign(rates[step])
            split, plan = self.train_split, (order[step], offsets[step], flips[step])
            mine, gradients = self._strategy.run(
                self._replica_gradients, args=(split.words, split.labels, *plan)
            )
            self._update(gradients, batch)
            sums = sums.write(step, self._sum(mine))
        return sums.stack()

    def _sum(self, per_replica: Any) -> tf.Tensor:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)

    @plain_python
    def _replica_gradients(
        self, words: tf.Tensor, labels: tf.Tensor, order: tf.Tensor, offsets: tf.Tensor, flips: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Of this replica's share of a batch: loss and correct predictions [2], and the gradient's share."""
        batch = tf.shape(order)[0]
        first, size, counted = counted_share(batch)
        mine = slice(first, first + size)
        images = tf.cast(images_at(words, order[mine]), tf.float32)
        if self._recipe.crop_padding or self._recipe.flip:
            images = crop_and_flip(images, offsets[mine], flips[mine], padding=self._recipe.crop_padding)
        chosen = tf.gather(labels, order[mine])
        return self._forward_backward(images, chosen, tf.cast(batch, tf.float32), self._loss_scale, counted)

    def _loss_and_gradients(
        self,
        images: tf.Tensor,
        labels: tf.Tensor,
        global_batch: tf.Tensor,
        scale: tf.Tensor,
        counted: tf.Tensor | None,
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Sums of loss and correct predictions [2], and gradients; ``counted`` is 0 where no image counts."""
        images = tf.ensure_shape(images, [None, IMAGE_SIZE, IMAGE_SIZE, 3])
        with tf.GradientTape() as tape, counting_images(counted):
            logits = tf.cast(self._logits(images, training=True), tf.float32)
            loss = tf.reduce_sum(self._image_losses(logits, labels))
            if counted is not None:
                loss *= counted
            # Divided by the global batch: replicas' gradients are summed, so each weighs its images alike.
            objective = loss / global_batch * (scale if self._float16 else 1.0)
        gradients = tape.gradient(objective, self.network.trainable_variables)
        correct = tf.reduce_sum(tf.cast(tf.equal(predicted_class(logits), labels), tf.float32))
        if counted is not None:
            correct *= counted
        return tf.stack([loss, correct]), gradients

    def _image_losses(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Softmax cross-entropy [N], with the recipe's label smoothing."""
        if not self._recipe.label_smoothing:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        smooth = self._recipe.label_smoothing
        targets = tf.one_hot(labels, CLASS_COUNT) * (1.0 - smooth) + smooth / CLASS_COUNT
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    def _update(self, gradients: Any, batch: tf.Tensor) -> None:
        """Apply the replicas' gradients; with float16 only if they are finite on *all* replicas."""
        if not self._float16:
            self._strategy.run(self._replica_update, args=(gradients, batch))
            return
        infinite = self._sum(self._strategy.run(_count_infinite, args=(gradients,)))
        if tf.equal(infinite, 0):
            self._strategy.run(self._replica_update, args=(gradients, batch))
            self._finite_steps.assign_add(1)
            if tf.greater_equal(self._finite_steps, LOSS_SCALE_GROWTH):
                self._loss_scale.assign(self._loss_scale * 2.0)
                self._finite_steps.assign(0)
        else:
            self._loss_scale.assign(tf.maximum(self._loss_scale / 2.0, 1.0))
            self._finite_steps.assign(0)

    @plain_python
    def _replica_update(self, gradients: list[tf.Tensor], batch: tf.Tensor) -> None:
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
            self._average_moving_statistics(batch)

    def _average_moving_statistics(self, batch: tf.Tensor) -> None:
        """Make the moving statistics equal on all replicas: their mean, weighed by the replicas' images.

        Without it every replica would silently hold its own, and a save would write the first one's.
        """
        statistics = self.network.non_trainable_variables
        packed = tf.concat([tf.convert_to_tensor(variable) for variable in statistics], axis=0)
        _, size = my_share(batch)
        weighed = packed * tf.cast(size, tf.float32)
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, weighed)
        sizes = [variable.shape[0] for variable in statistics]
        for variable, value in zip(
            statistics, tf.split(total / tf.cast(batch, tf.float32), sizes), strict=True
        ):
            variable.assign(value)


def _convolution(*, plain: bool) -> type[keras.layers.Conv2D]:
    """The layer of ours where it was measured to be faster: on CPUs, and not yet on those with AMX."""
    return keras.layers.Conv2D if plain or "amx_bf16" in processor_flags() else Conv2D


def _make_optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    kinds: dict[str, type[keras.optimizers.Optimizer]] = {"adam": Adam, "sgd": SGD, "muon": Muon}
    return kinds[recipe.optimizer].from_config(make_optimizer(recipe).get_config())


def _count_infinite(gradients: list[tf.Tensor]) -> tf.Tensor:
    finite = [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]
    return tf.cast(tf.logical_not(tf.reduce_all(finite)), tf.float32)


def crop_and_flip(images: tf.Tensor, offsets: tf.Tensor, flips: tf.Tensor, *, padding: int) -> tf.Tensor:
    """Cut a 32x32 window at ``offsets`` out of the zero-padded images and mirror some of them.

    Args:
        images: [N, 32, 32, 3].
        offsets: int32 [N, 2], row and column, 0 to 2 * padding.
        flips: bool [N].
        padding: pixels on each side.
    """
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    window = tf.range(IMAGE_SIZE, dtype=tf.int64)  # int32 would be added on the host
    offsets = tf.cast(offsets, tf.int64)
    columns = tf.where(flips[:, None], IMAGE_SIZE - 1 - window, window) + offsets[:, 1, None]  # [N, 32]
    rows = window + offsets[:, 0, None]
    return tf.gather(tf.gather(padded, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
