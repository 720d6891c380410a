"""Workers against replicas of one process: the same bits, also after signals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from job.domain.record import Record
from tests.durability.outcome import Outcome
from tests.workers.groups import Place, has_ipv6, of_one_process

pytestmark = [pytest.mark.slow, pytest.mark.alone]

IMAGES, STEPS = 990, 5  # of one epoch: batches of 198, three times 66 each
BY_THREE = (
    *("--holdout", "10", "--batch-size", "198", "--epochs", "1"),
    *("--commit-every", "1steps", "--keep", str(STEPS + 1)),
)


def test_two_workers_have_the_bits_of_two_replicas(place: Place, reference: Outcome) -> None:
    assert place.alone("--replicas", "2").wait() == 0
    place.check_same(of_one_process(reference, 2))
    recalibrated = reference.result["recalibrated"]  # compared with all of the result
    assert recalibrated["images"] == 1000
    assert recalibrated["validation"].keys() == {"loss", "accuracy"}


def test_two_workers_at_ipv6_addresses_have_the_same_bits(place: Place, reference: Outcome) -> None:
    if not has_ipv6():
        pytest.skip("this host has no IPv6")
    group = place.group(2)
    group.hosts = [host.replace("127.0.0.1", "[::1]") for host in group.hosts]
    for index in range(2):
        group.begin(index)
    assert group.wait() == [0, 0], group.text
    place.check_same(reference)


def test_a_signal_to_any_worker_stops_all_at_one_step_and_the_group_continues(
    place: Place, reference: Outcome
) -> None:
    step = 0
    for victim, calls in ((1, 4), (0, 5)):
        group = place.start(2, stop={victim: {"point": "called", "count": calls}})
        group.interrupt(victim)
        assert group.wait() == [75, 75], group.text
        # The signal is taken during the step, or before the next one.
        assert place.record.commits[0].progress.step - step in (calls, calls + 1)
        step = place.record.commits[0].progress.step
        assert f"step {step} is committed" in group.jobs[0].text
    place.finish(2)
    place.check_same(reference)
    assert place.record.attempt == 3


def test_a_diverging_run_ends_all_workers_alike(place: Place) -> None:
    group = place.start(2, "--learning-rate", "1e30")
    assert group.wait() == [70, 70], group.text
    assert place.record.state == "diverged"


def test_three_workers_follow_three_replicas_within_1e_6_over_five_steps(
    place_in: Callable[[str], Place], tmp_path: Path
) -> None:
    workers, replicas = (place_in(str(tmp_path / name)) for name in ("workers", "replicas"))
    workers.finish(3, *BY_THREE)
    assert replicas.alone("--replicas", "3", *BY_THREE).wait() == 0
    np.testing.assert_allclose(steps(workers.record), steps(replicas.record), rtol=1e-6)
    assert workers.record.finished is not None
    assert workers.record.finished.result["replicas"] == workers.record.finished.result["workers"] == 3
    # A finished run needs no peers, and says so to any number of workers.
    assert workers.start(2, *BY_THREE).wait() == [0, 0]


def steps(record: Record) -> list[float]:
    """Return the loss of each step: the differences of the sums after each, the last from the history."""
    sums = [commit.progress.loss_sum for commit in reversed(record.commits) if commit.progress.batch]
    sums.append(record.history[0]["train"]["loss"] * IMAGES)
    assert len(sums) == STEPS
    return [float(loss) for loss in np.diff([0.0, *sums])]
