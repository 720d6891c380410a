"""SIGKILL anywhere: the same command finishes to the bits, metrics and events of an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.durability.conftest import Place
from tests.durability.outcome import Outcome, check_same_outcome, extended_from, outcome
from tests.durability.verdicts import (
    check_no_litter,
    check_readers_are_safe,
    check_result_is_there,
    digests,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What is killed, the driver's point, and the how-manieth time in its process. Each process of a chain goes on
# where the one before was killed. Two epochs of 8 steps; a commit every 3 steps.
CHAINS = {
    "starting": [
        ("start-up", "load", 1),
        ("before the claim", "claim", 1),
        ("between configuration and claim", "config created", 1),
        ("before the claim's revision", "append", 1),
        ("after the claim's revision", "appended", 1),
        ("in the first call", "called", 1),
    ],
    "training": [
        ("mid-epoch", "called", 2),
        ("while a checkpoint is written", "half written", 1),
        ("before an upload", "upload", 1),
        ("while it uploads", "half uploaded", 1),
        ("between upload and revision", "append", 2),
        ("after a revision", "appended", 2),
        ("during evaluation", "predicted", 1),
        ("between revision and segment", "segment", 1),
        ("between two segments", "segment created", 1),
        ("before a prune", "delete", 1),
        ("during a prune", "deleted", 1),
    ],
    "finishing": [
        ("before the last revision", "last append", 1),
        ("after the last revision", "last appended", 1),
        ("before the model", "copy", 1),
        ("between model and result", "copied", 1),
        ("after the result", "result created", 1),
    ],
}
# The same of a finished run of one epoch that is extended to two.
EXTENSION = [
    ("before the claim", "claim", 1),
    ("before the claim's revision", "append", 1),
    ("after the claim's revision", "appended", 1),
    ("in training", "called", 2),
    ("while a checkpoint is written", "half written", 1),
    ("while it uploads", "half uploaded", 1),
    ("between upload and revision", "append", 2),
    ("after a revision", "appended", 2),
    ("before a prune", "delete", 1),
    ("during a prune", "deleted", 1),
    ("before the last revision", "last append", 1),
    ("after the last revision", "last appended", 1),
    ("before the longer model", "copy", 1),
    ("between model and result", "copied", 1),
    ("before the longer result", "result", 1),
    ("after the longer result", "result created", 1),
]
STEPS_OF_AN_EPOCH = 8
LONGEST_LIFE_SECONDS = 4.0  # about as long as a whole run takes once TensorFlow is imported


@pytest.mark.parametrize("name", CHAINS)
def test_killed_at_every_point_of(name: str, place: Place, reference: Outcome) -> None:
    for _, point, count in CHAINS[name]:
        place.stopped_at(point, count).kill()
        check_readers_are_safe(place.store)
    place.finish()
    check_same_outcome(place.store, reference)
    check_no_litter(place.store)


def test_killed_at_every_point_of_an_extension(place: Place, reference: Outcome) -> None:
    """The finished result is there, and is compared, at every instant; the longer one follows."""
    place.finish("--epochs", "1")
    expected = extended_from(outcome(place.store), reference)
    for _, point, count in EXTENSION:
        job = place.stopped_at(point, count)
        check_result_is_there(place.store, epochs=1, steps=STEPS_OF_AN_EPOCH)
        job.kill()
        check_readers_are_safe(place.store)
        check_result_is_there(place.store, epochs=1, steps=STEPS_OF_AN_EPOCH)
    place.finish()
    check_result_is_there(place.store, epochs=2, steps=2 * STEPS_OF_AN_EPOCH)
    check_same_outcome(place.store, expected)
    check_no_litter(place.store)


def test_the_finished_result_is_compared_all_the_time_that_it_is_extended(
    place: Place, reference: Outcome
) -> None:
    place.finish("--epochs", "1")
    expected = extended_from(outcome(place.store), reference)
    job = place.start(point="none")  # the driver makes calls of one step
    looks = 0
    while job.state() not in ("", "Z"):
        check_result_is_there(place.store, epochs=1, steps=STEPS_OF_AN_EPOCH)
        looks += 1
    assert job.wait() == 0, job.text
    assert looks > 1
    check_result_is_there(place.store, epochs=2, steps=2 * STEPS_OF_AN_EPOCH)
    check_same_outcome(place.store, expected)


def test_killed_cold(place_in: Callable[[str], Place], tmp_path: Path, reference: Outcome) -> None:
    """Forked processes stand for those that a user starts: here are two of those."""
    place = place_in(str(tmp_path / "runs"))
    place.stopped_at("called", 5, cold=True).kill()
    job = place.start(cold=True)
    assert job.wait() == 0, job.text
    check_same_outcome(place.store, reference)


@pytest.mark.parametrize(
    ("seed", "place"), [(0, "local"), (1, "gcs"), (2, "local"), (3, "gcs"), (4, "local")], indirect=["place"]
)
def test_killed_five_times_at_random_moments(seed: int, place: Place, reference: Outcome) -> None:
    """Each kill is followed by the same command, which the next moment may kill again: 25 in all."""
    moments = random.Random(seed)
    for _ in range(5):
        job = place.start()
        time.sleep(moments.uniform(0.0, LONGEST_LIFE_SECONDS))
        if job.state() == "Z":  # it had finished
            assert job.wait() == 0, job.text
        else:
            job.send(signal.SIGKILL)
            assert job.wait() in (0, -signal.SIGKILL), job.text  # 0: it was about to be gone
        check_readers_are_safe(place.store)
    place.finish()
    check_same_outcome(place.store, reference)


def test_finished_runs_are_left_alone(place: Place, reference: Outcome) -> None:
    place.finish()
    before = digests(place.store)
    job = place.finish()
    assert "already complete after 2 epochs; nothing to do" in job.text
    assert digests(place.store) == before
    check_same_outcome(place.store, reference)
