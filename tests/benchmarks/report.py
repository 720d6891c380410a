"""Measurements as numbers that sum them up, and as tables for people."""

from __future__ import annotations

from statistics import median
from typing import Any

from tests.benchmarks.contenders import OURS, REFERENCE, Workload
from tests.benchmarks.harness import Player

EPOCH_IMAGES = 50_000  # of CIFAR-10 that train
TEST_IMAGES = 10_000  # and that validate after each epoch
FIRST_STEPS = ("begins", "is_done", "resumed", "bare")  # what is measured of a start
NOTHING = "-"  # where there is no number

Values = dict[str, Any]


def spread(values: list[float]) -> Values | None:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def rows(players: list[Player]) -> list[Values]:
    """Contenders with their speeds, summed up; "ratio": over the article's way, "ours": the job's over it."""
    found = [player.to_json() for player in players]
    medians = {row["name"]: median(row["images_per_second"]) for row in found if row["images_per_second"]}
    for row in found:
        speed = medians.get(row["name"])
        row["speed"] = spread(row["images_per_second"])
        row["ratio"] = speed / medians[REFERENCE] if speed and REFERENCE in medians else None
        row["ours"] = medians[OURS] / speed if speed and OURS in medians else None
        row["peak_memory_bytes"] = max((turn["peak_memory_bytes"] for turn in row["turns"]), default=None)
    return found


def workload_report(
    workload: Workload,
    *,
    training: list[Player],
    evaluation: list[Player],
    first_steps: Values | None,
    commits: dict[str, list[float]] | None,
    killed: list[Values] | None = None,
) -> Values:
    """All about a workload, as the JSON file holds it."""
    report: Values = {
        "name": workload.name,
        "title": workload.title,
        "training": rows(training),
        "evaluation": rows(evaluation),
        "first_step": None,
        "commits": None,
        "goodput": killed or [],
    }
    if first_steps:
        report["first_step"] = {
            **first_steps,
            **{f"{key}_seconds": spread(first_steps[key]) for key in FIRST_STEPS},
        }
    if commits:
        epoch = _epoch_seconds(report)
        report["commits"] = {
            store: {
                "blocked_seconds": seconds,
                "blocked": spread(seconds),
                "share_of_epoch": median(seconds) / epoch if epoch else None,
            }
            for store, seconds in commits.items()
        }
    return report


def _epoch_seconds(report: Values) -> float | None:
    """Of the whole data, at the speeds that were measured."""
    seconds = 0.0
    for part, images in (("training", EPOCH_IMAGES), ("evaluation", TEST_IMAGES)):
        speed = next((row["speed"] for row in report[part] if row["name"] == OURS), None)
        if speed is None:
            return None
        seconds += images / speed["median"]
    return seconds


COLUMNS = (
    "contender",
    "images/s",
    "min",
    "max",
    "/ article",
    "job / it",
    "first step done",
    "peak memory",
)


def _cells(row: Values) -> list[str]:
    speed = row["speed"]
    if speed is None:
        return [row["label"], f"not run: {row['not_run']}", *[NOTHING] * 6]
    memory = row["peak_memory_bytes"]
    return [
        row["label"],
        f"{speed['median']:.1f}",
        f"{speed['min']:.1f}",
        f"{speed['max']:.1f}",
        _number(row["ratio"], ".2f"),
        _number(row["ours"], ".2f"),
        f"{median(row['first_unit_seconds']):.1f} s",
        _number(memory and memory / 2**30, ".2f", " GiB"),
    ]


KILLED_COLUMNS = (
    "trains to its end",
    "signals",
    "of them",
    "finished",
    "wall time",
    "/ undisturbed",
    "steps again",
    "same weights",
    "goodput by its own account",
)


def _killed_cells(row: Values) -> list[str]:
    if row["not_run"]:
        return [row["label"], f"not run: {row['not_run']}", *[NOTHING] * 7]
    return [
        row["label"],
        row["schedule"],
        str(row["signals"]),
        "yes" if row["finished"] else "no",
        f"{row['seconds']:.0f} s",
        _number(row["ratio"], ".2f"),
        _number(row["steps_repeated"], "d"),
        {None: NOTHING, True: "yes", False: "no"}[row["same_weights"]],
        _number(row["account"] and row["account"]["goodput"], ".1%"),
    ]


def _number(value: float | None, format: str, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:{format}}{unit}"


def markdown(report: Values) -> str:
    """The whole report as docs/benchmark.md shows it."""
    parts = [_conditions(report)]
    for workload in report["workloads"]:
        parts.append(f"**{workload['title']}**")
        for part, name in (("training", "trains"), ("evaluation", "evaluates")):
            if workload[part]:
                parts.append(_table((name, *COLUMNS[1:]), [_cells(row) for row in workload[part]]))
        if workload["goodput"]:
            parts.append(_table(KILLED_COLUMNS, [_killed_cells(row) for row in workload["goodput"]]))
        if notes := _notes(workload):
            parts.append("\n".join(notes))
    if report["help_seconds"]:
        helped = spread(report["help_seconds"])
        parts.append(f"`python -m job --help`: {_seconds(helped, '.3f')}.")
    return "\n\n".join(parts) + "\n"


def _conditions(report: Values) -> str:
    hardware, versions, settings = report["hardware"], report["versions"], report["settings"]
    devices = ", ".join(hardware["gpus"]) or "no GPU"
    load = hardware["load_average"]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    quiet = "" if load["before"] < 0.5 else " **The machine was busy: these numbers are worth little.**"
    return (
        f"{report['date']}: {hardware['processor']}, {hardware['cores']} cores, {devices}; "
        f"bfloat16 hardware: {'yes' if hardware['bfloat16'] else 'no'}; {found}. Medians of "
        f"{settings['turns']} turns of {settings['seconds']:g} s in alternation, with the least and the "
        f"most; load average before {load['before']:.2f}.{quiet}"
    )


def _table(titles: tuple[str, ...], body: list[list[str]]) -> str:
    rule = [":--", *["--:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, rule, *body])


def _notes(workload: Values) -> list[str]:
    notes = []
    if first := workload["first_step"]:
        notes.append(
            f"- By the command line, with data `{first['data']}`: the first training step begins after "
            f"{_seconds(first['begins_seconds'], '.1f')} and is done, traced and all, after "
            f"{_seconds(first['is_done_seconds'], '.1f')}; of a run that continues, after "
            f"{_seconds(first['resumed_seconds'], '.1f')}. Imports, the network and one batch in Keras alone "
            f"take {_seconds(first['bare_seconds'], '.1f')}."
        )
    for store, values in (workload["commits"] or {}).items():
        share = values["share_of_epoch"]
        of_epoch = f", {100 * share:.2f} % of an epoch" if share is not None else ""
        notes.append(f"- A commit to a {store} blocks for {_seconds(values['blocked'], '.3f')}{of_epoch}.")
    return notes


def _seconds(values: Values | None, format: str) -> str:
    assert values is not None
    least, most = (f"{values[key]:{format}}" for key in ("min", "max"))
    return f"{values['median']:{format}} s ({least} to {most})"
