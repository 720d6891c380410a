"""What a reader of a comparison must know first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from job.report.summaries import RunSummary, progress
from job.report.words import percent, shortened


def caveats(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader must know first: how the runs differ, which are unfinished, which are there twice."""
    finished = [run for run in runs if run.complete]
    conditions = [dict(run.conditions) for run in runs]
    found = [f"{text}. Only runs that agree are paired" for text in _splits(runs, conditions)]
    found += [f"{text}. They are paired all the same" for text in _splits(finished, _environments(finished))]
    if unfinished := [run for run in runs if not run.complete]:
        names = ", ".join(f"{run.name} ({run.status}, {progress(run)} epochs)" for run in unfinished)
        found.append(f"not finished, therefore not paired: {names}")
    same: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in finished:
        same[run.settings_and_seed].append(run)
    return found + [_repetition(repeated) for repeated in same.values() if len(repeated) > 1]


def _repetition(runs: Sequence[RunSummary]) -> str:
    """One run in several places, or, which is another matter, several runs of the same settings and seed."""
    if len({run.history for run in runs}) == 1:
        places = ", ".join(run.location for run in runs)
        return f"one run in several places, the first is paired: {places}"
    places = ", ".join(f"{run.location} ({percent(run.final_accuracy)})" for run in runs)
    return f"equal settings and seed, other results, and only the first is paired: {places}"


def _environments(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Hardware, versions and program of each run, as far as they are not among its conditions."""
    return [
        {field: value for field, value in run.environment if dict(run.conditions).get(field) is None}
        for run in runs
    ]


def _splits(runs: Sequence[RunSummary], values_of_runs: Sequence[dict[str, Any]]) -> list[str]:
    """One warning for each way in which the runs differ; fields that divide them alike share it."""
    splits: dict[tuple[int, ...], list[str]] = defaultdict(list)
    fields = dict.fromkeys(field for values in values_of_runs for field in values)
    columns = {field: [values.get(field, "not recorded") for values in values_of_runs] for field in fields}
    for field, values in columns.items():
        first_seen = list(dict.fromkeys(values))
        if len(first_seen) > 1:
            splits[tuple(map(first_seen.index, values))].append(field)
    return [_difference(fields, columns[fields[0]], runs) for fields in splits.values()]


def _difference(fields: Sequence[str], values: Sequence[Any], runs: Sequence[RunSummary]) -> str:
    sides = []
    for value in dict.fromkeys(values):
        names = [run.name for run, other in zip(runs, values, strict=True) if other == value]
        sides.append(f"{shortened(value)} ({', '.join(names) if len(names) <= 3 else f'{len(names)} runs'})")
    also = f"; with it {', '.join(fields[1:])}" if len(fields) > 1 else ""
    return f"the runs differ in {fields[0]}: {' against '.join(sides)}{also}"
