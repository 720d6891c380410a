"""Runs -> one honest table, the paired difference between the networks, and pictures.

The question is the article's: does a ResNet beat its twin without skip connections? Two single runs cannot
answer it, so differences are taken between runs that share everything but the skip connections, seed by
seed, and come with their number and their confidence interval.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.checkpoints import Record, read_config, read_record
from job.config import Identity
from job.errors import InvalidData, JobError, MissingInput, UsageError
from job.storage import NotFound, find_runs, open_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"resnet": "ResNet", "plainnet": "PlainNet"}
COLOURS = {"resnet": "#0b5fa5", "plainnet": "#d95f02"}  # told apart also by colour-blind readers and in grey
LINES = ("-", "--", ":", "-.")  # runs of one network that differ in recipe, data or epochs
CONFIDENCE = 0.95
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


@contextmanager
def _plots_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"compare needs SciPy and Matplotlib, but {error.name} is not installed; "
            "install the extra that the light image leaves out: pip install '.[plots]'"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """ResNet minus PlainNet over the seeds that twins share, in percentage points of final test accuracy."""

    title: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]  # in the order of the seeds
    unpaired: tuple[str, ...] = ()  # names of finished runs without a twin

    @property
    def mean(self) -> float:
        """Mean difference; NaN without pairs."""
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t; None for fewer than two pairs."""
        count = len(self.differences)
        if count < 2:
            return None
        with _plots_extra():
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
        if self.interval is None:
            return f"{self.mean:+.2f} points from one pair (seed {self.seeds[0]}). One pair proves nothing."
        low, high = self.interval
        verdict = "includes" if low <= 0 <= high else "excludes"
        return (
            f"{self.mean:+.2f} points, 95 % confidence interval {low:+.2f} to {high:+.2f}, "
            f"n = {len(self.seeds)} pairs (seeds {', '.join(map(str, self.seeds))}). "
            f"The interval {verdict} zero."
        )


def pairings(runs: Iterable[RunSummary]) -> list[Pairing]:
    """Pair finished runs that agree in all but the skip connections; one entry per depth and setting."""
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in runs:
        if run.complete and run.final_accuracy is not None:
            groups[run.shape, run.conditions].append(run)
    return [_pairing(_title(group[0], groups), group) for group in groups.values()]


def _pairing(title: str, runs: Sequence[RunSummary]) -> Pairing:
    resnets, plainnets = (
        {run.identity.seed: run for run in reversed(runs) if run.model == model} for model in NAMES
    )
    seeds = sorted(resnets.keys() & plainnets.keys())
    gains = [_final(resnets[seed]) - _final(plainnets[seed]) for seed in seeds]
    return Pairing(
        title=title,
        seeds=tuple(seeds),
        differences=tuple(100 * gain for gain in gains),
        unpaired=tuple(run.name for run in runs if run.identity.seed not in seeds),
    )


def _final(run: RunSummary) -> float:
    assert run.final_accuracy is not None
    return run.final_accuracy


def _title(run: RunSummary, groups: Iterable[tuple[Any, tuple[tuple[str, Any], ...]]]) -> str:
    """Depth, width, and the conditions in which groups of this very shape differ."""
    alternatives = [conditions for shape, conditions in groups if shape == run.shape]
    return ", ".join([f"{run.layers} layers, {run.shape[1]} filters", *_distinction(run, alternatives)])


def _distinction(run: RunSummary, alternatives: Sequence[tuple[tuple[str, Any], ...]]) -> list[str]:
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


def caveats(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader must know first: how the runs differ, which are unfinished, which are there twice."""
    found = _differences(runs)
    if unfinished := [run for run in runs if not run.complete]:
        names = ", ".join(f"{run.name} ({run.state}, {_progress(run)} epochs)" for run in unfinished)
        found.append(f"not finished, therefore not paired: {names}")
    same: dict[Any, list[str]] = defaultdict(list)
    for run in runs:
        if run.complete:
            same[run.shape, run.conditions, run.model, run.identity.seed].append(run.location)
    repeated = [locations for locations in same.values() if len(locations) > 1]
    return found + [
        f"one run in several places, the first is paired: {', '.join(places)}" for places in repeated
    ]


def _differences(runs: Sequence[RunSummary]) -> list[str]:
    """One warning for each way in which the runs split; fields that split them alike share it."""
    splits: dict[tuple[int, ...], list[str]] = defaultdict(list)
    columns = {field: [dict(run.conditions)[field] for run in runs] for field, _ in runs[0].conditions}
    for field, values in columns.items():
        first_seen = list(dict.fromkeys(values))
        if len(first_seen) > 1:
            splits[tuple(map(first_seen.index, values))].append(field)
    return [_difference(fields, columns[fields[0]], runs) for fields in splits.values()]


def _difference(fields: Sequence[str], values: Sequence[Any], runs: Sequence[RunSummary]) -> str:
    sides = []
    for value in dict.fromkeys(values):
        names = [run.name for run, other in zip(runs, values, strict=True) if other == value]
        sides.append(f"{str(value)[:12]} ({', '.join(names) if len(names) <= 3 else f'{len(names)} runs'})")
    also = f"; with it {', '.join(fields[1:])}" if len(fields) > 1 else ""
    return f"the runs differ in {fields[0]}: {' against '.join(sides)}{also}. Only runs that agree are paired"


# -- text ----------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[RunSummary], str]]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _progress(run: RunSummary) -> str:
    done = len(run.history)
    return str(done) if done == run.planned_epochs else f"{done} of {run.planned_epochs}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


COLUMNS: tuple[Column, ...] = (
    ("run", lambda run: run.name),
    ("model", lambda run: NAMES[run.model]),
    ("layers", lambda run: str(run.layers)),
    ("filters", lambda run: str(run.shape[1])),
    ("parameters", lambda run: "-" if run.parameters is None else f"{run.parameters:,}"),
    ("recipe", lambda run: run.identity.recipe.name),
    ("seed", lambda run: str(run.identity.seed)),
    ("epochs", _progress),
    ("validation", lambda run: _percent(run.validation_accuracy)),
    ("on", lambda run: run.validated_on),
    ("test", lambda run: _percent(run.test_accuracy)),
    ("highest*", lambda run: _percent(run.highest_accuracy)),
    ("train", lambda run: _percent(run.train_accuracy)),
    ("images/s", lambda run: "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}"),
    ("time", lambda run: _duration(run.seconds)),
    ("state", lambda run: run.state),
)
LEFT = ("run", "model", "recipe", "on", "state")  # columns of words; numbers are aligned on the right


def _columns(runs: Sequence[RunSummary]) -> list[Column]:
    held_out = any(run.identity.holdout for run in runs)
    return [column for column in COLUMNS if held_out or column[0] != "test"]


def _footnote(runs: Sequence[RunSummary]) -> str:
    images = " or ".join(dict.fromkeys(run.validated_on for run in runs))
    return f"* highest of all epochs, on the {images}, optimistic; validation: after the last epoch."


def table(runs: Sequence[RunSummary]) -> str:
    """The runs as aligned text, one a line."""
    columns = _columns(runs)
    rows = [[title for title, _ in columns], *([cell(run) for _, cell in columns] for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, columns, strict=True)
        lines.append("  ".join(c.ljust(w) if t in LEFT else c.rjust(w) for c, w, (t, _) in cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], _footnote(runs)])


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
    found = [f"{indent}{pairing}" for pairing in pairings(runs)]
    return found or [f"{indent}no pairs: no run is complete."]


def markdown_report(
    runs: Sequence[RunSummary], skipped: Sequence[Skipped] = (), *, depth: bool = False
) -> str:
    """comparison.md; ``depth`` says that depth.png exists beside it."""
    columns = _columns(runs)
    rows = [[title for title, _ in columns], [":--" if title in LEFT else "--:" for title, _ in columns]]
    rows += [[cell(run) for _, cell in columns] for run in runs]
    rows = [[cell.replace("*", "\\*").replace("|", "\\|") for cell in row] for row in rows]
    lines = ["# ResNet against PlainNet", ""]
    lines += [f"> **Warning:** {caveat}.\n" for caveat in caveats(runs)]
    lines += ["## Difference", "", "ResNet minus PlainNet, final accuracy on the test set:", ""]
    lines += [*_findings(runs, "- "), "", "## Curves", "", "![Accuracy and loss per epoch](curves.png)", ""]
    if depth:
        lines += ["## Depth", "", "![Accuracy against depth](depth.png)", ""]
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
    """Write comparison.md, comparison.csv, curves.png and, with several depths, depth.png: the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"curves.png": curves_figure(runs), "depth.png": depth_figure(runs)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    markdown = markdown_report(runs, skipped, depth="depth.png" in drawn)
    (folder / "comparison.md").write_text(markdown, encoding="utf-8")
    _write_csv(runs, folder / "comparison.csv")
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=120)
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
        "parameters": run.parameters,
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


# -- figures -------------------------------------------------------------------------------------------------

PANELS = (
    ("Training accuracy", "train_accuracy"),
    ("Validation accuracy", "validation_accuracy"),
    ("Training loss", "train_loss"),
    ("Validation loss", "validation_loss"),
)


@dataclass(frozen=True)
class _Series:
    """Runs that differ in their seed alone."""

    label: str
    colour: str
    line: str
    runs: tuple[RunSummary, ...]

    def values(self, metric: str) -> list[list[float]]:
        """``values[epoch][run]`` of the epochs that every run has reached."""
        return [
            [getattr(epoch, metric) for epoch in epochs]
            for epochs in zip(*(run.history for run in self.runs), strict=False)
        ]


def curves_figure(runs: Sequence[RunSummary]) -> Figure:
    """Draw accuracy and loss per epoch of both networks: mean over seeds, band from lowest to highest.

    One depth makes 2x2 panels; several make a row of four each.
    """
    with _plots_extra():
        from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(run.shape for run in runs))
    rows, columns = (2, 2) if len(shapes) == 1 else (len(shapes), 4)
    figure = Figure(figsize=(10.5 if columns == 2 else 17, 3.6 * rows))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches around each panel
    axes = figure.subplots(rows, columns, squeeze=False).reshape(len(shapes), 4)
    for row, shape in zip(axes, shapes, strict=True):
        members = [run for run in runs if run.shape == shape]
        for axis, (title, metric) in zip(row, PANELS, strict=True):
            _draw_curves(axis, _series(members), metric)
            _label_curves(axis, f"{title}, {_size(members[0], runs)}", metric, members)
        row[0].legend(loc="best", fontsize=9, frameon=False)
    figure.suptitle("ResNet against PlainNet: mean over seeds, band from lowest to highest", fontsize=13)
    return figure


def _series(runs: Sequence[RunSummary]) -> list[_Series]:
    """Group by network and conditions; an unfinished run does not shorten the curve of finished ones."""
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in runs:
        groups[run.conditions, run.model].append(run)
    settings = list(dict.fromkeys(conditions for conditions, _ in groups))
    series = []
    for (conditions, model), members in groups.items():
        chosen = [run for run in members if run.complete] or [run for run in members if run.history]
        count = f"{len(chosen)} seed{'s' * (len(chosen) != 1)}"
        label = ", ".join([NAMES[model], *_distinction(members[0], settings), count])
        line = LINES[settings.index(conditions) % len(LINES)]
        series.append(_Series(label, COLOURS[model], line, tuple(chosen)))
    return [item for item in series if item.runs]


def _draw_curves(axis: Axes, series: Sequence[_Series], metric: str) -> None:
    for item in series:
        values = item.values(metric)
        epochs = range(1, len(values) + 1)
        means = [statistics.fmean(row) for row in values]
        marker = "o" if len(values) <= 20 else ""
        axis.plot(
            epochs, means, item.line, color=item.colour, label=item.label, marker=marker, markersize=3.5
        )
        if len(item.runs) > 1:
            lows, highs = [min(row) for row in values], [max(row) for row in values]
            axis.fill_between(epochs, lows, highs, color=item.colour, alpha=0.18, linewidth=0)


def _label_curves(axis: Axes, title: str, metric: str, runs: Sequence[RunSummary]) -> None:
    from matplotlib.ticker import MaxNLocator

    images = " or ".join(dict.fromkeys(run.validated_on for run in runs))
    on = f" on the {images}" if metric.startswith("validation") else ""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"accuracy{on}" if metric.endswith("accuracy") else f"cross-entropy{on}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axis, percent=metric.endswith("accuracy"))


def _size(run: RunSummary, runs: Iterable[RunSummary]) -> str:
    """Depth, and the width where the runs have several."""
    several_widths = len({other.shape[1] for other in runs}) > 1
    return f"{run.layers} layers" + f", {run.shape[1]} filters" * several_widths


def _tidy(axis: Axes, *, percent: bool) -> None:
    if percent:
        axis.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g}%")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def depth_figure(runs: Sequence[RunSummary]) -> Figure | None:
    """Draw final test accuracy against depth, a dot a finished run and a line through the means.

    Only networks that were trained at several depths under equal conditions are drawn; None if there is none.
    """
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in runs:
        if run.complete and run.final_accuracy is not None:
            groups[run.shape[1], run.conditions, run.model].append(run)
    groups = {key: group for key, group in groups.items() if len({run.layers for run in group}) > 1}
    if not groups:
        return None
    with _plots_extra():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    settings = list(dict.fromkeys(key[:2] for key in groups))
    for (filters, conditions, model), group in groups.items():
        several_widths = len({width for width, _ in settings}) > 1
        width = [f"{filters} filters"] * several_widths
        distinction = _distinction(group[0], [other for _, other in settings])
        label = ", ".join([NAMES[model], *width, *distinction])
        _draw_depth(
            axis, group, label, COLOURS[model], LINES[settings.index((filters, conditions)) % len(LINES)]
        )
    _label_depth(axis, [run for group in groups.values() for run in group])
    return figure


def _draw_depth(axis: Axes, runs: Sequence[RunSummary], label: str, colour: str, line: str) -> None:
    accuracies: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        accuracies[run.layers].append(_final(run))
    depths = sorted(accuracies)
    means = [statistics.fmean(accuracies[depth]) for depth in depths]
    axis.plot(depths, means, line, color=colour, label=label)
    axis.scatter([run.layers for run in runs], [_final(run) for run in runs], color=colour, s=22, alpha=0.6)


def _label_depth(axis: Axes, runs: Sequence[RunSummary]) -> None:
    axis.set_title("Final accuracy against depth: one dot a run, a line through the means", fontsize=11)
    axis.set_xlabel("layers")
    axis.set_ylabel("accuracy on the test set")
    axis.set_xticks(sorted({run.layers for run in runs}))
    axis.legend(frameon=False)
    _tidy(axis, percent=True)
