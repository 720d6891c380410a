"""Runs -> one honest table, the paired difference between the networks, and pictures.

The question is the article's: does a ResNet beat its twin without skip connections? Two single runs cannot
answer it, so differences are taken seed by seed, and come with their number and their confidence interval.
Runs of equal settings and seed see the same images in the same order. Their initial weights are equal only
up to ResNet's first projection, which shifts the stream of seeds for all that is made after it.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from job.fetching import disk_errors
from job.figures import curves_figure, depth_figure, plots_extra
from job.summaries import (
    NAMES,
    RunSummary,
    Skipped,
    distinction,
    final_accuracy_of,
    shortened,
    size_of,
    without_copies,
)
from job.summaries import load_runs as load_runs  # what is compared, for callers

CONFIDENCE = 0.95
NO_DEPTH_FIGURE = "No figure: no network was finished at several depths under equal conditions"


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Differences in percentage points, one a seed: ResNet minus PlainNet, or how that changes with depth."""

    title: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]  # in the order of the seeds
    unpaired: tuple[str, ...] = ()  # names of finished runs without a twin
    layers: int = 0
    family: Any = None  # what pairings that differ in depth alone share

    def of_seed(self, seed: int) -> float:
        """The difference of one pair."""
        return self.differences[self.seeds.index(seed)]

    @property
    def mean(self) -> float:
        """Mean difference; NaN without pairs."""
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t, which takes the differences as normal.

        None where nothing shows how much they scatter: for fewer than two pairs, or when all are equal.
        """
        count = len(self.differences)
        if count < 2 or math.isclose(min(self.differences), max(self.differences), abs_tol=1e-9):
            return None
        with plots_extra():
            from scipy import stats

        error = statistics.stdev(self.differences) / math.sqrt(count)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df=count - 1)) * error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        without = f" Without a twin: {', '.join(self.unpaired)}." if self.unpaired else ""
        return f"{self.title}: {self._finding}{without}"

    @property
    def _finding(self) -> str:
        if not self.differences:
            return "no pairs: no seed was finished by both networks."
        if len(self.seeds) == 1:
            return f"{self.mean:+.2f} points from one pair (seed {self.seeds[0]}). One pair proves nothing."
        pairs = f"n = {len(self.seeds)} pairs (seeds {', '.join(map(str, self.seeds))})"
        if self.interval is None:
            return f"{self.mean:+.2f} points in every pair, {pairs}. Equal differences give no interval."
        low, high = self.interval
        verdict = "includes" if low <= 0 <= high else "excludes"
        return (
            f"{self.mean:+.2f} points, 95 % confidence interval {low:+.2f} to {high:+.2f}, {pairs}. "
            f"The interval {verdict} zero."
        )


def pairings(runs: Iterable[RunSummary]) -> list[Pairing]:
    """Pair finished runs of equal settings and seed, ResNet and PlainNet; one entry per depth and setting."""
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in without_copies(runs):
        if run.complete:
            groups[run.shape, run.conditions].append(run)
    return [_pairing(_title(group[0], groups.values()), group) for group in groups.values()]


def depth_changes(found: Iterable[Pairing]) -> list[Pairing]:
    """By how much the difference changes from the shallowest to the deepest network, seed by seed.

    The article's guess: "the difference should be bigger on deeper networks".
    """
    families: dict[Any, list[Pairing]] = defaultdict(list)
    for pairing in found:
        if pairing.seeds:
            families[pairing.family].append(pairing)
    changes = []
    for members in families.values():
        shallow, deep = (choose(members, key=lambda pairing: pairing.layers) for choose in (min, max))
        seeds = [seed for seed in deep.seeds if seed in shallow.seeds]
        # Other blocks may make the same depth: then there is no saying from which of them, or to which.
        extremes = [pairing for pairing in members if pairing.layers in (shallow.layers, deep.layers)]
        if extremes in ([shallow, deep], [deep, shallow]) and seeds:
            title = f"change of the difference from {shallow.layers} layers to {deep.title}"
            gains = tuple(deep.of_seed(seed) - shallow.of_seed(seed) for seed in seeds)
            changes.append(Pairing(title=title, seeds=tuple(seeds), differences=gains))
    return changes


def _pairing(title: str, runs: Sequence[RunSummary]) -> Pairing:
    resnets, plainnets = ({run.identity.seed: run for run in runs if run.model == model} for model in NAMES)
    seeds = sorted(resnets.keys() & plainnets.keys())
    gains = [final_accuracy_of(resnets[seed]) - final_accuracy_of(plainnets[seed]) for seed in seeds]
    return Pairing(
        title=title,
        seeds=tuple(seeds),
        differences=tuple(100 * gain for gain in gains),
        unpaired=tuple(run.name for run in runs if run.identity.seed not in seeds),
        layers=runs[0].layers,
        family=(runs[0].shape[1], runs[0].conditions),
    )


def _title(run: RunSummary, groups: Iterable[Sequence[RunSummary]]) -> str:
    """Size, and the conditions in which groups of this very shape differ."""
    firsts = [group[0] for group in groups]
    alternatives = [first.conditions for first in firsts if first.shape == run.shape]
    return ", ".join([size_of(run, firsts), *distinction(run, alternatives)])


def caveats(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader must know first: how the runs differ, which are unfinished, which are there twice."""
    found = [f"{text}. Only runs that agree are paired" for text in _splits(runs, _conditions_of)]
    finished = [run for run in runs if run.complete]
    found += [f"{text}. They are paired all the same" for text in _splits(finished, _circumstances_of)]
    if unfinished := [run for run in runs if not run.complete]:
        names = ", ".join(f"{run.name} ({run.state}, {_progress(run)} epochs)" for run in unfinished)
        found.append(f"not finished, therefore not paired: {names}")
    same: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in finished:
        same[run.repeats].append(run)
    return found + [_repetition(repeated) for repeated in same.values() if len(repeated) > 1]


def _repetition(runs: Sequence[RunSummary]) -> str:
    """One run in several places, or, which is another matter, several runs of the same settings and seed."""
    if len({run.history for run in runs}) == 1:
        places = ", ".join(run.location for run in runs)
        return f"one run in several places, the first is paired: {places}"
    places = ", ".join(f"{run.location} ({_percent(run.final_accuracy)})" for run in runs)
    return f"equal settings and seed, other results, and only the first is paired: {places}"


def _conditions_of(run: RunSummary) -> dict[str, Any]:
    return dict(run.conditions)


def _circumstances_of(run: RunSummary) -> dict[str, Any]:
    """Hardware and versions, as far as they are not among the conditions."""
    return {field: value for field, value in run.computed_by if dict(run.conditions).get(field) is None}


def _splits(runs: Sequence[RunSummary], look: Callable[[RunSummary], dict[str, Any]]) -> list[str]:
    """One warning for each way in which the runs split; fields that split them alike share it."""
    splits: dict[tuple[int, ...], list[str]] = defaultdict(list)
    seen = [look(run) for run in runs]
    columns = {field: [values.get(field) for values in seen] for field in (seen[0] if seen else ())}
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


# -- text ----------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the table: its title, and what it says of a run."""

    title: str
    cell: Callable[[RunSummary], str]
    shared: str = ""  # said below the terminal's table where all runs agree; "": the column always stays


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _progress(run: RunSummary) -> str:
    done = len(run.history)
    return str(done) if done == run.planned_epochs else f"{done} of {run.planned_epochs}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


COLUMNS = (
    Column("run", lambda run: run.name),
    Column("model", lambda run: NAMES[run.model]),
    Column("layers", lambda run: str(run.layers), "{} layers"),
    Column("filters", lambda run: str(run.shape[1]), "{} filters"),
    Column("parameters", lambda run: f"{run.identity.network.parameters:,}", "{} parameters"),
    Column("recipe", lambda run: run.identity.recipe.name, "recipe {}"),
    Column("seed", lambda run: str(run.identity.seed), "seed {}"),
    Column("epochs", _progress, "{} epochs"),
    Column("validation", lambda run: _percent(run.validation_accuracy)),
    Column("on", lambda run: run.validated_on, "validated on the {}"),
    Column("test", lambda run: _percent(run.test_accuracy)),
    Column("highest*", lambda run: _percent(run.highest_accuracy)),
    Column("train", lambda run: _percent(run.train_accuracy)),
    Column("images/s", lambda run: "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}"),
    Column("time", lambda run: _duration(run.seconds)),
    Column("state", lambda run: run.state, "{}"),
)
LEFT = ("run", "model", "recipe", "on", "state")  # columns of words; numbers are aligned on the right


def _columns(runs: Sequence[RunSummary]) -> list[Column]:
    held_out = any(run.identity.holdout for run in runs)
    return [column for column in COLUMNS if held_out or column.title != "test"]


def _shared(runs: Sequence[RunSummary]) -> list[Column]:
    """The columns that tell no run from another, because all of several runs agree in them."""
    if len(runs) < 2:
        return []
    candidates = [column for column in _columns(runs) if column.shared]
    return [column for column in candidates if len({column.cell(run) for run in runs}) == 1]


def _said_of_all(column: Column, run: RunSummary) -> str:
    """What all runs share, by the words of one of them: "10 epochs", "1 epoch"."""
    cell = column.cell(run)
    text = column.shared.format(cell)
    return text.removesuffix("s") if cell == "1" else text


def _footnote(runs: Sequence[RunSummary]) -> str:
    images = " or ".join(dict.fromkeys(run.validated_on for run in runs))
    return (
        f"* highest of all epochs, on the {images}, optimistic; validation: after the last epoch;\n"
        "  train: the mean over that epoch, while the weights still moved;\n"
        "  time: of training and evaluation, over all attempts."
    )


def table(runs: Sequence[RunSummary]) -> str:
    """The runs as aligned text, one a line; what all of them share is said once, below."""
    shared = _shared(runs)
    columns = [column for column in _columns(runs) if column not in shared]
    rows = [[column.title for column in columns]]
    rows += [[column.cell(run) for column in columns] for run in runs]
    lines = _aligned(rows)
    below = [_footnote(runs)]
    if shared:
        below.insert(0, f"all: {', '.join(_said_of_all(column, runs[0]) for column in shared)}")
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *below])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row; the first has the titles, which decide on which side their columns are aligned."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.ljust(width) if column[0] in LEFT else cell.rjust(width) for cell in column]
        for column, width in zip(columns, widths, strict=True)
    ]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def text_report(runs: Sequence[RunSummary], skipped: Sequence[Skipped] = ()) -> str:
    """Everything that the terminal shows: table, paired differences, warnings, skipped locations."""
    parts = [
        table(runs),
        "\n".join(["ResNet minus PlainNet, final accuracy on the test set:", *_findings(runs, "  ")]),
        "\n".join(f"Warning: {caveat}." for caveat in caveats(runs)),
        "\n".join(f"Skipped {item}" for item in skipped),
    ]
    return "\n\n".join(part for part in parts if part)


def _findings(runs: Sequence[RunSummary], indent: str) -> list[str]:
    paired = pairings(runs)
    found = [f"{indent}{pairing}" for pairing in [*paired, *depth_changes(paired)]]
    return found or [f"{indent}no pairs: no run is complete."]


def markdown_report(
    runs: Sequence[RunSummary], skipped: Sequence[Skipped] = (), *, depth: bool = False
) -> str:
    """comparison.md; ``depth`` says that depth.png exists beside it."""
    columns = _columns(runs)
    titles = [column.title for column in columns]
    rows = [titles, [":--" if title in LEFT else "--:" for title in titles]]
    rows += [[column.cell(run) for column in columns] for run in runs]
    rows = [[cell.replace("*", "\\*").replace("|", "\\|") for cell in row] for row in rows]
    lines = ["# ResNet against PlainNet", ""]
    lines += [f"> **Warning:** {caveat}.\n" for caveat in caveats(runs)]
    lines += ["## Difference", "", "ResNet minus PlainNet, final accuracy on the test set:", ""]
    lines += [*_findings(runs, "- "), "", "## Curves", "", "![Accuracy and loss per epoch](curves.png)", ""]
    if depth:
        lines += ["## Depth", "", "![Accuracy against depth](depth.png)", ""]
    elif len({run.layers for run in runs}) > 1:
        lines += ["## Depth", "", f"{NO_DEPTH_FIGURE}.", ""]
    lines += [
        "## Runs",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        _footnote(runs).replace("*", "\\*", 1),
    ]
    lines += [f"\nSkipped {item}" for item in skipped]
    return "\n".join(lines) + "\n"


def write_report(
    runs: Sequence[RunSummary], folder: Path | str, skipped: Sequence[Skipped] = ()
) -> list[Path]:
    """Write comparison.md, comparison.csv, curves.png and, with several depths, depth.png: the paths.

    Raises:
        JobError: the folder cannot be written.
    """
    folder = Path(folder)
    figures = {"curves.png": curves_figure(runs), "depth.png": depth_figure(runs)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    markdown = markdown_report(runs, skipped, depth="depth.png" in drawn)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(markdown, encoding="utf-8")
        _write_csv(runs, folder / "comparison.csv")
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=120)
        for name in figures.keys() - drawn.keys():  # of an earlier report on other runs
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in ("comparison.md", "comparison.csv", *drawn)]


def _write_csv(runs: Sequence[RunSummary], path: Path) -> None:
    rows = [_csv_row(run) for run in runs]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(run: RunSummary) -> dict[str, Any]:
    """Raw values: accuracies as fractions, time in seconds, nothing where there is no value."""
    return {
        "run": run.name,
        "model": run.model,
        "layers": run.layers,
        "blocks": run.identity.network.blocks_text,
        "filters": run.shape[1],
        "parameters": run.identity.network.parameters,
        "recipe": run.identity.recipe.name,
        "batch_size": run.identity.batch_size,
        "seed": run.identity.seed,
        "epochs": len(run.history),
        "planned_epochs": run.planned_epochs,
        "validation_accuracy": run.validation_accuracy,
        "validated_on": run.validated_on,
        "test_accuracy": run.test_accuracy,
        "highest_validation_accuracy": run.highest_accuracy,
        "train_accuracy": run.train_accuracy,
        "images_per_second": run.images_per_second,
        "seconds": run.seconds,
        "precision": run.identity.precision,
        "data_sha256": run.identity.data_sha256,
        "state": run.state,
        "location": run.location,
    }
