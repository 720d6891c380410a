"""``python -m tests.benchmarks``, or ``make bench``: this job beside what one would use instead."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tests.benchmarks import contenders, goodput, measures, report
from tests.benchmarks.contenders import WORKLOADS, Contender, Machine, Workload
from tests.benchmarks.harness import IMAGES, Failed, play

PARTS = ("training", "evaluation", "first-step", "commits", "help")
SLOW_PARTS = ("goodput",)  # hours: only where they are asked for
KILLS = (signal.SIGKILL, signal.SIGTERM)
REPEATS = 3  # of what starts a process and ends it
HELP_REPEATS = 11


def workload_option(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> list[Workload]:
    """A name, or blocks/filters/batch as in ``1,1/8/32``."""
    return [WORKLOADS.get(name) or _own_workload(name) for name in names]


def _own_workload(text: str) -> Workload:
    try:
        blocks, filters, batch_size = text.split("/")
        return Workload(text, blocks, int(filters), int(batch_size))
    except ValueError as error:
        names = ", ".join(WORKLOADS)
        raise click.BadParameter(
            f"must be {names} or blocks/filters/batch, not {text!r}; example: 3,3,3/16/128"
        ) from error


@click.command()
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    default=list(WORKLOADS),
    show_default=True,
    callback=workload_option,
    help="Also blocks/filters/batch, as in 3,3,3/16/128. May be repeated.",
)
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True, help="Of each contender.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="A turn's length.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS + SLOW_PARTS),
    default=PARTS,
    show_default=True,
)
@click.option("--only", multiple=True, help="Contenders by name, e.g. keras, torch, job. May be repeated.")
@click.option("--torch", default=measures.default_torch, help="A Python that has PyTorch.")
@click.option("--data", default="sample", show_default=True, help="For the first step: as `train` takes it.")
@click.option("--images", type=click.IntRange(1), default=IMAGES, show_default=True, help="Of an epoch.")
@click.option(
    "--every",
    multiple=True,
    type=click.FloatRange(0.1),
    default=(45.0, 180.0),
    show_default=True,
    help="Goodput: seconds between two signals. May be repeated.",
)
@click.option(
    "--signal",
    "signals",
    multiple=True,
    type=click.Choice([one.name for one in KILLS]),
    default=[one.name for one in KILLS],
    show_default=True,
    help="Goodput: that comes. May be repeated.",
)
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="Goodput: of each run.")
@click.option(
    "--most",
    type=click.FloatRange(1),
    default=5.0,
    show_default=True,
    help="Goodput: who takes so many times as long as undisturbed is given up.",
)
@click.option("--json", "json_file", default="build/benchmark.json", show_default=True)
@click.option(
    "--markdown", "markdown_file", help="Also write the tables there, as docs/benchmark.md has them."
)
def main(
    workloads: list[Workload],
    turns: int,
    seconds: float,
    parts: tuple[str, ...],
    only: tuple[str, ...],
    torch: str | None,
    data: str,
    images: int,
    every: tuple[float, ...],
    signals: tuple[str, ...],
    epochs: int,
    most: float,
    json_file: str,
    markdown_file: str | None,
) -> None:
    """Measure this job beside Keras's fit and PyTorch, in turns, each in a process of its own."""
    machine, load = Machine.here(), measures.load_average()
    if load > 0.5:
        say(f"The machine is busy (load average {load:.2f}): numbers of now will be worth little.")
    everyone = _chosen(contenders.contenders(machine, torch=bool(torch)), only)
    schedules = [goodput.Schedule(signal.Signals[name], seconds) for name in signals for seconds in every]

    def players(who: list[Contender], workload: Workload) -> Any:
        gpu = bool(machine.gpus)
        return play(who, workload, turns=turns, seconds=seconds, images=images, torch=torch, gpu=gpu, say=say)

    def killed(workload: Workload) -> Any:
        work = goodput.Work(workload, images, epochs, torch)
        return goodput.measure(work, schedules, most=most, only=only, say=say)

    def measured(workload: Workload) -> dict[str, Any]:
        return report.workload_report(
            workload,
            training=players(everyone, workload) if "training" in parts else [],
            evaluation=players(contenders.evaluators(everyone), workload) if "evaluation" in parts else [],
            first_steps=_if(
                "first-step" in parts, measures.first_steps, workload, data=data, repeats=REPEATS
            ),
            commits=_if("commits" in parts, measures.commits, workload),
            killed=_if("goodput" in parts, killed, workload) or [],
        )

    results = {
        "format": 1,
        "date": time.strftime("%Y-%m-%d"),
        "versions": measures.versions(torch),
        "settings": {"turns": turns, "seconds": seconds, "images": images, "epochs": epochs},
        "help_seconds": measures.help_seconds(HELP_REPEATS) if "help" in parts else [],
        "workloads": [measured(workload) for workload in workloads],
        "hardware": {
            **asdict(machine),
            "load_average": {"before": load, "after": measures.load_average()},
        },
    }
    _write(Path(json_file), json.dumps(results, indent=1) + "\n")
    text = report.markdown(results)
    if markdown_file:
        _write(Path(markdown_file), text)
    click.echo(text, nl=False)
    sys.exit(_failures(results))


def say(text: str) -> None:
    """Progress, apart from results."""
    click.echo(text, err=True)


def _chosen(everyone: list[Contender], names: tuple[str, ...]) -> list[Contender]:
    known = [*(one.name for one in everyone), *goodput.CONTENDERS]
    if wrong := set(names) - set(known):
        raise click.BadParameter(
            f"--only must name contenders, not {', '.join(sorted(wrong))}; they are: {', '.join(known)}"
        )
    return [one for one in everyone if not names or one.name in names]


def _if(wanted: bool, measure: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return measure(*arguments, **options) if wanted else None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    say(f"wrote {path}")


def _failures(results: dict[str, Any]) -> int:
    """1 where a contender failed that could run here."""
    everyone = [row for one in results["workloads"] for row in (*one["training"], *one["evaluation"])]
    return int(any((row["not_run"] or "").startswith("failed") for row in everyone))


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        sys.exit(f"A measurement {failed}")
