"""What can happen to attempts at the level of the protocol, at every possible instant.

A scenario takes empty stores and raises ``AssertionError`` where the protocol does not survive. The real one
must pass, each that is broken on purpose must not: so the checkers are checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from job.domain.errors import JobError, Superseded
from job.publish.publication import MODEL
from job.run.names import RECORD
from job.run.reader import read_record
from job.store.contract import Store
from job.store.local import LocalStore
from tests.durability.protocol import EPOCHS, STEPS_PER_EPOCH, MortalStore, play, play_until_killed
from tests.durability.verdicts import (
    check_commits_are_whole,
    check_is_complete,
    check_newer_is_untouched,
    check_no_litter,
    check_no_revision_is_new,
    check_readers_are_safe,
    check_result_is_there,
    check_same_history,
    digests,
    lasting,
    revisions,
)

NewStore = Callable[[], Store]
# What an attempt may still add once it is fenced: its checkpoint, and events of epochs that are recorded.
OF_THE_OLDER = r"checkpoints/step-\d{10}-a0002-[0-9a-f]+\.keras"


def prepare_extension(store: Store) -> None:
    """Finish a shorter run, and leave the litter of a killed attempt."""
    play(store, epochs=EPOCHS - 1)
    store.create("checkpoints/step-0000000009-a0001-0badcafe.keras", b"unnamed")


def kill_after_every_change(new_store: NewStore) -> int:
    """Kill an attempt after each of its changes and let the next one finish. Returns the number of kills."""
    return _kill(new_store, prepare=lambda store: None, check=check_readers_are_safe)


def kill_while_it_is_extended(new_store: NewStore) -> int:
    """The same with a finished run that is extended: its result is there at every instant."""

    def check(store: Store) -> None:
        check_readers_are_safe(store)
        check_result_is_there(store, epochs=EPOCHS - 1, steps=(EPOCHS - 1) * STEPS_PER_EPOCH)

    return _kill(new_store, prepare=prepare_extension, check=check)


def _kill(new_store: NewStore, *, prepare: Callable[[Store], None], check: Callable[[Store], None]) -> int:
    whole = new_store()
    prepare(whole)
    mortal = MortalStore(whole)
    _survive(lambda: play(mortal))
    check_is_complete(whole)
    check_no_litter(whole)
    for die_after in range(len(mortal.changes) + 1):
        store = new_store()
        prepare(store)
        assert play_until_killed(store, die_after)
        check(store)
        _survive(lambda store=store: play(store))  # type: ignore[misc]
        check_same_end(store, whole)
        check_no_litter(store)
        store.close()
    whole.close()
    return len(mortal.changes) + 1


def freeze_before_every_call(new_store: NewStore) -> int:
    """Freeze an attempt before each call of the store after its claim until a newer one has finished the run.

    The run is an extension of a finished one, so that there is something to prune and a result to replace.
    Returns the number of times that the older attempt was superseded.
    """
    whole = new_store()
    prepare_extension(whole)
    mortal = MortalStore(whole)
    play(mortal)
    calls = range(_claim_call(mortal), len(mortal.calls))
    fenced = sum(_freeze(new_store(), whole, number) for number in calls)
    whole.close()
    return fenced


def _claim_call(mortal: MortalStore) -> int:
    """Calls up to the claim's revision, that one included."""
    return 1 + next(n for n, call in enumerate(mortal.calls) if call.startswith("create record-"))


def _freeze(store: Store, whole: Store, number: int) -> bool:
    prepare_extension(store)
    older, superseded = MortalStore(store), False
    finished: dict[str, int] = {}
    revised: set[str] = set()

    def finish_meanwhile(verb: str, name: str) -> None:
        if len(older.calls) == number and not finished:
            _survive(lambda: play(store))
            check_same_end(store, whole)
            finished.update(lasting(store))
            revised.update(revisions(store))

    older.before = finish_meanwhile
    try:
        play(older)
    except Superseded:
        superseded = True
    except JobError as error:
        raise AssertionError(f"the older attempt failed: {error!r}") from error
    assert finished
    check_newer_is_untouched(finished, digests(store), allowed=OF_THE_OLDER)
    check_no_revision_is_new(revised, store)
    check_is_complete(store)
    store.close()
    return superseded


def find_every_name_taken(new_store: NewStore) -> int:
    """Damage the first upload of each checkpoint, so that other bytes hold its name. Returns their number."""
    store, taken = new_store(), []
    mortal = MortalStore(store)

    def damage(verb: str, name: str) -> None:
        step = name.partition("-a")[0]
        if verb == "upload" and step not in taken:
            taken.append(step)
            store.create(name, b"damaged on the way")

    mortal.before = damage
    _survive(lambda: play(mortal))
    check_commits_are_whole(store, read_record(store))
    check_is_complete(store)
    store.close()
    return len(taken)


def cut_the_power(store: LocalStore) -> int:
    """Watch the order of system calls: what gets a name is synced before, and its name before the record.

    Returns the number of names given.
    """
    synced: set[int] = set()
    folders: set[int] = set()  # with new names that a power cut could still take
    given: list[str] = []
    fsync, link, rename = os.fsync, os.link, os.replace

    def watch_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        folders.discard(os.fstat(descriptor).st_ino)

    def watch(action: Callable[..., None]) -> Callable[..., None]:
        def give_name(source: Any, target: Any, **rest: Any) -> None:
            path = Path(target)
            if path.is_relative_to(store.root) and not path.name.startswith("."):
                given.append(path.name)
                assert os.stat(source).st_ino in synced, f"{path.name} is named before its content is safe"
                if RECORD.fullmatch(path.name):
                    assert not folders, "the record is made before what it names is safe"
                folders.add(path.parent.stat().st_ino)
            action(source, target, **rest)

        return give_name

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(os, "fsync", watch_fsync))
        stack.enter_context(mock.patch.object(os, "link", watch(link)))
        stack.enter_context(mock.patch.object(os, "replace", watch(rename)))
        play(store)
    assert not folders, "the last names are not safe"
    return len(given)


def check_same_end(store: Store, whole: Store) -> None:
    """The run ended with the bits of the undisturbed one, and left nothing else."""
    check_is_complete(store)
    check_same_history(store, whole)
    results = [json.loads(one.read(MODEL))["digest"] for one in (store, whole)]
    assert results[0] == results[1], "another result than that of the undisturbed run"


def _survive(action: Callable[[], None]) -> None:
    """Run an attempt that nothing disturbs: it must not fail."""
    try:
        action()
    except (JobError, LookupError, ValueError) as error:
        raise AssertionError(f"an undisturbed attempt failed: {error!r}") from error


def stores_in(folder: str, kind: Callable[[str], Store]) -> Iterator[Store]:
    """Make stores below a folder, one after another."""
    number = 0
    while True:
        number += 1
        yield kind(f"{folder}/{number}")
