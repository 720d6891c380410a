"""The command line: options become checked settings, errors become exit codes.

No logic of its own: what a command does is in the packages below.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from itertools import pairwise

import click

from job.cli.commands import cli as cli
from job.console import Reporter, current_reporter
from job.domain.errors import Interrupted, JobError
from job.run.signals import Interruption, leave

UNEXPECTED = JobError.exit_code
# What other programs call our options.
SYNONYMS = {
    "--batch": "--batch-size",
    "--bs": "--batch-size",
    "--dataset": "--data",
    "--gpus": "--replicas",
    "--lr": "--learning-rate",
    "--out": "--output",
    "--output-dir": "--output",
    "--resume": "--name",
}


def main(interruption: Interruption | None = None) -> None:
    """Run the command line and exit with the code that fits."""
    Reporter(_log_format())
    try:
        code = cli.main(standalone_mode=False, obj=interruption) or 0
    except SystemExit:  # Click's, of a reader of --help that has seen enough
        code = 0
    except click.ClickException as error:
        _tell_usage(error)
        code = error.exit_code
    except click.Abort:
        code = Interrupted.exit_code
    except JobError as error:
        kind = "Interrupted" if isinstance(error, Interrupted) else "Error"
        current_reporter().write("ERROR", f"{kind}: {error}")
        code = error.exit_code
    except Exception:
        current_reporter().write("ERROR", traceback.format_exc())
        code = UNEXPECTED
    leave(code)


def _tell_usage(error: click.ClickException) -> None:
    """Click's own errors: with usage and hint for people, in one line where the log is JSON."""
    if isinstance(error, click.NoSuchOption) and (meant := SYNONYMS.get(error.option_name)):
        error = click.UsageError(f"No such option: {error.option_name}. Did you mean {meant}?", error.ctx)
    elif isinstance(error, click.UsageError) and "unexpected extra argument" in error.message:
        for model in ("resnet", "plainnet"):
            if model in error.message:
                error = click.UsageError(f"{error.message}. Did you mean --model {model}?", error.ctx)
    reporter = current_reporter()
    if reporter.writes_json:
        return reporter.write("ERROR", f"Error: {error.format_message()}")
    with suppress(OSError):
        error.show()


def _log_format() -> str:
    """As the command line or the variable says, before, and even if, the options can be read."""
    for word, following in pairwise([*sys.argv[1:], ""]):
        if word == "--log-format":
            return following
        if word.startswith("--log-format="):
            return word.partition("=")[2]
    return os.environ.get("JOB_LOG_FORMAT") or "auto"
