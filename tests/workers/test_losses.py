"""Workers that are killed: the others end within seconds, and the group goes on where its last commit is."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.durability.jobs import Job
from tests.durability.outcome import Outcome
from tests.workers.groups import Place

pytestmark = pytest.mark.slow

KILLED, LOST = -signal.SIGKILL, 69
LOST_SECONDS = 30.0  # within which all others must have ended
CHIEF, WORKER = 0, 1


@dataclass(frozen=True)
class Death:
    """Where the victim is when it is killed, and the other one, if that matters: points of the driver."""

    point: str
    count: int = 1
    other_at: str | None = None


# Each is a life of the same run, of 2 epochs of 8 steps with a commit every 3; the next life goes on from the
# last commit. The chief's run and the worker's go side by side, because some losses are only noticed by the
# heartbeat that does not come.
DEATHS_OF_CHIEF = {
    "meeting": Death("looked", other_at="met"),
    "before the first step": Death("call"),
    "half-written checkpoint": Death("half written"),
    "before the swap": Death("swap", 2),  # the first one is the claim
    "mid-epoch": Death("call", 5),
    "evaluation": Death("predicted"),
}
DEATHS_OF_WORKER = {
    "meeting": Death("looked", other_at="met"),
    "before the first step": Death("call"),
    "the chief's commit": Death("called", 3, other_at="swap"),
    "evaluation": Death("predict"),
    "mid-epoch": Death("call", 5),
}


def test_runs_whose_workers_are_killed_again_and_again_end_with_the_same_bits(
    place_in: Callable[[str], Place], tmp_path: Path, reference: Outcome
) -> None:
    places = {victim: place_in(str(tmp_path / f"victim-{victim}")) for victim in (CHIEF, WORKER)}
    for pair in zip_longest(DEATHS_OF_CHIEF.items(), DEATHS_OF_WORKER.items()):
        lives = [
            Life(places[victim], victim, *named) for victim, named in zip(places, pair, strict=True) if named
        ]
        for life in lives:
            life.reach_its_end()
        for life in lives:
            life.check_its_end()
    for place in places.values():
        group = place.start(2)
        assert group.wait() == [0, 0], group.text
        assert "continuing from step" in group.jobs[0].text
        place.check_same(reference)


def seconds_without_a_core(job: Job) -> float:
    """Return how long the main thread could have run, but others ran: what a busy machine costs."""
    return int(Path(f"/proc/{job.pid}/task/{job.pid}/schedstat").read_text().split()[1]) / 1e9


class Life:
    """One attempt of a group, which ends with a death."""

    def __init__(self, place: Place, victim: int, name: str, death: Death) -> None:
        self.victim, self.other = victim, 1 - victim
        self.name, self.death = name, death
        stop = {victim: {"point": death.point, "count": death.count}}
        if death.other_at:
            stop[self.other] = {"point": death.other_at, "count": 2 if death.other_at == "swap" else 1}
        self.group = place.start(2, stop=stop)

    def reach_its_end(self) -> None:
        self.group.jobs[self.victim].wait_until_stopped()
        if self.death.other_at:
            self.group.jobs[self.other].wait_until_stopped()
        other = self.group.jobs[self.other]
        self.starved = seconds_without_a_core(other)
        self.group.jobs[self.victim].kill()
        self.killed = time.monotonic()
        other.send(signal.SIGCONT)

    def check_its_end(self) -> None:
        other = self.group.jobs[self.other]
        while other.state() != "Z":  # then nobody has asked for its exit code yet
            time.sleep(0.01)
        # The first step is being compiled, perhaps.
        starved = seconds_without_a_core(other) - self.starved
        seconds = time.monotonic() - self.killed - starved
        codes = self.group.wait()
        print(f"worker {self.victim} killed, {self.name}: the other ended after {seconds:.1f} s")
        assert (codes[self.victim], codes[self.other]) == (KILLED, LOST), f"{self.name}: {self.group.text}"
        assert f"worker {self.other} lost a peer" in other.text
        assert seconds < LOST_SECONDS, self.name
