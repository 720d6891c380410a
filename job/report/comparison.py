"""Runs -> one honest table, the paired differences between the networks, and a report with pictures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from job.domain.disk import disk_errors
from job.domain.errors import UsageError
from job.report.caveats import caveats
from job.report.figures import curves_figure, depth_figure
from job.report.finding import Skipped
from job.report.pairing import Pairing, depth_changes, final_accuracy, pairings, recalibrated_accuracy
from job.report.summaries import NAMES, RunSummary, progress
from job.report.words import percent, shortened

NO_DEPTH_FIGURE = "No figure: no network was finished at several depths under equal conditions"
MEASURES = {
    "final accuracy on the test set": final_accuracy,
    "the same with batch statistics taken anew": recalibrated_accuracy,
}


def require_plots_extra() -> None:
    """Raise UsageError, naming the extra, where SciPy or Matplotlib is not installed."""
    for package in ("scipy", "matplotlib"):
        if find_spec(package) is None:
            raise UsageError(
                f"compare needs SciPy and Matplotlib, but {package} is not installed; install the extra that "
                "the job's image leaves out: pip install '.[plots]'"
            )


class Column(NamedTuple):
    """A column of the table: its title, and what it says of a run."""

    title: str
    cell: Callable[[RunSummary], str]
    shared: str = ""  # said below the terminal's table where all runs agree; "": the column always stays


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
    Column("data", lambda run: shortened(run.data), "data {}"),
    Column("seed", lambda run: str(run.identity.seed), "seed {}"),
    Column("epochs", progress, "{} epochs"),
    Column("validation", lambda run: percent(run.validation_accuracy)),
    Column("on", lambda run: run.validated_on, "validated on the {}"),
    Column("test", lambda run: percent(run.test_accuracy)),
    Column("recalibrated**", lambda run: percent(run.recalibrated_validation_accuracy)),
    Column("recalibrated test**", lambda run: percent(run.recalibrated_test_accuracy)),
    Column("highest*", lambda run: percent(run.highest_accuracy)),
    Column("train", lambda run: percent(run.train_accuracy)),
    Column("images/s", lambda run: "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}"),
    Column("time", lambda run: _duration(run.seconds)),
    Column("goodput***", lambda run: percent(run.goodput)),
    Column("gaps", lambda run: "-" if run.gap_seconds is None else _duration(run.gap_seconds)),
    Column("state", lambda run: run.status, "{}"),
)
LEFT = ("run", "model", "recipe", "data", "on", "state")  # columns of words; numbers are aligned on the right


def _columns(runs: Sequence[RunSummary]) -> list[Column]:
    absent = set()
    if not any(run.identity.holdout for run in runs):
        absent |= {"test", "recalibrated test**"}
    if not any(run.recalibrated_validation_accuracy is not None for run in runs):
        absent |= {"recalibrated**", "recalibrated test**"}
    if all(run.goodput is None for run in runs):
        absent |= {"goodput***", "gaps"}
    return [column for column in COLUMNS if column.title not in absent]


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
    lines = [
        f"* highest of all epochs, on the {images}, optimistic; validation: after the last epoch;",
        "  train: the mean over that epoch, while the weights still moved;",
        "  time: of training and evaluation, over all attempts.",
    ]
    if any(column.title == "recalibrated**" for column in _columns(runs)):
        lines.append("** by the final weights, with batch statistics taken anew over training images.")
    if any(column.title == "goodput***" for column in _columns(runs)):
        lines += [
            "*** of the wall time of all attempts, the share of steps that were kept and of evaluations;",
            "  gaps: between attempts, apart from that.",
        ]
    return "\n".join(lines)


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
        *("\n".join([title, *lines]) for title, lines in _findings(runs, "  ").items()),
        "\n".join(f"Warning: {caveat}." for caveat in caveats(runs)),
        "\n".join(f"Skipped {item}" for item in skipped),
    ]
    return "\n\n".join(part for part in parts if part)


def _measured(runs: Sequence[RunSummary]) -> dict[str, list[Pairing]]:
    """Differences by what is compared; with statistics taken anew only where runs have such a result."""
    found = {}
    for title, accuracy in MEASURES.items():
        paired = pairings(runs, accuracy)
        if paired or accuracy is final_accuracy:
            found[title] = [*paired, *depth_changes(paired)]
    return found


def _findings(runs: Sequence[RunSummary], indent: str) -> dict[str, list[str]]:
    """A line for each difference, by the sentence that introduces them."""
    return {
        f"ResNet minus PlainNet, {title}:": [f"{indent}{pairing}" for pairing in found]
        or [f"{indent}no pairs: no run is complete."]
        for title, found in _measured(runs).items()
    }


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
    lines += ["## Difference", ""]
    for title, found in _findings(runs, "- ").items():
        lines += [title, "", *found, ""]
    lines += ["## Curves", "", "![Accuracy and loss per epoch](curves.png)", ""]
    if depth:
        lines += ["## Depth", "", "![Accuracy against depth](depth.png)", ""]
    elif len({run.layers for run in runs}) > 1:
        lines += ["## Depth", "", f"{NO_DEPTH_FIGURE}.", ""]
    lines += [
        "## Runs",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        _footnote(runs).replace("*", "\\*"),
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
    with disk_errors("write in", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(markdown, encoding="utf-8")
        _write_csv(runs, folder / "comparison.csv")
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=120)
        for name in figures.keys() - drawn.keys():  # of an earlier report on other runs
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in ("comparison.md", "comparison.csv", *drawn)]


def json_report(runs: Sequence[RunSummary], skipped: Sequence[Skipped] = ()) -> str:
    """The comparison for programs: runs with their curves, differences, warnings, skipped locations.

    Accuracies are fractions, differences are percentage points; a value that is not there, or is not finite,
    is null.
    """
    content = {
        "runs": [
            {**_raw_values(run), "history": [_finite(vars(epoch)) for epoch in run.history]} for run in runs
        ],
        "differences": [
            {
                "of": title,
                "between": pairing.title,
                "seeds": pairing.seeds,
                "points": pairing.differences,
                "mean": pairing.mean if pairing.seeds else None,
                "interval": pairing.interval,
                "unpaired": pairing.unpaired,
            }
            for title, found in _measured(runs).items()
            for pairing in found
        ],
        "warnings": caveats(runs),
        "skipped": list(map(vars, skipped)),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _write_csv(runs: Sequence[RunSummary], path: Path) -> None:
    rows = [_raw_values(run) for run in runs]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _raw_values(run: RunSummary) -> dict[str, Any]:
    """Accuracies as fractions, time in seconds, None where there is no value."""
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
        "recalibrated_validation_accuracy": run.recalibrated_validation_accuracy,
        "recalibrated_test_accuracy": run.recalibrated_test_accuracy,
        "highest_validation_accuracy": run.highest_accuracy,
        "train_accuracy": run.train_accuracy,
        "images_per_second": run.images_per_second,
        "seconds": run.seconds,
        **dict(run.account),
        "precision": run.identity.precision,
        "data": run.data,
        "data_sha256": run.identity.data_sha256,
        "state": run.status,
        "location": run.location,
    }
