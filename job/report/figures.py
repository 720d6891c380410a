"""Curves over epochs and accuracy over depth, drawn by Matplotlib without a display."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.report.summaries import (
    NAMES,
    RunSummary,
    distinction,
    final_accuracy_of,
    needs_blocks,
    size_of,
    without_copies,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

COLOURS = {"resnet": "#0b5fa5", "plainnet": "#d95f02"}  # told apart also by colour-blind readers and in grey
LINES = ("-", "--", ":", "-.")  # runs of one network that differ in recipe, data or epochs
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
        """``values[epoch][run]``; finished runs of equal conditions have as many epochs."""
        return [
            [getattr(epoch, metric) for epoch in epochs]
            for epochs in zip(*(run.history for run in self.runs), strict=True)
        ]


def curves_figure(runs: Sequence[RunSummary], panels: Sequence[tuple[str, str]] = PANELS) -> Figure:
    """Draw metrics per epoch of both networks: mean over seeds, band from lowest to highest.

    One depth makes two columns of panels; several make a row each. All panels of accuracy have one scale.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(run.shape for run in runs))
    columns = 2 if len(shapes) == 1 else len(panels)
    rows = len(panels) // columns  # of panels for each shape
    several_widths = len({run.shape[1] for run in runs}) > 1
    series = [_series([run for run in runs if run.shape == shape]) for shape in shapes]
    heights = [3.6 * rows + 0.25 * math.ceil(len(lines) / columns) for lines in series]  # inches
    figure = Figure(figsize=(10.5 if columns == 2 else 17, sum(heights)))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches around each panel
    parts = figure.subfigures(len(shapes), squeeze=False, height_ratios=heights)[:, 0]
    for part, shape, lines in zip(parts, shapes, series, strict=True):
        members = [run for run in runs if run.shape == shape]
        size = size_of(members[0], runs, width=several_widths)
        axes = part.subplots(rows, columns, squeeze=False).flat
        for axis, (title, metric) in zip(axes, panels, strict=True):
            _draw_curves(axis, lines, metric)
            _label_curves(axis, f"{title}, {size}", metric, members)
        _add_legend(part, part.axes[0], columns)
    metrics = [metric for _, metric in panels] * len(shapes)
    _share_scale(
        axis for axis, metric in zip(figure.axes, metrics, strict=True) if metric.endswith("accuracy")
    )
    figure.suptitle(_title(figure.axes), fontsize=13)
    return figure


def _add_legend(figure: FigureBase, axis: Axes, columns: int) -> None:
    """Name the lines of an axis below all axes, where no curve can lie."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _share_scale(axes: Iterable[Axes]) -> None:
    """One y scale for all: on scales of their own, training and validation accuracy look alike."""
    shared = list(axes)
    for axis in shared[1:]:
        axis.sharey(shared[0])


def _title(axes: Iterable[Axes]) -> str:
    """Says how to read the bands, where there are any."""
    if any(axis.collections for axis in axes):
        return "ResNet against PlainNet: mean over seeds, band from lowest to highest"
    return "ResNet against PlainNet"


def _series(runs: Sequence[RunSummary]) -> list[_Series]:
    """Group by network and conditions; unfinished runs are drawn one by one, where none is finished."""
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in without_copies(runs):
        groups[run.conditions, run.model].append(run)
    settings = list(dict.fromkeys(conditions for conditions, _ in groups))
    series = []
    for (conditions, model), members in groups.items():
        name = ", ".join([NAMES[model], *distinction(members[0], settings)])
        line = LINES[settings.index(conditions) % len(LINES)]
        if finished := tuple(run for run in members if run.complete):
            count = "1 seed" if len(finished) == 1 else f"{len(finished)} seeds"
            series.append(_Series(f"{name}, {count}", COLOURS[model], line, finished))
        else:
            series += [
                _Series(f"{name}, seed {run.identity.seed}, unfinished", COLOURS[model], line, (run,))
                for run in members
                if run.history
            ]
    return series


def _draw_curves(axis: Axes, series: Sequence[_Series], metric: str) -> None:
    if not series:
        axis.text(0.5, 0.5, "no epoch is finished yet", ha="center", transform=axis.transAxes)
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


def _tidy(axis: Axes, *, percent: bool) -> None:
    if percent:
        axis.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g}%")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def depth_figure(runs: Sequence[RunSummary]) -> Figure | None:
    """Draw final test accuracy against depth, a dot a finished run and a line through the means.

    Only networks that were trained at several depths under equal conditions are drawn, and no depth that was
    built of different blocks; None if none is left.
    """
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in without_copies(runs):
        if run.complete and not needs_blocks(run, runs):
            groups[run.shape[1], run.conditions, run.model].append(run)
    groups = {key: group for key, group in groups.items() if len({run.layers for run in group}) > 1}
    if not groups:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    settings = list(dict.fromkeys(key[:2] for key in groups))
    several_widths = len({width for width, _ in settings}) > 1
    for (filters, conditions, model), group in groups.items():
        parts = [NAMES[model]]
        if several_widths:
            parts.append(f"{filters} filters")
        parts += distinction(group[0], [other for _, other in settings])
        line = LINES[settings.index((filters, conditions)) % len(LINES)]
        _draw_depth(axis, group, ", ".join(parts), COLOURS[model], line)
    _label_depth(axis, [run for group in groups.values() for run in group])
    _add_legend(figure, axis, columns=2)
    return figure


def _draw_depth(axis: Axes, runs: Sequence[RunSummary], label: str, colour: str, line: str) -> None:
    accuracies: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        accuracies[run.layers].append(final_accuracy_of(run))
    depths = sorted(accuracies)
    means = [statistics.fmean(accuracies[depth]) for depth in depths]
    axis.plot(depths, means, line, color=colour, label=label)
    axis.scatter(
        [run.layers for run in runs], [final_accuracy_of(run) for run in runs], color=colour, s=22, alpha=0.6
    )


def _label_depth(axis: Axes, runs: Sequence[RunSummary]) -> None:
    axis.set_title("Final accuracy against depth: one dot a run, a line through the means", fontsize=11)
    axis.set_xlabel("layers")
    axis.set_ylabel("accuracy on the test set")
    axis.set_xticks(sorted({run.layers for run in runs}))
    _tidy(axis, percent=True)
