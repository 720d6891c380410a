"""Find the runs that are to be compared, wherever they are, and say why what is there is none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.domain.errors import InvalidData, JobError, MissingInput
from job.report.summaries import NAMES, RunSummary
from job.run.reader import find_runs, read_config, read_record
from job.store.contract import NotFound
from job.store.location import open_store


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
        return "holds no run (no record here or below)"
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
                "has config.json, but no record: not begun, lost, or not of this job"
            ) from error
        except KeyError as error:
            raise InvalidData(f"not a run of this job: its record lacks {error}") from error
        except (TypeError, AttributeError, ValueError, OverflowError, IndexError) as error:
            raise InvalidData(f"its record is damaged: {error}") from error
