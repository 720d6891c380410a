"""Finished and unfinished runs as values: what a run's config and record say, read from any store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from job.checkpoints import Record, read_config, read_record
from job.config import Identity
from job.errors import InvalidData, JobError, MissingInput
from job.storage import NotFound, find_runs, open_store

NAMES = {"resnet": "ResNet", "plainnet": "PlainNet"}
# The fields of an identity that pairs do not have to share: what is compared, and over what it is repeated.
COMPARED = ("model", "blocks", "filters", "seed")


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
    state: str  # complete, running, interrupted or diverged
    planned_epochs: int
    history: tuple[Epoch, ...]
    parameters: int | None
    train_accuracy: float | None
    validation_accuracy: float | None  # after the last epoch, not the highest
    test_accuracy: float | None  # only with a hold-out: then the test set is evaluated once, at the end
    images_per_second: float | None
    seconds: float  # wall time of training and evaluation over all attempts

    @classmethod
    def from_record(cls, location: str, config: Mapping[str, Any], record: Record) -> RunSummary:
        """Summarize config.json and record.json. Raises KeyError or TypeError on foreign content."""
        result, history, settings = record.result or {}, record.history, config.get("settings", {})
        last = history[-1] if history else {"train": {}, "validation": {}}
        spent = sum(entry["train"]["seconds"] + entry["validation"]["seconds"] for entry in history)
        return cls(
            location=location,
            identity=Identity.from_json(config["identity"]),
            state=record.state,
            planned_epochs=result.get("epochs") or max(settings.get("epochs", 0), len(history)),
            history=tuple(map(_epoch, history)),
            parameters=result.get("parameters", settings.get("parameters")),
            train_accuracy=result.get("train", last["train"]).get("accuracy"),
            validation_accuracy=result.get("validation", last["validation"]).get("accuracy"),
            test_accuracy=(result.get("test") or {}).get("accuracy"),
            images_per_second=result.get("images_per_second", _speed(history)),
            seconds=result.get("seconds", spent),
        )

    @property
    def name(self) -> str:
        """Last part of the location."""
        return self.location.rstrip("/").rpartition("/")[2]

    @property
    def model(self) -> str:
        """``resnet`` or ``plainnet``."""
        return self.identity.network.model

    @property
    def layers(self) -> int:
        """Depth: convolutions on the main path plus the dense layer."""
        return self.identity.network.layers

    @property
    def complete(self) -> bool:
        """Whether its accuracies are final."""
        return self.state == "complete"

    @property
    def validated_on(self) -> str:
        """The images behind the validation accuracy."""
        return "hold-out" if self.identity.holdout else "test set"

    @property
    def final_accuracy(self) -> float | None:
        """Accuracy on the test set after the last epoch: with a hold-out, not the validation accuracy."""
        return self.test_accuracy if self.identity.holdout else self.validation_accuracy

    @property
    def highest_accuracy(self) -> float | None:
        """Highest validation accuracy of any epoch: picked with hindsight, therefore optimistic."""
        return max((epoch.validation_accuracy for epoch in self.history), default=None)

    @property
    def shape(self) -> tuple[tuple[int, ...], int]:
        """What twins share: blocks and filters."""
        return self.identity.network.blocks, self.identity.network.filters

    @property
    def conditions(self) -> tuple[tuple[str, Any], ...]:
        """What else two runs must share for their difference to be due to the network."""
        values = self.identity.to_json()
        values |= values.pop("recipe_values")
        values["epochs"] = self.planned_epochs  # the identity's is empty where the length changes nothing
        return tuple((field, value) for field, value in values.items() if field not in COMPARED)


def _epoch(entry: Mapping[str, Any]) -> Epoch:
    train, validation = entry["train"], entry["validation"]
    return Epoch(
        number=entry["epoch"] + 1,
        train_loss=train["loss"],
        train_accuracy=train["accuracy"],
        validation_loss=validation["loss"],
        validation_accuracy=validation["accuracy"],
    )


def _speed(history: Sequence[Mapping[str, Any]]) -> float | None:
    seconds = sum(entry["train"]["seconds"] for entry in history)
    images = sum(entry["train"]["images_per_second"] * entry["train"]["seconds"] for entry in history)
    return images / seconds if seconds else None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A location that is no run, and why."""

    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


def load_runs(locations: Iterable[str]) -> tuple[list[RunSummary], list[Skipped]]:
    """Read the runs at and below the locations, folders or ``gs://`` prefixes, each run once.

    Raises:
        MissingInput: no run is left when the unreadable and foreign ones are skipped.
    """
    runs: dict[str, RunSummary] = {}
    skipped = []
    for location in locations:
        try:
            found = find_runs(location)
        except JobError as error:
            skipped.append(Skipped(location=location, reason=str(error)))
            continue
        if not found:
            skipped.append(Skipped(location=location, reason="holds no run (no record.json here or below)"))
        for place in found:
            try:
                runs.setdefault(place, _load(place))
            except JobError as error:
                skipped.append(Skipped(location=place, reason=str(error)))
    if not runs:
        reasons = "".join(f"\n  {item}" for item in skipped)
        raise MissingInput(
            f"compare needs at least one run, but none is left; example: compare runs{reasons}"
        )
    return sorted(runs.values(), key=_order), skipped


def _order(run: RunSummary) -> tuple[Any, ...]:
    identity = run.identity
    return (
        run.layers,
        run.shape,
        list(NAMES).index(run.model),
        identity.recipe.name,
        identity.seed,
        run.location,
    )


def _load(location: str) -> RunSummary:
    with closing(open_store(location)) as store:
        config = read_config(store)
        if config is None:
            raise InvalidData("not a run of this job: no config.json")
        try:
            return RunSummary.from_record(location, config, read_record(store))
        except NotFound as error:
            raise InvalidData("not a run of this job: no record.json") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidData(f"not a run of this job: its record lacks {error}") from error


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
    if any(field == "recipe" for field, _ in apart):
        values = vars(run.identity.recipe)
        apart = [(field, value) for field, value in apart if field == "recipe" or field not in values]
    return [f"{field.replace('_', ' ')} {str(value)[:12]}" for field, value in apart]
