"""Finished and unfinished runs as values: what a run's config and record say, read from any store."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from job.data.records import data_name
from job.domain.account import PARTS
from job.domain.identity import Identity
from job.domain.record import Record
from job.report.lifecycle import is_abandoned, programs
from job.report.words import shortened

NAMES = {"resnet": "ResNet", "plainnet": "PlainNet"}
# The fields of an identity that pairs do not have to share: what is compared, and over what it is repeated.
COMPARED = ("model", "blocks", "filters", "seed")
TIMES = ("wall_seconds", *(f"{part}_seconds" for part in PARTS), "gap_seconds")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Metrics after one epoch; accuracies are fractions."""

    number: int  # from 1
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run's config and record say about it; accuracies are fractions."""

    location: str
    identity: Identity
    state: str  # one of STATES
    planned_epochs: int
    extension: str | None  # how a longer training goes on, of a run whose finished result is shown
    history: tuple[Epoch, ...]
    train_accuracy: float | None
    validation_accuracy: float | None  # after the last epoch, not the highest
    test_accuracy: float | None  # only with a hold-out: then the test set is evaluated once, at the end
    recalibrated_validation_accuracy: float | None  # with batch statistics taken anew; older runs lack it
    recalibrated_test_accuracy: float | None
    images_per_second: float | None
    seconds: float  # wall time of training and evaluation over all attempts
    account: tuple[tuple[str, float | None], ...]  # where the wall time went, by name; older runs lack it
    replicas: int | None  # of the attempt that finished
    environment: tuple[tuple[str, str], ...]  # its hardware, versions and program, by field

    @classmethod
    def from_record(
        cls, location: str, config: Mapping[str, Any], record: Record, now: float | None = None
    ) -> RunSummary:
        """Summarize a run's config and record, as of ``now`` in seconds since 1970, by default the present.

        A run that was finished and is being extended is summarized as it was finished.

        Raises:
            LookupError, TypeError, AttributeError, ValueError, OverflowError: it is foreign or damaged.
        """
        finished, settings = record.finished, config.get("settings", {})
        result = finished.result if finished else {}
        epochs = int(result.get("epochs", len(record.history)))
        history = record.history[:epochs]
        last = history[-1] if history else {"train": {}, "validation": {}}
        planned = max(record.epochs or settings.get("epochs", 0), epochs)
        recalibrated = result.get("recalibrated") or {}
        state = _state(record, time.time() if now is None else now)
        extended = bool(result) and state != "complete"
        summary = cls(
            location=location,
            identity=Identity.from_json(config["identity"]),
            state="complete" if extended else state,
            planned_epochs=epochs if result else planned,
            extension=_extension(state, planned) if extended else None,
            history=tuple(_epoch(number, entry) for number, entry in enumerate(history, start=1)),
            train_accuracy=_accuracy(result.get("train", last["train"])),
            validation_accuracy=_accuracy(result.get("validation", last["validation"])),
            test_accuracy=_accuracy(result.get("test")),
            recalibrated_validation_accuracy=_accuracy(recalibrated.get("validation")),
            recalibrated_test_accuracy=_accuracy(recalibrated.get("test")),
            images_per_second=_number(result.get("images_per_second", _speed(history))),
            seconds=_number(result.get("seconds", _spent(record))) or 0.0,
            account=_account(result.get("time") if result else record.account()),
            replicas=result.get("replicas"),
            environment=tuple(_environment(result, record)),
        )
        summary._check()
        return summary

    def _check(self) -> None:
        """Raise TypeError or ValueError for what would break the comparison with other runs."""
        if self.complete and self.final_accuracy is None:
            raise ValueError("complete, but without an accuracy")
        if self.complete and len(self.history) != self.planned_epochs:
            raise ValueError(f"complete with {self.planned_epochs} epochs, but it has {len(self.history)}")
        if type(self.identity.seed) is not int or type(self.identity.recipe.name) is not str:
            raise TypeError("a seed must be a whole number, and a recipe a word")
        # Runs are grouped by these, and a list cannot be; a network of fractions has no parameters.
        hash((self.shape, self.conditions, self.identity.network.parameters))

    @property
    def name(self) -> str:
        """Last part of the location, of a folder also where it is named as ``.``."""
        if self.location.startswith("gs://"):
            return self.location.rstrip("/").rpartition("/")[2]
        return Path(self.location).resolve().name

    @property
    def model(self) -> str:
        """``resnet`` or ``plainnet``."""
        return self.identity.network.model

    @property
    def layers(self) -> int:
        """Depth: convolutions on the main path plus the dense layer."""
        return self.identity.network.layers

    @property
    def goodput(self) -> float | None:
        """The share of its attempts' wall time that is in the run: steps that were kept, and evaluations."""
        return dict(self.account)["goodput"]

    @property
    def gap_seconds(self) -> float | None:
        """Between its attempts."""
        return dict(self.account)["gap_seconds"]

    @property
    def complete(self) -> bool:
        """Whether its accuracies are final."""
        return self.state == "complete"

    @property
    def status(self) -> str:
        """The state in words, with the extension of a finished run."""
        return f"{self.state}, {self.extension}" if self.extension else self.state

    @property
    def data(self) -> str:
        """``sample``, ``CIFAR-10`` or, of other data, their SHA-256."""
        return data_name(self.identity.data_sha256)

    @property
    def validated_on(self) -> str:
        """The images behind the validation accuracy."""
        return "hold-out" if self.identity.holdout else "test set"

    @property
    def final_accuracy(self) -> float | None:
        """Accuracy on the test set after the last epoch: with a hold-out, not the validation accuracy."""
        return self.test_accuracy if self.identity.holdout else self.validation_accuracy

    @property
    def recalibrated_accuracy(self) -> float | None:
        """The final accuracy, with batch statistics taken anew over training images."""
        if self.identity.holdout:
            return self.recalibrated_test_accuracy
        return self.recalibrated_validation_accuracy

    @property
    def highest_accuracy(self) -> float | None:
        """Highest validation accuracy of any epoch: picked with hindsight, therefore optimistic."""
        return max((epoch.validation_accuracy for epoch in self.history), default=None)

    @property
    def shape(self) -> tuple[tuple[int, ...], int]:
        """What twins share: blocks and filters."""
        return self.identity.network.blocks, self.identity.network.filters

    @property
    def settings_and_seed(self) -> tuple[Any, ...]:
        """Equal for copies and repetitions of a run, of which one counts."""
        return self.model, self.shape, self.conditions, self.identity.seed, self.complete

    @property
    def conditions(self) -> tuple[tuple[str, Any], ...]:
        """What else two runs must share for their difference to be due to the network."""
        values = self.identity.to_json()
        values |= values.pop("recipe_values")
        del values["data_sha256"]
        values["data"] = self.data
        values["epochs"] = self.planned_epochs  # the identity's is empty where the length changes nothing
        # Where each replica has statistics of its own, their number changes what is computed.
        values["replicas"] = None if self.identity.sync_batch_norm else self.replicas
        return tuple((field, value) for field, value in values.items() if field not in COMPARED)


def _state(record: Record, now: float) -> str:
    return "interrupted" if record.state == "running" and is_abandoned(record, now) else record.state


def _extension(state: str, epochs: int) -> str:
    """How the longer training of a finished run goes on; ``epochs`` it is to have."""
    extension = f"being extended to {epochs} epochs"
    return extension if state == "running" else f"{extension} ({state})"


def _epoch(number: int, entry: Mapping[str, Any]) -> Epoch:
    train, validation = entry["train"], entry["validation"]
    return Epoch(
        number=number,
        train_loss=float(train["loss"]),  # which is not finite where a run goes wrong
        train_accuracy=_fraction(train["accuracy"]),
        validation_loss=float(validation["loss"]),
        validation_accuracy=_fraction(validation["accuracy"]),
    )


def _fraction(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"an accuracy must be between 0 and 1, not {number}")
    return number


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"a number must be finite, not {number}")
    return number


def _accuracy(metrics: Mapping[str, Any] | None) -> float | None:
    value = (metrics or {}).get("accuracy")
    return None if value is None else _fraction(value)


def _account(values: Mapping[str, Any] | None) -> tuple[tuple[str, float | None], ...]:
    """The account's numbers; all None where there is none."""
    known = values or {}
    return tuple((name, _number(known.get(name))) for name in ("goodput", *TIMES))


def _environment(result: Mapping[str, Any], record: Record) -> Iterator[tuple[str, str]]:
    """What is known of a run's hardware, versions and program, as words."""
    if "devices" in result:
        yield "devices", " and ".join(result["devices"])
    if "replicas" in result:
        yield "replicas", str(result["replicas"])
    for package, version in result.get("versions", {}).items():
        yield package, str(version)
    yield from programs(record).items()


def _speed(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Median over the epochs, as a result has it; an epoch of one call, which traced, has no speed."""
    speeds = [float(entry["train"]["images_per_second"]) for entry in history]
    return median([speed for speed in speeds if speed]) if any(speeds) else None


def _spent(record: Record) -> float:
    """Seconds until the newest commit, or over the epochs that are recorded."""
    if record.commits:
        return record.commits[0].timing.total
    return float(sum(entry["train"]["seconds"] + entry["validation"]["seconds"] for entry in record.history))


def without_copies(runs: Iterable[RunSummary]) -> list[RunSummary]:
    """The runs, those of one network, seed and state once: the first."""
    first: dict[Any, RunSummary] = {}
    for run in runs:
        first.setdefault(run.settings_and_seed, run)
    return list(first.values())


def needs_blocks(run: RunSummary, runs: Iterable[RunSummary]) -> bool:
    """Whether only its blocks tell its network from others of the same depth and width."""
    return any(
        other.shape != run.shape and (other.layers, other.shape[1]) == (run.layers, run.shape[1])
        for other in runs
    )


def size_of(run: RunSummary, runs: Iterable[RunSummary], *, width: bool = True) -> str:
    """Depth and width, and the blocks where they do not follow from these among the runs."""
    network = run.identity.network
    parts = [f"{run.layers} layers"]
    if width:
        parts.append(f"{network.filters} filters")
    if needs_blocks(run, runs):
        parts.append(f"blocks {network.blocks_text}")
    return ", ".join(parts)


def final_accuracy_of(run: RunSummary) -> float:
    """The final accuracy of a run that has one."""
    assert run.final_accuracy is not None
    return run.final_accuracy


def distinction(run: RunSummary, alternatives: Sequence[tuple[tuple[str, Any], ...]]) -> list[str]:
    """The conditions that tell a run from the alternatives, as "epochs 3"; another recipe by its name."""
    apart = [
        (field, value)
        for field, value in run.conditions
        if any(dict(other)[field] != value for other in alternatives)
    ]
    # A recipe's name says all of its values, but where runs of that name differ in them.
    of_this_name = [
        dict(other) for other in alternatives if dict(other)["recipe"] == run.identity.recipe.name
    ]
    said_by_name = {
        field for field in vars(run.identity.recipe) if len({other.get(field) for other in of_this_name}) == 1
    }
    return [
        f"{field.replace('_', ' ')} {shortened(value)}" for field, value in apart if field not in said_by_name
    ]


def progress(run: RunSummary) -> str:
    """Epochs that are done, of those that are planned."""
    done = len(run.history)
    return str(done) if done == run.planned_epochs else f"{done} of {run.planned_epochs}"
