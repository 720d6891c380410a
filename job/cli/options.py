"""The options and their types; each also reads a variable of the environment, JOB_ and its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from job.cli import presets
from job.domain.recipe import RECIPES, Recipe
from job.domain.settings import Cadence, Settings, text_fault

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = Settings()
READS_VARIABLES = {"auto_envvar_prefix": "JOB"}  # a command's context settings

option = partial(click.option, show_envvar=True, show_default=True)
POSITIVE = click.IntRange(min=1)


def variable_of(parameter: click.Parameter) -> str | None:
    """The environment variable of an option or argument; None for one that reads none."""
    if parameter.envvar:
        return str(parameter.envvar)
    if not isinstance(parameter, click.Option) or not parameter.show_envvar:
        return None
    return f"{READS_VARIABLES['auto_envvar_prefix']}_{str(parameter.name).upper()}"


def text(value: str) -> str:
    """A path, location or address; no text that was surely meant otherwise."""
    if fault := text_fault(value):
        raise click.BadParameter(f"{fault}; example: /home/me/runs")
    return value


def blocks(value: str | tuple[int, ...]) -> tuple[int, ...]:
    """Residual blocks of each stage, as in ``2,5,5,2``; those of a run are read already."""
    if isinstance(value, tuple):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"must be whole numbers between commas, not {value!r}; example: 2,5,5,2"
        ) from error


def cadence(value: str | Cadence) -> Cadence:
    """``auto``, ``1epoch``, ``500steps``, ``10min``; that of a run is read already."""
    if isinstance(value, Cadence):
        return value
    try:
        return Cadence.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


class RecipeType(click.Choice[str]):
    """A recipe by its name, or one of the user's own from a file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find the recipe."""
        return value if isinstance(value, Recipe) else RECIPES[super().convert(value, param, ctx)]


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, listed in ``--help`` in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


network_options = options(
    option("--model", type=click.Choice(["resnet", "plainnet"]), default="resnet", help="Network to build."),
    option(
        "--blocks",
        type=blocks,
        metavar="N,N,...",
        default=DEFAULTS.network.blocks_text,
        help="Blocks of each stage, of two convolutions each; each stage but the first halves the map.",
    ),
    option(
        "--filters",
        type=POSITIVE,
        default=DEFAULTS.network.filters,
        help="Filters of the first stage; they double with each stage.",
    ),
)

replicas_option = option(
    "--replicas",
    type=POSITIVE,
    help="GPUs, or logical CPU devices, of each worker; default: every GPU, or one CPU device.",
)

train_options = options(
    option(
        "--config",
        metavar="FILE.toml",
        type=text,
        is_eager=True,
        expose_value=False,
        callback=presets.use_file,
        help="Options by their names, and a [recipe] of your own; what you type wins.",
    ),
    option(
        "--like",
        metavar="RUN",
        type=text,
        is_eager=True,
        expose_value=False,
        callback=presets.use_run,
        help="Settings of an existing run; what you type, and --config, wins.",
    ),
    option(
        "--data",
        type=text,
        help="'sample', a folder, an archive or gs://...; default: $JOB_DATA, then data/, fetched if absent.",
    ),
    option(
        "--output",
        type=text,
        default=DEFAULTS.output,
        help="Folder or gs://bucket/prefix that holds the runs.",
    ),
    option(
        "--name", envvar="JOB_RUN_NAME", help="Run name; default: model, depth, recipe, seed and a digest."
    ),
    option("--recipe", type=RecipeType(sorted(RECIPES)), default="article", help="How to train."),
    option(
        "--epochs",
        type=POSITIVE,
        default=DEFAULTS.epochs,
        help="Passes over the training images, in all; more extend a finished run whose rate is constant.",
    ),
    option(
        "--batch-size",
        type=POSITIVE,
        default=DEFAULTS.batch_size,
        help="Global batch: images a step over all replicas.",
    ),
    option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        help="Highest rate of the recipe's schedule; default: the recipe's.",
    ),
    option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=DEFAULTS.seed,
        help="Decides initial weights, order, crops and flips.",
    ),
    option(
        "--holdout",
        type=click.IntRange(min=0),
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
    replicas_option,
    option(
        "--workers",
        type=POSITIVE,
        default=DEFAULTS.workers,
        help="Processes that train one network together.",
    ),
    option(
        "--worker-hosts",
        type=text,
        help="Their addresses, as in resnet-{index}.resnet:2222 or a:2222,b:2222.",
    ),
    option(
        "--commit-every",
        type=cadence,
        default="auto",
        help="1epoch, 500steps, 2h, 10min, 30s; auto: each epoch, and such that a kill costs a minute "
        "at most; a signal and the end commit anyway.",
    ),
    option("--keep", type=POSITIVE, default=DEFAULTS.keep, help="Commits that stay restorable."),
    option(
        "--take-over/--no-take-over", default=False, help="Supersede a living owner of the run on this host."
    ),
    option(
        "--grace-seconds",
        type=click.FloatRange(0, 3600, min_open=True),
        default=DEFAULTS.grace_seconds,
        help="Longest time from a signal to exit code 75.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        allow_from_autoenv=False,
        help="Print run, data, devices, steps and the time that they take here, and end.",
    ),
    option(
        "--log-format",
        type=click.Choice(["auto", "plain", "json"]),
        default="auto",
        help="How progress and errors are written; auto: a live line on a terminal, else plain.",
    ),
)
