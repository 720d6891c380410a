"""Two attempts on one run: the older is frozen, the newer finishes, the older goes on and does no harm."""

from __future__ import annotations

import signal

import pytest

from job.domain.errors import Superseded
from job.run.reader import read_record
from tests.durability.conftest import Place
from tests.durability.outcome import Outcome, check_same_outcome
from tests.durability.verdicts import (
    check_newer_is_untouched,
    check_no_revision_is_new,
    check_readers_are_safe,
    digests,
    lasting,
    revisions,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Where the older is frozen: the driver's point, and the how-manieth time. Two epochs of 8 steps and a commit
# every 3 steps: the third commit drops, and so deletes, the first.
MOMENTS = {
    "just after its claim": ("appended", 1),
    "before its first call": ("call", 1),
    "in training": ("called", 5),
    "before it writes a checkpoint": ("write", 2),
    "while it writes a checkpoint": ("half written", 2),
    "before an upload": ("upload", 2),
    "in mid-upload": ("half uploaded", 2),
    "after an upload": ("uploaded", 2),
    "just before its revision": ("append", 3),
    "just after its revision": ("appended", 3),
    "before it evaluates": ("predict", 1),
    "after it has evaluated": ("predicted", 1),
    "before it publishes": ("segment", 1),
    "while it publishes": ("segment created", 1),
    "just before its prune": ("delete", 1),
    "during its prune": ("deleted", 1),
    "just before its last revision": ("last append", 1),
}
IN_A_BUCKET_TOO = (
    *("just before its revision", "just after its revision", "in mid-upload"),
    *("just before its prune", "in training"),
)
ITS_OWN_UPLOAD = r"checkpoints/step-\d{10}-a0001-[0-9a-f]+\.keras"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "local") for name in MOMENTS),
        *((name, "gcs") for name in IN_A_BUCKET_TOO),
    ],
    indirect=["place"],
)
def test_frozen(name: str, place: Place, reference: Outcome) -> None:
    point, count = MOMENTS[name]
    older = place.stopped_at(point, count)
    newer = place.finish("--take-over")
    assert "attempt 2" in newer.text
    check_same_outcome(place.store, reference)
    finished, revised = lasting(place.store), revisions(place.store)
    older.send(signal.SIGCONT)
    assert older.wait() == Superseded.exit_code, older.text
    assert "a newer attempt owns this run" in older.text
    check_no_revision_is_new(revised, place.store)
    check_newer_is_untouched(finished, digests(place.store), allowed=ITS_OWN_UPLOAD)
    check_same_outcome(place.store, reference)


@pytest.mark.parametrize("place", ["local"], indirect=True)
@pytest.mark.parametrize("point", ["load", "loaded", "claim", "config", "config created", "append"])
def test_frozen_before_its_claim(point: str, place: Place, reference: Outcome) -> None:
    """It owns nothing yet: when it goes on, it finds what the other one has finished."""
    late = place.stopped_at(point)
    place.finish()
    check_same_outcome(place.store, reference)
    late.send(signal.SIGCONT)
    assert late.wait() == 0, late.text
    check_same_outcome(place.store, reference)


@pytest.mark.parametrize("place", ["local"], indirect=True)
@pytest.mark.parametrize("point", ["last appended", "copy", "copied", "result", "result created"])
def test_frozen_after_its_last_revision(point: str, place: Place, reference: Outcome) -> None:
    """The run is complete: the other one publishes it, and so does the one that was frozen."""
    older = place.stopped_at(point)
    second = place.finish("--take-over")
    assert "already complete" in second.text
    finished = lasting(place.store)
    older.send(signal.SIGCONT)
    assert older.wait() == 0, older.text
    check_newer_is_untouched(finished, digests(place.store))
    check_same_outcome(place.store, reference)


def test_of_two_that_claim_at_once_one_goes_on(place: Place, reference: Outcome) -> None:
    both = [place.stopped_at("append", 1, "--take-over") for _ in range(2)]
    for job in both:
        job.send(signal.SIGCONT)
    assert sorted(job.wait() for job in both) == [0, Superseded.exit_code], [job.text for job in both]
    assert read_record(place.store).attempt == 2
    check_same_outcome(place.store, reference)


def test_the_older_goes_on_while_the_newer_is_in_mid_run(place: Place, reference: Outcome) -> None:
    older = place.stopped_at("append", 3)
    newer = place.stopped_at("called", 6, "--take-over")
    between, revised = lasting(place.store), revisions(place.store)
    older.send(signal.SIGCONT)
    assert older.wait() == Superseded.exit_code, older.text
    check_no_revision_is_new(revised, place.store)
    check_newer_is_untouched(between, digests(place.store), allowed=ITS_OWN_UPLOAD)
    check_readers_are_safe(place.store)
    newer.send(signal.SIGCONT)
    assert newer.wait() == 0, newer.text
    check_same_outcome(place.store, reference)


def test_a_living_owner_is_not_superseded_silently(place: Place, reference: Outcome) -> None:
    owner = place.stopped_at("called", 5)
    before = digests(place.store)
    second = place.start()
    assert second.wait() == Superseded.exit_code
    assert f"is being trained by process {owner.pid} on this host" in second.text
    assert "--take-over" in second.text
    assert digests(place.store) == before
    owner.send(signal.SIGCONT)
    assert owner.wait() == 0, owner.text
    check_same_outcome(place.store, reference)
