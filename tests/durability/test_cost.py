"""What durability costs: the loop hardly waits for commits, and a run that was cut off soon trains again."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.contenders import WORKLOADS
from tests.benchmarks.measures import bare_first_step
from tests.durability.conftest import Place

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

SHAPE = ("--blocks", "3,3,3", "--filters", "16")
STEPS_OF_AN_EPOCH = 391  # of 128 of all 50,000 images
LARGEST_SHARE = 0.01
LONGEST_RESUME = 1.6  # times what TensorFlow's import and the bare first step take on this machine


def test_the_loop_is_blocked_for_a_hundredth_of_an_epoch_at_most(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A commit costs the same for any number of images: the sample's is set against the whole data's epoch.

    That is strict: the sample's epochs are so short that a commit may have to wait for the one before it.
    """
    job = place.start(*SHAPE, "--epochs", "3", "--commit-every", "1epoch", clock=True)
    assert job.wait() == 0, job.text
    commits, steps = (
        [float(seconds) for seconds in re.findall(rf"^clock {name} (\S+) \d+$", job.text, re.MULTILINE)]
        for name in ("commit", "step")
    )
    assert len(commits) == 3
    epoch = STEPS_OF_AN_EPOCH * statistics.median(steps)
    share = statistics.mean(commits) / epoch
    with capsys.disabled():
        print(
            f"\n{statistics.mean(commits) * 1000:.1f} ms a commit, {share:.3%} of an epoch of {epoch:.0f} s"
        )
    assert share <= LARGEST_SHARE


def test_a_resumed_process_soon_trains(place_in: Callable[[str], Place], tmp_path: Path) -> None:
    """The quickest of up to three, beside the quickest bare first step: what else runs here slows some."""
    place = place_in(str(tmp_path / "runs"))
    place.stopped_at("appended", 2, *SHAPE).kill()
    bare, resumed = [], []
    for _ in range(3):
        bare.append(bare_first_step(WORKLOADS["small"]))
        resumed.append(seconds_to_a_step(place))
        if min(resumed) <= LONGEST_RESUME * min(bare):
            return
    pytest.fail(f"a resumed process trained after {resumed} s, a bare one after {bare} s")


def seconds_to_a_step(place: Place) -> float:
    """From the start of a process that continues the run to the end of its first step; it is killed then."""
    started = time.monotonic()
    job = place.start(*SHAPE, cold=True, clock=True)
    job.wait_until_said("clock step")
    seconds = time.monotonic() - started
    assert "continuing from step" in job.text
    job.kill()
    return seconds
