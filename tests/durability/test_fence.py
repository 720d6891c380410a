"""Two attempts on one run: the older is frozen, the newer finishes, the older goes on and does no harm."""

from __future__ import annotations

import signal

import pytest

from job.errors import Superseded
from tests.durability.conftest import Place
from tests.durability.outcome import Outcome, check_same_outcome
from tests.durability.verdicts import check_newer_is_untouched, check_readers_are_safe, versions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Two epochs of 8 steps and a commit every 3 steps: the third commit drops, and so deletes, the first.
MOMENTS = {
    "just before its swap": ("swap", 3),
    "just after its swap": ("swapped", 3),
    "in mid-upload": ("half uploaded", 2),
    "just before its prune": ("delete", 1),
    "in training": ("called", 5),
}
ITS_OWN_UPLOAD = r"checkpoints/step-\d{10}-a0001-[0-9a-f]+\.keras"


@pytest.mark.parametrize("name", MOMENTS)
def test_frozen(name: str, place: Place, reference: Outcome) -> None:
    point, count = MOMENTS[name]
    older = place.stopped_at(point, count)
    newer = place.finish("--take-over")
    assert "attempt 2" in newer.text
    check_same_outcome(place.store, reference)
    finished = versions(place.store)
    older.send(signal.SIGCONT)
    assert older.wait() == Superseded.exit_code, older.text
    assert "a newer attempt owns this run" in older.text
    check_newer_is_untouched(finished, versions(place.store), allowed=ITS_OWN_UPLOAD)
    check_same_outcome(place.store, reference)


def test_the_older_goes_on_while_the_newer_is_in_mid_run(place: Place, reference: Outcome) -> None:
    older = place.stopped_at("swap", 3)
    newer = place.stopped_at("called", 6, "--take-over")
    between = versions(place.store)
    older.send(signal.SIGCONT)
    assert older.wait() == Superseded.exit_code, older.text
    check_newer_is_untouched(between, versions(place.store), allowed=ITS_OWN_UPLOAD)
    check_readers_are_safe(place.store)
    newer.send(signal.SIGCONT)
    assert newer.wait() == 0, newer.text
    check_same_outcome(place.store, reference)


def test_a_living_owner_is_not_superseded_silently(place: Place, reference: Outcome) -> None:
    owner = place.stopped_at("called", 5)
    before = versions(place.store)
    second = place.start()
    assert second.wait() == Superseded.exit_code
    assert f"process {owner.pid} on host" in second.text
    assert "--take-over" in second.text
    assert versions(place.store) == before
    owner.send(signal.SIGCONT)
    assert owner.wait() == 0, owner.text
    check_same_outcome(place.store, reference)
