"""One attempt's settings, as the command line takes them: frozen, checked, plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from job.domain.errors import UsageError
from job.domain.identity import Identity
from job.domain.network import CLASS_COUNT, Network
from job.domain.recipe import RECIPES, Recipe


def text_fault(text: str) -> str | None:
    """The rule that a text breaks which was surely meant otherwise; None for one that may be meant.

    A file of variables that was written on Windows, or quoted for a shell that never reads it, would else
    name another folder than its author thinks.
    """
    rule = None
    if not text.isprintable():
        rule = "must hold no control characters"
    elif text != text.strip():
        rule = "must not begin or end with a blank"
    elif text[:1] in ("'", '"') or text[-1:] in ("'", '"'):
        rule = "must not be in quotes"
    elif text.startswith("~"):
        rule = "must not begin with ~, which only a shell replaces"
    elif text.startswith("gs:") and not text.startswith("gs://"):
        rule = "must be a path or gs://bucket/prefix"
    return rule and f"{rule}, but is {text!r}"


def checked_text(name: str, text: str) -> str:
    """Return the text of a variable; raise UsageError where `text_fault` finds one."""
    if fault := text_fault(text):
        raise UsageError(f"{name} {fault}; example: {name}=/home/me/runs")
    return text


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When to commit besides the ends of the run: every so many epochs, steps or seconds, or "auto".

    "auto" is each epoch's end, and as often in between as :mod:`job.run.cadence` says.
    """

    count: float = 1
    unit: Literal["auto", "epoch", "steps", "seconds"] = "auto"

    @classmethod
    def parse(cls, text: str) -> Cadence:
        """Read ``auto``, ``1epoch``, ``500steps``, ``2h``, ``10min`` or ``30s``.

        Raises:
            ValueError: with the rule.
        """
        if text.strip() == "auto":
            return cls()
        match = re.fullmatch(r"(\d+)\s*(epochs?|steps?|h|min|s)", text.strip())
        if not match or int(match[1]) < 1:
            raise ValueError(
                f"must be auto or a whole number of epochs, steps, h, min or s, not {text!r}; "
                "example: 500steps"
            )
        count, unit = int(match[1]), match[2]
        if unit.startswith("epoch"):
            return cls(count=count, unit="epoch")
        if unit.startswith("step"):
            return cls(count=count, unit="steps")
        return cls(count=count * {"h": 3600, "min": 60, "s": 1}[unit], unit="seconds")


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
        if self.holdout % CLASS_COUNT:
            raise UsageError(
                f"--holdout must be divisible by {CLASS_COUNT}, so that every class loses as many images, "
                f"not {self.holdout}; example: --holdout 5000"
            )
        if not 0 < self.grace_seconds <= 3600:  # a NaN, too, which is outside of no range
            raise UsageError(
                f"--grace-seconds must be above 0 and at most 3600, not {self.grace_seconds}; example: 12"
            )
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.name):
            raise UsageError(
                "--name must start with a letter or digit and hold letters, digits, '.', '_' and '-' only "
                f"(128 at most), not {self.name!r}; example: --name resnet-first-try"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from the options' values by name; values of other names are passed over."""
        network = Network(**{key: values[key] for key in ("model", "blocks", "filters")})
        recipe, rate = values["recipe"], values["learning_rate"]
        others = {
            field.name: values[field.name]
            for field in fields(cls)
            if field.name in values and field.name not in ("network", "recipe")
        }
        return cls(
            network=network,
            recipe=recipe if rate is None else replace(recipe, learning_rate=rate),
            **others,
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


def check_batch(*, batch_size: int, images: int, replicas: int) -> None:
    """Refuse a global batch that is larger than an epoch, or too small to give every replica an image."""
    if images < 1 or batch_size > images:
        raise UsageError(
            f"--batch-size must not exceed the {images} training images, but is {batch_size}; "
            f"example: --batch-size {max(1, images)}"
        )
    if batch_size < replicas:
        raise UsageError(
            f"--batch-size must be at least {replicas}, one image for each replica, but is {batch_size}; "
            f"example: --batch-size {replicas}"
        )
