"""The protocol under every order of calls that a few switches between processes make possible.

The explorer is shown to find what it is for: protocols that are broken on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.domain.errors import JobError, StorageFailed, Superseded
from job.domain.network import Network
from job.domain.record import Finished, Progress, Record
from job.domain.settings import Settings
from job.publish import events, pictures
from job.publish.publication import MODEL, RESULT, Publication
from job.run import owner
from job.run.committer import Committer
from job.run.names import RECORD
from job.run.owner import HeldRun, claim
from job.run.position import Position
from job.run.reader import read_record
from job.run.record_log import RecordLog
from job.store.contract import AlreadyExists
from tests.run.interleavings import Call, MemoryStore, Objects, Switches, Turns, explore
from tests.support import split_of

IDENTITY = Settings(network=Network(blocks=(1,), filters=4)).identity(
    precision="float32", data_sha256="5" * 64
)
LOST, REFUSED = ("lost",), ("refused",)
CREATES = 8  # of an attempt that commits twice: configuration, claim, checkpoints and revisions


NO_LAYERS = SimpleNamespace(layers=[])


@dataclass
class World:
    """One play: what is stored, and what is wrong with it."""

    folder: Path
    objects: Objects = field(default_factory=Objects)
    wrong: list[str] = field(default_factory=list)
    attempt: int = 0
    finished: int = 0  # epochs of the longest result

    def newest(self) -> Record | None:
        names = [name for name in self.objects.now if RECORD.fullmatch(name)]
        return Record.from_bytes(self.objects.now[max(names)], max(names)) if names else None

    def check(self) -> None:
        """At any instant: all that the record names is there, and neither attempts nor results go back."""
        record = self.newest()
        if record is None:
            return
        gone = [commit.name for commit in record.restorable if commit.name not in self.objects.now]
        if gone:
            self.wrong.append(f"revision {record.revision} names {gone}")
        if record.attempt < self.attempt:
            self.wrong.append(f"attempt {record.attempt} owns the run after attempt {self.attempt}")
        self.attempt = max(record.attempt, self.attempt)
        finished = record.finished.epochs if record.finished else 0
        if finished < self.finished:
            self.wrong.append(f"the result of {self.finished} epochs is gone")
        self.finished = max(finished, self.finished)

    def acknowledged(self, record: Record) -> None:
        """An attempt was told that this revision is the record, and nobody else has had a turn since."""
        newest = self.newest()
        if newest != record:
            self.wrong.append(f"revision {record.revision} was acknowledged, but the record is {newest}")

    def live(self, process: Process, store: MemoryStore) -> None:
        try:
            process(store, self)
        except (Superseded, StorageFailed):
            return
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")


Process = Callable[[MemoryStore, World], None]


def attempt(commits: int, *, publishes: bool = False) -> Process:
    """An attempt that continues from what it finds, commits so often, and finishes the run."""

    def run(store: MemoryStore, world: World) -> None:
        held = claim(store, IDENTITY, settings={"epochs": 9}, take_over=True)

        def publish(record: Record) -> None:
            world.acknowledged(record)
            if publishes:
                Publication(store, {}, split_of(10), NO_LAYERS, read=read_record).publish(record)

        committer = Committer(held, keep=2, save=save, publish=publish)
        try:
            train(held, committer, commits)
        except Superseded:
            if (newest := world.newest()) is None or newest.nonce == held.record.nonce:
                world.wrong.append("superseded, but by nobody")
        finally:
            committer.close()
            held.close()

    return run


def train(held: HeldRun, committer: Committer, commits: int) -> None:
    restored = held.restore(lambda path: int(path.read_text()))
    held.remove_leftovers()
    step = restored[1].progress.step if restored else 0
    for _ in range(commits):
        step += 1
        committer.submit(step, position(step))
        wait([committer._in_flight] if committer._in_flight else [])  # one call at a time
    committer.finish(position(step), lambda: (step, position(step)), complete)


def save(state: int, path: Path) -> None:
    path.write_text(str(state))


def position(step: int) -> Position:
    """Each step is an epoch."""
    return Position(progress=Progress(step=step, epoch=step))


def complete(record: Record) -> Record:
    newest = record.commits[0]
    finished = Finished(epochs=newest.progress.epoch, result={"steps": newest.progress.step}, commit=newest)
    return replace(record, state="complete", finished=finished)


def play(
    folder: Path,
    processes: Sequence[Process],
    switches: Switches,
    faults: Sequence[str] = (),
) -> tuple[World, list[Call]]:
    """Play once; the first process meets the faults."""
    world, turns = World(folder), Turns(switches)

    def living(number: int, process: Process) -> Callable[[], None]:
        store = MemoryStore(
            world.objects, folder, lambda text: turns.wait(number, text), faults if number == 0 else ()
        )
        return lambda: world.live(process, store)

    turns.play([living(number, process) for number, process in enumerate(processes)], world.check)
    return world, turns.calls


def check_all(
    folder: Path,
    processes: Sequence[Process],
    *,
    switches: int,
    faults: Sequence[str] = (),
) -> int:
    """Play all orders. Raises AssertionError with the first that goes wrong."""

    def once(chosen: Switches) -> list[Call]:
        world, calls = play(folder, processes, chosen, faults)
        assert not world.wrong, "\n".join([*world.wrong, f"faults {faults}", *map(str, calls)])
        return calls

    return explore(once, switches=switches)


# -- the protocol ------------------------------------------------------------------------------------------


def test_an_attempt_and_its_successor(tmp_path: Path) -> None:
    """Both are frozen at each call, also the successor: between what it reads and what it claims."""
    assert check_all(tmp_path, [attempt(3), attempt(1)], switches=2) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commits", "switches"), [((3, 1), 3), ((1, 1, 1), 2)], ids=["two attempts", "three attempts"]
)
def test_more_switches(commits: tuple[int, ...], switches: int, tmp_path: Path) -> None:
    assert check_all(tmp_path, list(map(attempt, commits)), switches=switches) > 500


@pytest.mark.parametrize("fault", [LOST, REFUSED, LOST + LOST, LOST + REFUSED], ids="-".join)
def test_an_answer_that_is_lost_or_a_store_that_is_out(fault: tuple[str, ...], tmp_path: Path) -> None:
    """At each of the calls that create something, and an attempt that comes in between."""
    for before in range(CREATES):
        check_all(tmp_path, [attempt(2), attempt(1)], switches=1, faults=("",) * before + fault)


def test_the_fence_is_seen_behind_a_revision_of_our_own_whose_answer_was_lost(tmp_path: Path) -> None:
    objects = Objects()
    lost = MemoryStore(objects, tmp_path, faults=("", "", "lost"))  # configuration, claim, revision
    first = claim(lost, IDENTITY, settings={"epochs": 9}, take_over=True)
    with pytest.raises(StorageFailed):
        first.append(lambda record: replace(record, state="interrupted"))
    first.check_fence()
    second = claim(MemoryStore(objects, tmp_path), IDENTITY, settings={"epochs": 9}, take_over=True)
    assert second.record.revision == 3
    with pytest.raises(Superseded):
        first.check_fence()
    for held in (first, second):
        held.close()


@pytest.mark.slow
def test_the_published_result_is_the_newest_one_whoever_was_frozen_while_it_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is extended, by an attempt that publishes between two calls of the first one."""
    monkeypatch.setattr(events, "segments", lambda *about, **existing: {})  # created once, or made again
    monkeypatch.setattr(pictures, "png", lambda image: b"")

    def once(chosen: Switches) -> list[Call]:
        world, calls = play(tmp_path, [attempt(1, publishes=True), attempt(1, publishes=True)], chosen)
        story = "\n".join([*world.wrong, *map(str, calls)])
        assert not world.wrong, story
        record = world.newest()
        finished = record.finished if record else None
        assert finished and finished.commit, story  # noqa: PT018
        assert json.loads(world.objects.now[RESULT]) == finished.result, story
        assert world.objects.now[MODEL] == world.objects.now[finished.commit.name], story
        return calls

    assert explore(once, switches=2) > 100


# -- what is broken on purpose -----------------------------------------------------------------------------


def forget_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim's revision is pruned like the others."""
    inner = RecordLog._advance

    def advance(log: RecordLog, after: Record) -> None:
        log._claim = 0
        inner(log, after)

    monkeypatch.setattr(RecordLog, "_advance", advance)


def trust_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could create a revision believes that it is the newest."""
    monkeypatch.setattr(owner, "_is_newest", lambda store, claimed: True)


def overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision takes the place of another."""
    monkeypatch.setattr(MemoryStore, "create", MemoryStore.replace)


def prune_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a revision will not name any more is deleted before it is the record."""
    inner = RecordLog.append

    def append(log: RecordLog, change: Callable[[Record], Record]) -> Record:
        dropped = {commit.name for commit in log.record.restorable} - {
            commit.name for commit in change(log.record).restorable
        }
        log.forget(dropped)
        log.prune()
        return inner(log, change)

    monkeypatch.setattr(RecordLog, "append", append)


def give_up_on_a_taken_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is taken is a newer attempt's, whoever took it."""

    def own(log: RecordLog, revision: int) -> Record:
        raise Superseded("somebody was faster")

    monkeypatch.setattr(RecordLog, "_own", own)


@pytest.mark.parametrize(
    ("broken", "faults", "symptom"),
    [
        (forget_the_claim, (), "acknowledged|owns the run after"),
        (trust_every_claim, (), "names|acknowledged"),
        (overwrite, (), "acknowledged|names|owns the run after"),
        (prune_first, (), "names"),
        (give_up_on_a_taken_name, ("", "", "", "lost"), "superseded, but by nobody"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_protocol_that_is_broken_is_found_out(
    broken: Any, faults: tuple[str, ...], symptom: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=symptom):
        check_all(tmp_path, [attempt(3), attempt(1)], switches=2, faults=faults)


# -- the explorer itself -----------------------------------------------------------------------------------


def add_one(store: MemoryStore, world: World) -> None:
    store.replace("sum", b"%d" % (int(store.read("sum")) + 1))


def take_a_number(store: MemoryStore, world: World) -> None:
    number = 0
    while True:
        try:
            return store.create(f"number-{number}", b"%d" % id(store))
        except AlreadyExists:
            number += 1


def test_an_update_is_lost_in_some_orders_and_no_number_is_taken_twice(tmp_path: Path) -> None:
    sums: list[bytes] = []
    numbers: list[set[str]] = []

    def once(process: Any, switches: Switches) -> list[Call]:
        world, turns = World(tmp_path, Objects({"sum": b"0"})), Turns(switches)

        def living(number: int) -> Callable[[], None]:
            store = MemoryStore(world.objects, tmp_path, lambda text: turns.wait(number, text))
            return lambda: process(store, world)

        turns.play([living(0), living(1)], lambda: None)
        sums.append(world.objects.now["sum"])
        numbers.append(world.objects.now.keys() - {"sum"})
        return turns.calls

    explore(lambda switches: once(add_one, switches), switches=1)
    assert set(sums) == {b"1", b"2"}
    numbers.clear()
    explore(lambda switches: once(take_a_number, switches), switches=1)
    assert numbers == [{"number-0", "number-1"}] * len(numbers)


def test_a_failure_tells_the_order_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_every_claim(monkeypatch)
    with pytest.raises(AssertionError, match=r"(?s)A: begin\n.*B: read record-.*\n.*B: create record-"):
        check_all(tmp_path, [attempt(3), attempt(1)], switches=2)


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    def fail(store: MemoryStore, world: World) -> None:
        raise JobError("it cannot")

    with pytest.raises(AssertionError, match="JobError: it cannot"):
        check_all(tmp_path, [fail], switches=0)
