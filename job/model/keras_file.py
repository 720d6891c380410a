"""A checkpoint that anyone can open: a standard ``.keras`` file of plain Keras layers, optimizer included.

Training uses faster layers under a distribution strategy; saving copies the variables into a plain twin on
the CPU. So a checkpoint depends neither on the strategy nor on our code, and can be written while training
goes on.
"""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy.typing as npt
import tensorflow as tf

from job.domain.network import Network
from job.domain.recipe import Recipe
from job.model import networks

LOSS_SCALE_START = 2.0**15  # float16 only; Micikevicius et al. 2018, Mixed Precision Training, section 3.2


@dataclass(frozen=True)
class State:
    """All that training changes, as host arrays in the order of Keras's variables."""

    weights: list[npt.NDArray[Any]]  # of the network, moving statistics included
    optimizer: list[npt.NDArray[Any]]  # iterations, learning rate, moments
    loss_scale: tuple[float, int] = (
        LOSS_SCALE_START,
        0,
    )  # and the finite steps since it changed; float16 only


def make_optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    """The recipe's optimizer, of Keras's own: for ``muon`` the SGD that has its variables.

    Weight decay is the trainer's: Keras's argument is decoupled.
    """
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(recipe.learning_rate)
    return keras.optimizers.SGD(recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov)


def plain_twin(network: Network, recipe: Recipe, *, precision: str, seed: int) -> keras.Model:
    """The network as a user gets it: plain Keras layers, compiled, freshly initialized from ``seed``."""
    with tf.device("CPU:0"):
        keras.utils.set_random_seed(seed)
        model = networks.build(network, precision=precision)
        model.compile(
            make_optimizer(recipe),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
            auto_scale_loss=False,
        )
        model.optimizer.build(model.trainable_variables)
    return model


def state_of(model: keras.Model) -> State:
    """Copy a compiled model's variables to the host."""
    return State(
        [variable.numpy() for variable in model.variables],
        [variable.numpy() for variable in model.optimizer.variables],
    )


def load_state(model: keras.Model, optimizer: keras.optimizers.Optimizer, state: State) -> None:
    """Set the variables of a model and its optimizer."""
    targets = [*model.variables, *optimizer.variables]
    for variable, value in zip(targets, [*state.weights, *state.optimizer], strict=True):
        variable.assign(value)


def save(twin: keras.Model, state: State, path: Path) -> None:
    """Write a state as a ``.keras`` file."""
    with tf.device("CPU:0"):
        load_state(twin, twin.optimizer, state)
    twin.save(path)


def load(twin: keras.Model, path: Path) -> State:
    """Read a ``.keras`` file's weights and optimizer into a twin of its network.

    Nothing of the file but its arrays is used: it names no code that could run. Raises ValueError or OSError
    where it is not such a file.
    """
    try:
        with tf.device("CPU:0"), warnings.catch_warnings():
            # Keras warns of layers that the file does not have, and leaves them as they are.
            warnings.simplefilter("error", UserWarning)
            twin.load_weights(path)
    except (KeyError, UserWarning, zipfile.BadZipFile) as error:
        raise ValueError(f"not a checkpoint of this network: {error}") from error
    return state_of(twin)
