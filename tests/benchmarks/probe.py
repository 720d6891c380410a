"""The real command line, with two of its functions watched from outside; says what they took as JSON.

``python -m tests.benchmarks.probe first-step train ...`` ends after the first training step.
``python -m tests.benchmarks.probe commits train ...`` trains to the end, and says how long each commit held
the loop up.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from typing import Any

from job import cli
from job.cli import commands
from tests.benchmarks.turns import STARTED


def since_start() -> float:
    return time.monotonic() - float(os.environ[STARTED])


def end_after_first_step(training: Any, out: Any) -> None:
    original = training.Trainer.train_steps

    @functools.wraps(original)
    def watched(*arguments: Any) -> Any:
        before = since_start()
        original(*arguments)
        print(json.dumps({"begins": before, "is_done": since_start()}), file=out, flush=True)
        os._exit(0)

    training.Trainer.train_steps = watched


def time_commits(training: Any, out: Any) -> None:
    commit, finish = training.Attempt._commit, training.Attempt._finish
    seconds: list[float] = []

    @functools.wraps(commit)
    def watched(*arguments: Any, **options: Any) -> None:
        started = time.perf_counter()
        commit(*arguments, **options)
        seconds.append(time.perf_counter() - started)

    @functools.wraps(finish)
    def told(*arguments: Any) -> Any:
        print(json.dumps({"blocked_seconds": seconds}), file=out, flush=True)
        return finish(*arguments)

    training.Attempt._commit, training.Attempt._finish = watched, told


PROBES = {"first-step": end_after_first_step, "commits": time_commits}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    probe = PROBES[sys.argv.pop(1)]
    original = commands.import_run

    def importing(*arguments: Any, **options: Any) -> Any:
        run = original(*arguments, **options)
        probe(run.attempt, out)
        return run

    commands.import_run = importing
    cli.main()


if __name__ == "__main__":
    main()
