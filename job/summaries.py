"""Finished and unfinished runs as values: what a run's config and record say, read from any store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from job.checkpoints import STATES, Record, read_config, read_record
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
    state: str  # one of checkpoints.STATES
    planned_epochs: int
    history: tuple[Epoch, ...]
    train_accuracy: float | None
    validation_accuracy: float | None  # after the last epoch, not the highest
    test_accuracy: float | None  # only with a hold-out: then the test set is evaluated once, at the end
    images_per_second: float | None
    seconds: float  # wall time of training and evaluation over all attempts
    replicas: int | None  # of the attempt that finished
    computed_by: tuple[tuple[str, str], ...]  # hardware and versions of that attempt, by field

    @classmethod
    def from_record(cls, location: str, config: Mapping[str, Any], record: Record) -> RunSummary:
        """Summarize config.json and record.json.

        Raises:
            KeyError, TypeError, AttributeError, ValueError, OverflowError: it is foreign or damaged.
        """
        result, history, settings = record.result or {}, record.history, config.get("settings", {})
        last = history[-1] if history else {"train": {}, "validation": {}}
        planned = record.epochs or settings.get("epochs", 0)
        summary = cls(
            location=location,
            identity=Identity.from_json(config["identity"]),
            state=STATES[STATES.index(record.state)],  # an unknown one is a ValueError
            planned_epochs=int(result.get("epochs") or max(planned, len(history))),
            history=tuple(map(_epoch, history)),
            train_accuracy=_accuracy(result.get("train", last["train"]).get("accuracy")),
            validation_accuracy=_accuracy(result.get("validation", last["validation"]).get("accuracy")),
            test_accuracy=_accuracy((result.get("test") or {}).get("accuracy")),
            images_per_second=_number(result.get("images_per_second", _speed(history))),
            seconds=_number(result.get("seconds", _spent(record))) or 0.0,
            replicas=result.get("replicas"),
            computed_by=tuple(_computed_by(result)),
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
    def repeats(self) -> tuple[Any, ...]:
        """Equal for copies of a run, of which one counts."""
        return self.model, self.shape, self.conditions, self.identity.seed, self.complete

    @property
    def conditions(self) -> tuple[tuple[str, Any], ...]:
        """What else two runs must share for their difference to be due to the network."""
        values = self.identity.to_json()
        values |= values.pop("recipe_values")
        values["epochs"] = self.planned_epochs  # the identity's is empty where the length changes nothing
        # Where each replica has statistics of its own, their number changes what is computed.
        values["replicas"] = None if self.identity.sync_batch_norm else self.replicas
        return tuple((field, value) for field, value in values.items() if field not in COMPARED)


def _epoch(entry: Mapping[str, Any]) -> Epoch:
    train, validation = entry["train"], entry["validation"]
    return Epoch(
        number=entry["epoch"] + 1,
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


def _accuracy(value: Any) -> float | None:
    return None if value is None else _fraction(value)


def _computed_by(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a result says of its hardware and versions, as words."""
    if "devices" in result:
        yield "devices", " and ".join(result["devices"])
    if "replicas" in result:
        yield "replicas", str(result["replicas"])
    for package, version in result.get("versions", {}).items():
        yield package, str(version)


def _speed(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Median over the epochs, as a result has it; an epoch of one call, which traced, has no speed."""
    speeds = [float(entry["train"]["images_per_second"]) for entry in history]
    return median([speed for speed in speeds if speed]) if any(speeds) else None


def _spent(record: Record) -> float:
    """Seconds until the newest commit, or over the epochs that are recorded."""
    if record.commits:
        return record.commits[0].progress.total_seconds
    return float(sum(entry["train"]["seconds"] + entry["validation"]["seconds"] for entry in record.history))


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
            found, unreadable = find_runs(location)
        except JobError as error:
            skipped.append(Skipped(location=location, reason=str(error)))
            continue
        skipped += [
            Skipped(location=str(error.filename), reason=f"cannot be read: {error.strerror}")
            for error in unreadable
        ]
        if not found and not unreadable:
            skipped.append(Skipped(location=location, reason=_why_no_run(location)))
        for place in found:
            try:
                runs.setdefault(_where(place), _load(place))
            except JobError as error:
                skipped.append(Skipped(location=place, reason=str(error)))
    if not runs:
        reasons = "".join(f"\n  {item}" for item in skipped)
        raise MissingInput(f"compare found no run; example: compare runs{reasons}")
    return sorted(runs.values(), key=_order), skipped


def _why_no_run(location: str) -> str:
    """Why no run was found at a location that could be read."""
    if location.startswith("gs://") or Path(location).is_dir():
        return "holds no run (no record.json here or below)"
    return "is a file, not a run's folder" if Path(location).exists() else "does not exist"


def _where(location: str) -> str:
    """The same for all ways to name a folder."""
    return location if location.startswith("gs://") else str(Path(location).resolve())


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
            raise InvalidData(
                "has config.json, but no record.json: not begun, lost, or not of this job"
            ) from error
        except KeyError as error:
            raise InvalidData(f"not a run of this job: its record lacks {error}") from error
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise InvalidData(f"its record is damaged: {error}") from error


def without_copies(runs: Iterable[RunSummary]) -> list[RunSummary]:
    """The runs, those of one network, seed and state once: the first."""
    first: dict[Any, RunSummary] = {}
    for run in runs:
        first.setdefault(run.repeats, run)
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


def shortened(value: Any) -> str:
    """A value as text; of a digest its first digits."""
    text = str(value)
    return text if len(text) <= 40 else text[:12]
