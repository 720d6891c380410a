"""Two workers whose run is in a bucket."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.durability.outcome import Outcome
from tests.workers.groups import Place

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def test_a_run_in_a_bucket_survives_a_signal_and_the_death_of_its_chief(
    place_in: Callable[[str], Place], gcs_bucket: str, reference: Outcome
) -> None:
    place = place_in(gcs_bucket + "/runs")
    group = place.start(2, stop={1: {"point": "called", "count": 4}})
    group.interrupt(1)
    assert group.wait() == [75, 75], group.text
    saved = place.record.commits[0].progress.step
    assert saved in (4, 5)  # the signal is taken during the step, or before the next one

    group = place.start(2, stop={0: {"point": "half uploaded"}})
    group.jobs[0].wait_until_stopped()
    group.jobs[0].kill()
    assert group.wait() == [-signal.SIGKILL, 69], group.text
    assert place.record.commits[0].progress.step == saved

    place.finish(2)
    place.check_same(reference)
    assert place.record.attempt == 3
