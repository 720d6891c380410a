"""Keep the experiment's finished runs in the repository, and say what they show.

`make keep-results EXPERIMENT=folder` calls it. What is kept of a run is what `python -m job compare` reads;
docs/experiment.md and the README's finding are written from that alone, and `tests/docs/test_experiment.py`
holds them together.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from job.cli import commands
from job.data import records
from job.domain.identity import FORMAT
from job.domain.record import Record
from job.domain.settings import Settings
from job.report.comparison import COLUMNS
from job.report.figures import PANELS, curves_figure, depth_figure
from job.report.finding import load_runs
from job.report.pairing import Pairing, depth_changes, pairings, recalibrated_accuracy
from job.report.summaries import NAMES, RunSummary
from job.run.names import record_name
from job.run.reader import find_runs, read_config, read_record
from job.store.contract import NotFound
from job.store.location import open_store
from tests.tools.regions import with_region

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "experiment.md"
KEPT = ROOT / "docs" / "experiment"
PICTURES = ROOT / "docs" / "pictures"
FIGURE, DEPTH_FIGURE = PICTURES / "experiment.png", PICTURES / "experiment-depth.png"
PROCESSOR = "Zen 4 at 2.6 GHz"  # of all kept runs; a result names the rest
TRAINED_ON = 50_000  # images
DPI = 160  # of the figures: sharp on dense screens, too
COLOURS = 64  # in a figure: lines, bands and the smooth edges of letters need no more
ANEW = "recalibrated**"
SHOWN = {  # columns of the table, by those of `compare`; one more says how long the training takes
    "model": "Model",
    "layers": "Layers",
    "seed": "Seed",
    "epochs": "Epochs",
    "validation": "Test accuracy",
    ANEW: "Recalibrated",
    "train": "Training accuracy",
    "images/s": "Images/s",
}


@dataclass(frozen=True)
class Planned:
    """A run that `make experiment` trains."""

    name: str
    settings: Settings

    @property
    def layers(self) -> int:
        """Its depth."""
        return self.settings.network.layers


def plan(*variables: str) -> list[Planned]:
    """The runs of `make experiment`, in its order."""
    command = ["make", "--dry-run", f"--old-file={sys.prefix}/.ready", f"VENV={sys.prefix}", "experiment"]
    # The variables of the make that called this one are not the experiment's.
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
    made = subprocess.run(
        [*command, *variables], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return [_planned(line) for line in made.stdout.splitlines() if "job train " in line]


def _planned(line: str) -> Planned:
    arguments = shlex.split(line.partition("job train ")[2])
    settings = Settings.of(dict(commands.train.make_context("train", arguments).params))
    assert settings.precision != "auto"
    data = records.fingerprint(records.OFFICIAL)
    return Planned(settings.identity(precision=settings.precision, data_sha256=data).default_name, settings)


def keep(location: str, kept: Path = KEPT) -> list[str]:
    """Copy what counts of the plan's finished runs at a location, and drop what the plan no longer has."""
    wanted = {run.name: run.settings.epochs for run in plan()}
    for folder in kept.glob("*"):
        if folder.name not in wanted:
            shutil.rmtree(folder)
    names = []
    places, unreadable = find_runs(location)
    for error in unreadable:
        print(f"cannot be read: {error}")
    for place in places:
        name = place.rstrip("/").rpartition("/")[2]
        try:
            with closing(open_store(place)) as store:
                config, record = read_config(store), read_record(store)
        except NotFound as error:
            print(f"passed over: {error}")
            continue
        if config and record.state == "complete" and len(record.history) == wanted.get(name):
            _write(kept / name, config, record)
            names.append(name)
        else:
            print(f"passed over, because it is unfinished or not of the plan: {place}")
    return names


def _write(folder: Path, config: dict[str, Any], record: Record) -> None:
    """No checkpoints, no folders of the machine; else what `compare` reads of any run."""
    folder.mkdir(parents=True, exist_ok=True)
    slim = {"format": FORMAT, "identity": config["identity"], "settings": {"epochs": len(record.history)}}
    (folder / "config.json").write_text(json.dumps(slim, indent=1) + "\n")
    finished = replace(record.finished, commit=None) if record.finished else None
    slim_record = replace(record, commits=(), confusion=None, owners=(), finished=finished)
    (folder / record_name(record.revision)).write_bytes(slim_record.to_bytes())


def kept_runs() -> list[RunSummary]:
    """The runs in the repository, as `compare` sees them."""
    return load_runs([str(KEPT)])[0]


def digest() -> str:
    """SHA-256 over all that is kept; the figure carries that of the runs that it shows."""
    content = b"".join(path.read_bytes() for path in sorted(KEPT.rglob("*.json")))
    return hashlib.sha256(content).hexdigest()


def finding(runs: Sequence[RunSummary], planned: Sequence[Planned]) -> str:
    """The README's first screen: what the experiment shows so far, in two sentences, and its figure.

    A single pair proves nothing, so it is left to the page where there are sizes with several.
    """
    paired = [pairing for pairing in pairings(runs) if pairing.seeds]
    found = [pairing for pairing in paired if len(pairing.seeds) > 1] or paired
    missing = _missing(runs, planned)
    title = _heading(found, finished=not missing)
    epochs = {run.layers: len(run.history) for run in runs}
    text = f"**[{title}]({_linked(PAGE, README)}).** {_sentence(found, epochs)}"
    if anew := _paired_anew(runs):
        text += f" By batch statistics taken anew, it was {_gains(anew, epochs)}."
    if missing:
        text += f" {len(planned) - len(missing)} of {len(planned)} runs are finished."
    return f"{wrapped(text)}\n\n{_pictures(runs, README, most=1)}"


def _linked(target: Path, page: Path) -> str:
    """A file's path in a link of a page."""
    return os.path.relpath(target, page.parent)


def _pictures(runs: Sequence[RunSummary], page: Path, most: int | None = None) -> str:
    """The accuracy against depth, where there are several depths, and the curves; or the first so many."""
    shown = {FIGURE: "Training and validation accuracy of both networks, epoch by epoch"}
    if depth_figure(runs):
        shown = {DEPTH_FIGURE: "Accuracy on the test set against depth, a dot a run", **shown}
    return "\n\n".join(f"![{shown[path]}]({_linked(path, page)})" for path in list(shown)[:most])


def _heading(found: Sequence[Pairing], *, finished: bool) -> str:
    if not any(pairing.interval for pairing in found):
        return "No finding yet"
    return "The finding" if finished else "The finding so far"


def _sentence(found: Sequence[Pairing], epochs: dict[int, int]) -> str:
    if not found:
        return "No pair of networks is trained yet."
    return (
        "With skip connections, trained on all 50,000 images, the accuracy on the test set was "
        f"{_gains(found, epochs)}."
    )


def _paired_anew(runs: Sequence[RunSummary]) -> list[Pairing]:
    """The pairs of runs that were evaluated by batch statistics taken anew, too; earlier runs were not."""
    return [pairing for pairing in pairings(runs, recalibrated_accuracy) if pairing.seeds]


def _gains(found: Sequence[Pairing], epochs: dict[int, int]) -> str:
    parts = [_gain(pairing, epochs[pairing.layers]) for pairing in found]
    return parts[0] if len(parts) == 1 else f"{'; '.join(parts[:-1])}; and {parts[-1]}"


def _gain(pairing: Pairing, epochs: int) -> str:
    gain = f"{abs(pairing.mean):.2f} points {'higher' if pairing.mean >= 0 else 'lower'}"
    gain += f" at {pairing.layers} layers after {epochs} epochs"
    if len(pairing.seeds) == 1:
        return f"{gain} (one pair, which proves nothing)"
    if pairing.interval is None:
        return f"{gain} ({len(pairing.seeds)} pairs, all equal, which give no interval)"
    low, high = pairing.interval
    zero = "; it includes zero, so these pairs do not settle it" if low <= 0 <= high else ""
    return f"{gain} ({len(pairing.seeds)} pairs, 95 % confidence interval {low:+.2f} to {high:+.2f}{zero})"


def _missing(runs: Sequence[RunSummary], planned: Sequence[Planned]) -> list[Planned]:
    return [run for run in planned if run.name not in {done.name for done in runs}]


def page(runs: Sequence[RunSummary], planned: Sequence[Planned]) -> str:
    """The page on the experiment."""
    missing = _missing(runs, planned)
    parts = [
        "# The experiment",
        "`make keep-results` writes this page from the runs that are kept in `docs/experiment`.",
        wrapped(_question(len(planned) - len(missing), planned)),
        _commands(len(planned)),
        _table(runs),
        _pictures(runs, PAGE),
        _differences(runs),
        wrapped(_degradation(runs)),
        wrapped(_reservations(runs)),
        wrapped(_conditions(runs)),
        wrapped(f"Not finished yet, and in no number above: {_listed(missing)}.") if missing else "",
        wrapped(
            "On a cluster, `k8s/overlays/seeds` trains the seeds as the indices of an Indexed Job, and "
            "`compare` reads the runs from their volume or bucket."
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _question(finished: int, planned: Sequence[Planned]) -> str:
    return (
        "Does the ResNet beat its twin without skip connections, and does it matter how deep they are? "
        f"{len(planned)} runs are planned on all 50,000 images with the article's recipe: "
        f"{_listed(planned)}. {finished} are finished."
    )


def _listed(runs: Sequence[Planned]) -> str:
    """Runs by depth and model, as in "20 layers for 10 epochs (ResNet, seeds 0, 1)"."""
    groups: dict[tuple[int, int], dict[str, list[str]]] = {}
    for run in sorted(runs, key=lambda run: run.layers):
        models = groups.setdefault((run.layers, run.settings.epochs), {})
        models.setdefault(NAMES[run.settings.network.model], []).append(str(run.settings.seed))
    return "; ".join(
        f"{layers} layers for {epochs} epochs ({_seeds(models)})"
        for (layers, epochs), models in groups.items()
    )


def _seeds(models: dict[str, list[str]]) -> str:
    """Which seeds of which network; of both where they are the same."""
    if len(models) == 2 and len(set(map(tuple, models.values()))) == 1:
        models = {"both networks": next(iter(models.values()))}
    texts = [
        f"{name}, {'seed' if len(models[name]) == 1 else 'seeds'} {', '.join(models[name])}"
        for name in sorted(models)[::-1]
    ]
    return "; ".join(texts)


def _commands(planned: int) -> str:
    commands = {
        "make experiment": f"all {planned} runs, many hours on two cores; it resumes",
        "make experiment EXPERIMENT=runs/small EPOCHS=1 SEEDS=0": "the same, smaller",
        ".venv/bin/python -m job compare docs/experiment": "the finished runs, kept here",
    }
    width = max(map(len, commands))
    return "\n".join(f"    {command:{width}}    # {comment}" for command, comment in commands.items())


def _differences(runs: Sequence[RunSummary]) -> str:
    """The pairs' differences, one a line, and what a pair and an interval are."""
    text = (
        "Runs are paired by seed: besides its settings, a pair shares the order of its images and the "
        "initial weights up to the first projection, and no more. Each interval holds by itself, not all of "
        "them at once. ResNet minus PlainNet, accuracy on the test set after the last epoch:"
    )
    parts = [wrapped(text), _listed_pairs(pairings(runs))]
    if anew := _paired_anew(runs):
        parts += ["The same by batch statistics taken anew:", _listed_pairs(anew)]
    return "\n\n".join(parts)


def _listed_pairs(paired: Sequence[Pairing]) -> str:
    return "\n".join(wrapped(f"- {found}", "  ") for found in [*paired, *depth_changes(paired)])


def _table(runs: Sequence[RunSummary]) -> str:
    """The runs, one a line, and when their accuracies were measured."""
    cells = {column.title: column.cell for column in COLUMNS}
    anew = any(run.recalibrated_accuracy is not None for run in runs)  # earlier runs have none
    shown = {column: title for column, title in SHOWN.items() if anew or column != ANEW}
    lines = [[*shown.values(), "Training time"], [":--", *["--:"] * len(shown)]]
    lines += [[*(cells[column](run) for column in shown), _training_time(run)] for run in runs]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", wrapped(_measured(runs))])


def _measured(runs: Sequence[RunSummary]) -> str:
    """When the accuracies were measured, and by which statistics."""
    text = (
        "Training accuracy is the mean over the last epoch while the weights still moved; test accuracy is "
        "measured after it, by the moving averages that batch normalization keeps of the last hundred steps "
        "or so."
    )
    have = {run.recalibrated_accuracy is not None for run in runs}
    if True in have:
        text += " Recalibrated: by the same weights, with batch statistics taken anew over training images."
    if False in have:
        which = "The other runs" if True in have else "All of these runs"
        text += (
            f" {which} ended before statistics were taken anew at a run's end: how far their averages lag "
            "behind their weights, nothing here tells."
        )
    return text


def _training_time(run: RunSummary) -> str:
    """At the median speed of its epochs: interruptions by other work are left out."""
    assert run.images_per_second
    return f"{len(run.history) * TRAINED_ON / run.images_per_second / 60:.0f} min"


def _degradation(runs: Sequence[RunSummary]) -> str:
    """Training accuracy by depth, which over-fitting cannot lower; empty for a single depth."""
    families: dict[Any, dict[str, dict[int, list[float]]]] = {}
    for run in runs:
        assert run.train_accuracy is not None
        family = families.setdefault((run.shape[1], len(run.history)), {})
        family.setdefault(NAMES[run.model], {}).setdefault(run.layers, []).append(run.train_accuracy)
    deepened = [
        (name, {layers: mean(depths[layers]) for layers in sorted(depths)})
        for family in families.values()
        for name, depths in family.items()
        if len(depths) > 1
    ]
    if not deepened:
        return ""
    listed = "; ".join(
        f"{name} {' and '.join(f'{100 * accuracy:.1f} %' for accuracy in means.values())}"
        f" with {' and '.join(map(str, means))} layers"
        for name, means in deepened
    )
    losses = {name: 100 * (means[min(means)] - means[max(means)]) for name, means in deepened}
    return f"Training accuracy, mean over the seeds: {listed}. {_said_of_depth(losses)}"


def _said_of_depth(losses: dict[str, float]) -> str:
    """What it means that the deepest networks lose so many points of training accuracy to the shallowest."""
    worse = [f"{name} by {loss:.1f} points" for name, loss in losses.items() if loss > 0]
    if not worse:
        return "The deeper networks are no worse in training: there is no degradation here."
    return (
        f"The deeper network is worse in training already, {' and '.join(worse)}. That is no over-fitting: "
        "it is harder to train, or takes longer. He et al. call it degradation where it stays after "
        "training that was long enough, and these epochs are few."
    )


def _reservations(runs: Sequence[RunSummary]) -> str:
    steps = [
        abs(after.validation_accuracy - before.validation_accuracy)
        for run in runs
        for before, after in zip(run.history, run.history[1:], strict=False)
        if before.number >= len(run.history) / 2
    ]
    return (
        "What this does not show: from one epoch to the next, the test accuracy of these runs moves by up "
        f"to {100 * max(steps, default=0):.1f} points in the second half of training, so the difference of "
        "two single runs says little; it takes several pairs and their interval. And these are the first "
        "epochs of Adam at a constant rate: He et al. compare networks after 64,000 steps with a schedule."
    )


def _conditions(runs: Sequence[RunSummary]) -> str:
    results = [_result(run.name) for run in runs]
    devices = ", ".join(dict.fromkeys(device for result in results for device in result["devices"]))
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) for result in results
    )
    precisions = " and ".join(dict.fromkeys(run.identity.precision for run in runs))
    return (
        f"Computed in {precisions}, with float32 variables. Hardware: {devices} ({PROCESSOR}) a run, two "
        "runs at a time. Other work slowed some of them. Images/s is therefore the median over the epochs, "
        "and the training time is what all epochs take at that speed, without evaluation; `compare` shows "
        f"the time that training and evaluation really took. Versions: {'; '.join(versions)}. Each run's "
        "history, result and confusion matrix are in `docs/experiment`. On a processor without bfloat16, "
        "`make experiment PRECISION=float32` is faster and more accurate; its runs cannot be paired with "
        "these."
    )


def _result(name: str) -> dict[str, Any]:
    with closing(open_store(str(KEPT / name))) as store:
        finished = read_record(store).finished
        return finished.result if finished else {}


def wrapped(text: str, indent: str = "") -> str:
    """Lines of the pages' width."""
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main(location: str) -> None:
    """Keep the finished runs, and renew the figures and what the pages say."""
    print("\n".join(["kept:", *keep(location)]))
    renew()


def renew() -> None:
    """Make the figures, the page and the README's finding again, of the runs that are kept."""
    runs, planned = kept_runs(), plan()
    save(accuracy_figure(runs), FIGURE)
    if depth := depth_figure(runs):
        save(depth, DEPTH_FIGURE)
    PAGE.write_text(page(runs, planned), encoding="utf-8")
    readme = with_region(README.read_text(encoding="utf-8"), "finding", finding(runs, planned))
    README.write_text(readme, encoding="utf-8")


def accuracy_figure(runs: Sequence[RunSummary]) -> Figure:
    """The curves without the loss."""
    return curves_figure(runs, [panel for panel in PANELS if panel[1].endswith("accuracy")])


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, which takes a third of the bytes, with the digest of the kept runs."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    note = PngInfo()
    note.add_text("Description", digest())
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True, dpi=(DPI, DPI), pnginfo=note)


if __name__ == "__main__":
    main(*sys.argv[1:])
