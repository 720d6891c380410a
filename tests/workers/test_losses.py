"""Workers that are killed: the others end within seconds, and the group goes on where its last commit is."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.domain.errors import IdentityConflict, Interrupted
from job.run.reader import read_record
from job.store.contract import NotFound
from tests.durability.jobs import Job
from tests.durability.outcome import Outcome
from tests.workers.groups import Place

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KILLED, LOST = -signal.SIGKILL, 69
LOST_SECONDS = 30.0  # within which all others must have ended
CHIEF, WORKER = 0, 1


@dataclass(frozen=True)
class Death:
    """Where the victim, the other one or both are then: a point of the driver, and the how-manieth time."""

    victim_at: tuple[str, int] | None = None
    other_at: tuple[str, int] | None = None


# Each is a life of the same run, of 2 epochs of 8 steps with a commit every 3; the next life goes on from the
# last commit. The chief's run and the worker's go side by side, because some losses are only noticed by the
# heartbeat that does not come.
DEATHS_OF_CHIEF = {
    "meeting": Death(("met", 1), other_at=("met", 1)),
    "before the first step": Death(("call", 1)),
    "half-written checkpoint": Death(("half written", 1)),
    "before the revision": Death(("append", 2)),  # the first one is the claim
    "mid-epoch": Death(("call", 5)),
    "evaluation": Death(("predicted", 1)),
}
DEATHS_OF_WORKER = {
    "meeting": Death(("met", 1), other_at=("met", 1)),
    "before the first step": Death(("call", 1)),
    "the chief's commit": Death(other_at=("append", 2)),
    "evaluation": Death(("predict", 1)),
    "mid-epoch": Death(("call", 5)),
}


def test_runs_whose_workers_are_killed_again_and_again_end_with_the_same_bits(
    place_in: Callable[[str], Place], tmp_path: Path, reference: Outcome
) -> None:
    chains = [
        Chain(place_in(str(tmp_path / f"victim-{victim}")), victim, deaths)
        for victim, deaths in ((CHIEF, DEATHS_OF_CHIEF), (WORKER, DEATHS_OF_WORKER))
    ]
    while [chain for chain in chains if not chain.has_ended()]:
        time.sleep(0.01)
    for chain in chains:
        assert chain.last.wait() == [0, 0], chain.last.text
        assert "continuing from step" in chain.last.jobs[0].text
        chain.place.check_same(reference)


class Chain:
    """The lives of one run, one after the other, and an undisturbed one at last."""

    def __init__(self, place: Place, victim: int, deaths: dict[str, Death]) -> None:
        self.place = place
        self.lives = (Life(place, victim, name, death) for name, death in deaths.items())
        self.life = next(self.lives, None)

    def has_ended(self) -> bool:
        """Go one step further if it can be gone."""
        if self.life is not None and self.life.has_ended():
            self.life.check()
            self.life = next(self.lives, None)
            if self.life is None:
                self.last = self.place.start(2)
        return self.life is None


def has_stopped(job: Job) -> bool:
    state = job.state()
    assert state not in ("", "Z"), f"the process never reached its point:\n{job.text}"
    return state == "T"


def seconds_without_a_core(job: Job) -> float:
    """Return how long the main thread could have run, but others ran: what a busy machine costs."""
    return int(Path(f"/proc/{job.pid}/task/{job.pid}/schedstat").read_text().split()[1]) / 1e9


class Life:
    """One attempt of a group, which ends with a death."""

    def __init__(self, place: Place, victim: int, name: str, death: Death) -> None:
        self.victim, self.other = victim, 1 - victim
        self.name = name
        stops = {victim: death.victim_at, self.other: death.other_at}
        self.points = {index: point for index, point in stops.items() if point}
        stop = {index: {"point": name, "count": count} for index, (name, count) in self.points.items()}
        self.group = place.start(2, stop=stop)
        self.killed: float | None = None  # time.monotonic()
        self.seconds: float | None = None  # from then until the other one has ended

    def has_ended(self) -> bool:
        """Kill the victim once both are where they must be, and look whether the other one has noticed."""
        if self.killed is None:
            if all(has_stopped(self.group.jobs[index]) for index in self.points):
                self.kill()
        elif self.seconds is None and self.group.jobs[self.other].state() == "Z":
            # The first step is being compiled, perhaps.
            starved = seconds_without_a_core(self.group.jobs[self.other]) - self.starved
            self.seconds = time.monotonic() - self.killed - starved
        return self.seconds is not None

    def kill(self) -> None:
        other = self.group.jobs[self.other]
        self.starved = seconds_without_a_core(other)
        self.group.jobs[self.victim].kill()
        self.killed = time.monotonic()
        other.send(signal.SIGCONT)

    def check(self) -> None:
        codes = self.group.wait()
        print(f"worker {self.victim} killed, {self.name}: the other ended after {self.seconds:.1f} s")
        assert (codes[self.victim], codes[self.other]) == (KILLED, LOST), f"{self.name}: {self.group.text}"
        text = self.group.jobs[self.other].text
        while_they_met = f"worker {self.other} lost a peer while they met"
        named = f"worker {self.other} lost worker {self.victim} at {self.group.hosts[self.victim]}: "
        assert while_they_met in text or named in text, text
        assert self.seconds is not None
        assert self.seconds < LOST_SECONDS, self.name


def test_who_dies_in_the_last_moment_does_not_fail_a_run_that_is_complete(place: Place) -> None:
    group = place.start(2, stop={CHIEF: {"point": "last append"}})
    group.jobs[CHIEF].wait_until_stopped()
    group.jobs[WORKER].kill()
    group.jobs[CHIEF].send(signal.SIGCONT)
    assert group.jobs[CHIEF].wait() == 0, group.text
    assert read_record(place.store).state == "complete"


def test_who_leaves_before_the_last_commit_is_stored_does_not_turn_a_stop_into_a_loss(place: Place) -> None:
    """A worker is signalled, all agree to stop, and its grace is over while the chief still writes."""
    group = place.start(
        2,
        "--grace-seconds",
        "3",
        stop={CHIEF: {"point": "closing append"}, WORKER: {"point": "called", "count": 4}},
    )
    group.interrupt(WORKER)
    group.jobs[CHIEF].wait_until_stopped()
    assert group.jobs[WORKER].wait() == Interrupted.exit_code, group.text
    group.jobs[CHIEF].send(signal.SIGCONT)
    assert group.jobs[CHIEF].wait() == Interrupted.exit_code, group.text
    record = read_record(place.store)
    assert record.state == "interrupted"
    assert f"step {record.commits[0].progress.step} is committed" in group.jobs[CHIEF].text


def test_workers_that_were_asked_for_different_runs_train_nothing(place: Place) -> None:
    group = place.group(2)
    group.begin(0)
    group.options += ("--seed", "1")
    group.begin(1)
    assert group.wait() == [IdentityConflict.exit_code] * 2, group.text
    assert "worker 1 was asked for another run than worker 0 (seed: 1, not 0)" in group.jobs[1].text
    with pytest.raises(NotFound):
        read_record(place.store)
