"""What a run is (its identity) and how an attempt works on it (its settings): frozen, checked, plain data.

Standard library only, so that ``--help`` and wrong options answer without importing TensorFlow.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from job.errors import UsageError

IMAGE_SIZE = 32  # pixels, height and width of a CIFAR-10 image
CLASS_COUNT = 10
FORMAT = 1  # of config.json and record.json; a newer one is refused, never guessed at

Model = Literal["resnet", "plainnet"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Shape of a ResNet or of its twin without skip connections.

    ``blocks[i]`` residual blocks of two convolutions make stage i; its filters double with every stage
    and all stages but the first halve the map.
    """

    model: Model = "resnet"
    blocks: tuple[int, ...] = (2, 5, 5, 2)  # the article's
    filters: int = 64  # in the first stage; the article's

    def __post_init__(self) -> None:
        if self.model not in ("resnet", "plainnet"):
            raise UsageError(
                f"the model must be resnet or plainnet, not {self.model!r}; example: --model resnet"
            )
        if not self.blocks or min(self.blocks) < 1:
            raise UsageError(
                f"every stage needs at least 1 block, but blocks are {self.blocks_text!r}; example: "
                f"--blocks 3,3,3"
            )
        most = int(math.log2(IMAGE_SIZE)) + 1
        if len(self.blocks) > most:
            raise UsageError(
                f"each stage after the first halves the {IMAGE_SIZE}x{IMAGE_SIZE} map, so at most "
                f"{most} stages "
                f"keep it at one pixel or more, but blocks are {self.blocks_text!r}; example: "
                f"--blocks 2,5,5,2"
            )
        if self.filters < 1:
            raise UsageError(f"filters must be at least 1, not {self.filters}; example: --filters 16")

    @property
    def layers(self) -> int:
        """Convolutions on the main path plus the dense layer: the field's "ResNet-30"."""
        return 2 * sum(self.blocks) + 2

    @property
    def parameters(self) -> int:
        """Variables of the network, the moving statistics among them; Keras counts the same."""
        normalization = 4  # scale, offset, mean and variance of each channel
        inputs = self.filters
        total = 3 * normalization + 9 * 3 * inputs + inputs * (1 + normalization)
        for stage, count in enumerate(self.blocks):
            outputs = self.filters << stage
            for index in range(count):
                total += 9 * (inputs + outputs) * outputs + 2 * outputs * (1 + normalization)
                if self.model == "resnet" and stage > 0 and index == 0:
                    total += inputs * outputs + outputs
                inputs = outputs
        return total + (inputs + 1) * CLASS_COUNT

    @property
    def final_map(self) -> int:
        """Pixels along one side of the last stage's map, the pooling window."""
        return IMAGE_SIZE >> (len(self.blocks) - 1)

    @property
    def blocks_text(self) -> str:
        """As the command line takes them."""
        return ",".join(map(str, self.blocks))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained; every value belongs to the run's identity."""

    name: str
    optimizer: Literal["adam", "sgd", "muon"]
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0  # coupled: joins the gradient, kernels only
    schedule: Literal["constant", "steps", "triangle"] = "constant"
    crop_padding: int = 0  # pixels of zeros on each side before a random 32x32 crop; 0: no crop
    flip: bool = False  # left-right, with probability one half
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer == "muon" and (not self.nesterov or not self.momentum or self.weight_decay):
            raise UsageError(
                "muon is Nesterov SGD with momentum, and coupled weight decay would only turn its steps, but "
                f"nesterov is {self.nesterov}, momentum {self.momentum} and weight_decay {self.weight_decay}"
            )

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0 in a run of ``total_steps``."""
        progress = step / total_steps
        if self.schedule == "steps":  # He et al. 2015, section 4.2: divided by 10 at 32k and 48k of 64k steps
            return self.learning_rate * (1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01)
        if self.schedule == "triangle":  # one cycle: up over the first fifth, then down to nothing
            return self.learning_rate * min((step + 1) / (0.2 * total_steps + 1), (1 - progress) / 0.8)
        return self.learning_rate

    @property
    def depends_on_length(self) -> bool:
        """Whether the rate of a step changes with the number of epochs of the whole run."""
        return self.schedule != "constant"


RECIPES = {
    # The article: Keras's Adam at its defaults, nothing else. It over-fits, and that is part of the article.
    "article": Recipe(name="article", optimizer="adam", learning_rate=0.001),
    # He et al. 2015, Deep Residual Learning for Image Recognition, section 4.2.
    "he": Recipe(
        name="he",
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="steps",
        crop_padding=4,
        flip=True,
    ),
    # Few epochs: Jordan et al. 2024, Muon, in the one cycle of Smith and Topin 2018, Super-Convergence. Tuned
    # on a hold-out, for the 20-layer network with 16 filters.
    "fast": Recipe(
        name="fast",
        optimizer="muon",
        learning_rate=0.1,
        momentum=0.8,
        nesterov=True,
        schedule="triangle",
        crop_padding=2,
        flip=True,
        label_smoothing=0.1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides the bits a run ends with; the same name with another identity is refused."""

    network: Network
    recipe: Recipe
    batch_size: int  # global: images a step over all replicas
    seed: int
    holdout: int  # training images set aside for validation; 0: the test set validates, as in the article
    precision: Literal["float32", "bfloat16", "float16"]  # resolved, never "auto"
    sync_batch_norm: bool
    data_sha256: str
    epochs: int | None  # where the recipe's schedule depends on the length; else more may follow at any time

    def to_json(self) -> dict[str, Any]:
        """Flat, as config.json holds it."""
        values = asdict(self.recipe)
        return {
            "model": self.network.model,
            "blocks": list(self.network.blocks),
            "filters": self.network.filters,
            "recipe": values.pop("name"),
            "recipe_values": values,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "holdout": self.holdout,
            "precision": self.precision,
            "sync_batch_norm": self.sync_batch_norm,
            "data_sha256": self.data_sha256,
            **({} if self.epochs is None else {"epochs": self.epochs}),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Identity:
        """Inverse of :meth:`to_json`."""
        return cls(
            network=Network(model=values["model"], blocks=tuple(values["blocks"]), filters=values["filters"]),
            recipe=Recipe(name=values["recipe"], **values["recipe_values"]),
            **{key: values[key] for key in ("batch_size", "seed", "holdout", "precision", "sync_batch_norm")},
            data_sha256=values["data_sha256"],
            epochs=values.get("epochs"),
        )

    def differences(self, other: Identity) -> list[str]:
        """Fields that differ, as "field: mine, not theirs"."""
        mine, theirs = self.to_json(), other.to_json()
        return [
            f"{key}: {mine.get(key)!r}, not {theirs.get(key)!r}"
            for key in mine | theirs
            if mine.get(key) != theirs.get(key)
        ]

    @property
    def default_name(self) -> str:
        """Readable and unique: model, depth, recipe, seed and 8 hex digits of the identity."""
        text = json.dumps(self.to_json(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.network.model}{self.network.layers}-{self.recipe.name}-seed{self.seed}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When to commit besides the ends of the run: every so many epochs, steps or seconds."""

    count: float = 1
    unit: Literal["epoch", "steps", "seconds"] = "epoch"

    @classmethod
    def parse(cls, text: str) -> Cadence:
        """Read ``1epoch``, ``500steps``, ``10min`` or ``30s``. Raises ValueError with the rule."""
        match = re.fullmatch(r"(\d+)\s*(epochs?|steps?|min|s)", text.strip())
        if not match or int(match[1]) < 1:
            raise ValueError(
                f"must be a whole number of epochs, steps, min or s, not {text!r}; example: 500steps"
            )
        count, unit = int(match[1]), match[2]
        if unit.startswith("epoch"):
            return cls(count=count, unit="epoch")
        if unit.startswith("step"):
            return cls(count=count, unit="steps")
        return cls(count=count * (60 if unit == "min" else 1), unit="seconds")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One attempt's options, as the command line took them; what is "auto" is resolved later."""

    network: Network = field(default_factory=Network)
    recipe: Recipe = RECIPES["article"]
    data: str | None = None  # "sample", a folder, an archive, gs://...; None: $JOB_DATA, then data/
    output: str = "runs"
    name: str | None = None
    epochs: int = 20
    batch_size: int = 128
    seed: int = 0
    holdout: int = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    xla: Literal["auto", "on", "off"] = "auto"
    sync_batch_norm: bool = True
    deterministic: bool | None = None  # None: on for CPUs, off for GPUs, where it costs speed
    require_gpu: bool = False
    replicas: int | None = None  # of each worker; None: every GPU, or one CPU replica
    workers: int = 1  # processes that train one network together
    worker_hosts: str | None = None  # their addresses: a pattern with {index}, or a list between commas
    commit_every: Cadence = field(default_factory=Cadence)
    keep: int = 2  # commits that stay restorable
    take_over: bool = False
    grace_seconds: float = 12.0  # GKE Spot gives 15
    log_format: Literal["auto", "plain", "json"] = "auto"

    def __post_init__(self) -> None:
        self._at_least("--epochs", self.epochs, 1)
        self._at_least("--batch-size", self.batch_size, 1)
        self._at_least("--keep", self.keep, 1)
        self._at_least("--workers", self.workers, 1)
        if self.replicas is not None:
            self._at_least("--replicas", self.replicas, 1)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must be from 0 to 4294967295, not {self.seed}; example: --seed 0")
        if self.holdout < 0 or self.holdout % CLASS_COUNT:
            raise UsageError(
                f"--holdout must be divisible by {CLASS_COUNT}, so that every class loses as many images, "
                f"not {self.holdout}; example: --holdout 5000"
            )
        if not math.isfinite(self.recipe.learning_rate) or self.recipe.learning_rate <= 0:
            raise UsageError(
                f"--learning-rate must be a finite number above 0, not {self.recipe.learning_rate}; "
                "example: --learning-rate 0.001"
            )
        if not 0 < self.grace_seconds <= 3600:
            raise UsageError(
                f"--grace-seconds must be above 0 and at most 3600, not {self.grace_seconds}; example: 12"
            )
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.name):
            raise UsageError(
                "--name must start with a letter or digit and hold letters, digits, '.', '_' and '-' only "
                f"(128 at most), not {self.name!r}; example: --name resnet-first-try"
            )

    @staticmethod
    def _at_least(option: str, value: int, least: int) -> None:
        if value < least:
            raise UsageError(
                f"{option} must be at least {least}, not {value}; example: {option} {max(least, 2)}"
            )

    def identity(self, *, precision: Literal["float32", "bfloat16", "float16"], data_sha256: str) -> Identity:
        """The run that these settings name, once hardware and data are known."""
        return Identity(
            network=self.network,
            recipe=self.recipe,
            batch_size=self.batch_size,
            seed=self.seed,
            holdout=self.holdout,
            precision=precision,
            sync_batch_norm=self.sync_batch_norm,
            data_sha256=data_sha256,
            epochs=self.epochs if self.recipe.depends_on_length else None,
        )


def recipe_of(name: str, learning_rate: float | None = None) -> Recipe:
    """A recipe by name, with another (peak) learning rate where one is given."""
    recipe = RECIPES[name]
    return recipe if learning_rate is None else replace(recipe, learning_rate=learning_rate)


def check_batches(*, batch_size: int, images: int, replicas: int) -> None:
    """Refuse a global batch, or a last partial batch, that the replicas cannot share evenly.

    An uneven share would weight images unequally in the synchronized statistics; padding would pollute them.
    """
    if images < 1 or batch_size > images:
        raise UsageError(
            f"--batch-size must not exceed the {images} training images, but is {batch_size}; "
            f"example: --batch-size {max(replicas, images // replicas * replicas)}"
        )
    last = images % batch_size
    if batch_size % replicas == 0 and last % replicas == 0:
        return
    raise UsageError(
        f"the global batch and the last batch of an epoch must divide by the {replicas} replicas, but "
        f"--batch-size {batch_size} leaves batches of {batch_size} and {last or batch_size} of "
        f"{images} images; "
        f"valid near it: {', '.join(map(str, _valid_batches(batch_size, images, replicas)))}"
    )


def _valid_batches(batch_size: int, images: int, replicas: int) -> list[int]:
    valid = [size for size in range(replicas, images + 1, replicas) if images % size % replicas == 0]
    return sorted(sorted(valid, key=lambda size: abs(size - batch_size))[:5])
