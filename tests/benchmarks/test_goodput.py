"""The schedule of signals, the restart loop and the table of ``--part goodput``; really killed processes."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.domain.errors import Interrupted
from tests.benchmarks import goodput, report
from tests.benchmarks.goodput import UNDISTURBED, Killed, Schedule, Work
from tests.benchmarks.harness import ROOT, clean_environment
from tests.benchmarks.progress import StepCounter, count_of
from tests.benchmarks.test_benchmarks import TINY, cells

# Counts steps of 10 ms up to 60, and begins where the last tenth was noted.
COUNTS = """
import os, sys, time
from tests.benchmarks.progress import StepCounter
from pathlib import Path
folder, counter = sys.argv[1], StepCounter(sys.argv[1])
kept = Path(folder, "kept")
step = int(kept.read_text()) if kept.exists() else 0
while step < 60:
    time.sleep(0.01)
    step += 1
    counter.did(1)
    if step % 10 == 0:
        os.replace(kept.with_name("new"), kept) if kept.with_name("new").write_text(str(step)) else None
"""


def test_moments_are_the_same_each_time_and_near_the_wanted_distance() -> None:
    schedule = Schedule(signal.SIGKILL, 45.0)
    first, second = (list(itertools.islice(schedule.moments(), 20)) for _ in range(2))
    assert first == second
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *first])]
    assert all(36.0 <= gap <= 54.0 for gap in gaps)
    assert len(set(gaps)) == 20
    assert next(UNDISTURBED.moments()) == float("inf")


def test_a_killed_process_is_started_again_until_it_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNTS, str(tmp_path)]
    schedule = Schedule(signal.SIGKILL, 0.5)
    finished, _, signals, starts = goodput.restarted(command, {}, schedule, limit=300.0)
    assert finished
    assert starts == signals + 1
    assert signals >= 1
    assert 60 <= count_of(tmp_path) <= 60 + 10 * signals


def test_one_that_ends_by_itself_with_an_error_is_given_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    finished, _, signals, starts = goodput.restarted(command, {}, UNDISTURBED, limit=300.0)
    assert (finished, signals, starts) == (False, 0, goodput.FAILURES)


def test_one_that_takes_too_long_is_given_up() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    finished, seconds, _, starts = goodput.restarted(command, {}, Schedule(signal.SIGTERM, 0.3), limit=1.0)
    assert not finished
    assert seconds >= 1.0
    assert starts >= 1


def test_steps_are_counted_over_processes(tmp_path: Path) -> None:
    assert count_of(tmp_path) == 0
    StepCounter(str(tmp_path)).did(3)
    StepCounter(str(tmp_path)).did(4)
    assert count_of(tmp_path) == 7


def fared(**values: Any) -> Killed:
    about = {"finished": True, "seconds": 100.0, "signals": 0, "starts": 1, "steps": 20, "weights": "ab"}
    return Killed(**{**about, "account": None, **values})


def test_a_row_compares_with_the_undisturbed_run_of_the_same_contender() -> None:
    work = Work(TINY, images=77, epochs=2, torch=None)  # 10 steps an epoch, of 8 images
    assert work.steps == 20
    row = goodput._row(fared(seconds=150.0, steps=26, weights="cd"), fared(), work)
    assert (row["ratio"], row["steps_repeated"], row["same_weights"]) == (1.5, 6, False)
    assert goodput._row(fared(), fared(), work)["same_weights"]
    unfinished = goodput._row(fared(finished=False), fared(), work)
    assert (unfinished["ratio"], unfinished["steps_repeated"], unfinished["same_weights"]) == (None,) * 3


def test_the_table_shows_who_finished_and_at_what_price() -> None:
    work = Work(TINY, images=80, epochs=2, torch=None)
    about = {"not_run": None, "schedule": Schedule(signal.SIGKILL, 45.0).title}
    row = goodput._row(fared(seconds=130.0, signals=3, account={"goodput": 0.75}), fared(), work)
    rows = [
        {"label": "this job", **about, **row},
        {"label": "a", **about, **goodput._row(fared(finished=False), fared(), work)},
        {"label": "b", "not_run": "no PyTorch here"},
    ]
    table = cells(
        report._table(report.KILLED_COLUMNS, [report._killed_cells(row) for row in rows]),
        first="trains to its end",
    )
    assert table["this job"] == ["SIGKILL every 45 s", "3", "yes", "130 s", "1.30", "0", "yes", "75.0%"]
    assert table["a"] == ["SIGKILL every 45 s", "0", "no", "100 s", "-", "-", "-", "-"]
    assert table["b"][0] == "not run: no PyTorch here"


class Once(Schedule):
    """One signal, and no more: a run of seconds could not start between two."""

    def moments(self) -> Iterator[float]:
        yield self.every
        yield float("inf")


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds: some three processes that import TensorFlow
def test_a_sigterm_costs_the_job_no_step(tmp_path: Path) -> None:
    """As it would without the benchmark's wrapper, which must not start a thread before the job is ready."""
    work = Work(TINY, images=160, epochs=20, torch=None)  # enough to be under way when the signal comes
    command = goodput._command("job-folder", work, str(tmp_path), str(tmp_path / "runs"))
    process = subprocess.Popen(command, env=clean_environment(), cwd=ROOT)
    while process.poll() is None and count_of(tmp_path) < 2:  # the first step is noted, then
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == Interrupted.exit_code
    subprocess.run(command, env=clean_environment(), cwd=ROOT, check=True)
    assert count_of(tmp_path) == work.steps


@pytest.mark.slow
@pytest.mark.timeout(3600)  # seconds: some ten processes that import TensorFlow
@pytest.mark.parametrize("name", ["job-folder", "job-bucket", "keras-epoch", "keras-steps"])
def test_a_contender_is_killed_and_finishes(name: str) -> None:
    """PyTorch apart, which is not among the job's packages."""
    work = Work(TINY, images=160, epochs=2, torch=None)
    undisturbed = goodput.play(name, work, UNDISTURBED, limit=float("inf"))
    assert undisturbed.finished
    assert undisturbed.steps == work.steps == 40
    # What else runs here may make the first one slow and the second one quick: then the signal comes earlier.
    # So it does where it has torn a backup of Keras's, which writes in place: no start gets past that.
    for fraction in (0.8, 0.4, 0.2, 0.1):
        schedule = Once(signal.SIGKILL, fraction * undisturbed.seconds)
        killed = goodput.play(name, work, schedule, limit=20 * undisturbed.seconds)
        if killed.signals and (killed.finished or name.startswith("job")):
            break
    assert killed.finished
    assert killed.starts == killed.signals + 1
    assert killed.signals >= 1
    assert killed.steps >= 40
    if name.startswith("job"):
        assert killed.weights == undisturbed.weights
        assert killed.account is not None
        assert 0 < killed.account["goodput"] < 1
        json.dumps(killed.account)
