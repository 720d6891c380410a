"""Peers that are late or missing, and one run continued by other numbers of workers and replicas."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.workers.groups import Group, Place, counted, losses

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BATCH, STEPS, HOLDOUT = 198, 5, 10  # of an epoch of 990 images, which three, two and one divide
OPTIONS = ("--holdout", str(HOLDOUT), "--batch-size", str(BATCH))
LATE_SECONDS = 10.0


def test_a_missing_peer_is_named(place: Place) -> None:
    group = place.group(2)
    group.begin(0, peers={"PEERS_SECONDS": 3.0, "ANNOUNCE_SECONDS": 1.0})
    assert group.wait() == [69], group.text
    assert f"worker 0 waits for its peers; missing: worker 1 ({group.hosts[1]})" in group.text
    assert f"misses worker 1 ({group.hosts[1]}); check that their pods run" in group.text


def test_a_run_goes_on_with_other_numbers_of_workers_and_replicas(
    place_in: Callable[[str], Place], tmp_path: Path
) -> None:
    place, undisturbed = (place_in(str(tmp_path / name)) for name in ("changing", "undisturbed"))
    at_once = undisturbed.alone(*OPTIONS)
    late_third_of_three(place)
    step = interrupted_after(place, 2)
    group = place.start(2, *OPTIONS, stop={0: {"point": "called", "count": 2}})
    group.interrupt(0)
    assert group.wait() == [75, 75], group.text
    step = interrupted_after(place, step + 2)
    one = place.group(1, *OPTIONS, "--replicas", "2")
    one.begin(0, point="called", count=2)
    one.interrupt(0)
    assert one.wait() == [75], one.text
    interrupted_after(place, step + 2)
    assert place.alone(*OPTIONS).wait() == 0

    assert at_once.wait() == 0
    # Float rounding is all that differs, and Adam amplifies it.
    np.testing.assert_allclose(losses(place.record), losses(undisturbed.record), rtol=1e-3)
    check_every_image_counts_once(place)


def late_third_of_three(place: Place) -> None:
    """Let the third worker come late, and stop all after two steps."""
    group = place.group(3, *OPTIONS)
    group.begin(0, point="called", count=2, peers={"ANNOUNCE_SECONDS": LATE_SECONDS})
    group.begin(1)
    wait_until_missed(group)
    group.begin(2)
    group.interrupt(0)
    assert group.wait() == [75, 75, 75], group.text


def wait_until_missed(group: Group) -> None:
    deadline = time.monotonic() + 120
    while f"missing: worker 2 ({group.hosts[2]})" not in group.jobs[0].text:
        assert group.jobs[0].state() not in ("", "Z"), group.text
        assert time.monotonic() < deadline, group.text
        time.sleep(0.05)


def interrupted_after(place: Place, least: int) -> int:
    """Return the step, each of which has taken one whole batch, whoever shared it."""
    progress = place.record.commits[0].progress
    assert progress.step in (least, least + 1)  # the signal is taken during it, or before the next one
    assert progress.step == STEPS * progress.epoch + progress.batch
    assert progress.images == BATCH * progress.batch
    return progress.step


def check_every_image_counts_once(place: Place) -> None:
    record = place.record
    assert record.finished is not None
    result = record.finished.result
    assert [entry["step"] for entry in record.history] == [STEPS, 2 * STEPS]
    for entry, images in (
        (record.history[-1]["train"], BATCH * STEPS),
        (result["test"], 500),
    ):
        assert entry["accuracy"] * images == pytest.approx(round(entry["accuracy"] * images), abs=1e-9)
    assert record.confusion is not None
    assert counted(record.confusion) == HOLDOUT
    assert [sum(row) for row in record.confusion] == [HOLDOUT // 10] * 10
    assert [sum(row) for row in result["confusion"]] == [50] * 10  # the test set
