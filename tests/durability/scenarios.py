"""What can happen to attempts at the level of the protocol, at every possible instant.

A scenario takes a protocol (a subclass of ``Run``) and empty stores, and raises ``AssertionError`` where the
protocol does not survive. The real one must pass, each broken one must not: so the checkers are checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from job.checkpoints import MODEL, Run, read_record
from job.errors import JobError, Superseded
from job.storage import LocalStore, Store
from tests.durability.protocol import EPOCHS, MortalStore, play, play_until_killed
from tests.durability.verdicts import (
    check_commits_are_whole,
    check_is_complete,
    check_newer_is_untouched,
    check_no_litter,
    check_readers_are_safe,
    check_same_history,
    content,
    versions,
)

NewStore = Callable[[], Store]
OLDER_CHECKPOINT = r"checkpoints/step-\d{10}-a0002-[0-9a-f]+\.keras"


def changes_of_a_whole_run(store: Store, run_class: type[Run] = Run) -> list[str]:
    """Play an undisturbed run and name its changes, in order."""
    mortal = MortalStore(store)
    play(mortal, run_class=run_class)
    check_is_complete(store)
    check_no_litter(store)
    return mortal.changes


def prepare_extension(store: Store) -> None:
    """Complete a shorter run, and leave the litter of a killed attempt."""
    play(store, epochs=EPOCHS - 1)
    store.create("checkpoints/step-0000000009-a0001-0badcafe.keras", b"unnamed")


def kill_after_every_change(new_store: NewStore, run_class: type[Run] = Run) -> int:
    """Kill an attempt after each of its changes and let the next one finish. Returns the number of kills."""
    whole = new_store()
    changes = changes_of_a_whole_run(whole, run_class)
    for die_after in range(len(changes) + 1):
        store = new_store()
        assert play_until_killed(store, die_after, run_class=run_class)
        check_readers_are_safe(store)
        _survive(partial(play, store, run_class=run_class))
        check_same_end(store, whole)
        store.close()
    whole.close()
    return len(changes) + 1


def freeze_before_every_call(new_store: NewStore, run_class: type[Run] = Run) -> int:
    """Freeze an attempt before each call of the store after its claim until a newer one has finished the run.

    The run is an extension of a complete one, so that there is something to prune and a result to withdraw.
    Returns the number of times that the older attempt was superseded.
    """
    whole = new_store()
    prepare_extension(whole)
    mortal = MortalStore(whole)
    play(mortal, run_class=run_class)
    claimed = mortal.calls.index("swap record.json") + 1
    fenced = sum(
        _freeze(new_store(), whole, number, run_class) for number in range(claimed, len(mortal.calls))
    )
    whole.close()
    return fenced


def _freeze(store: Store, whole: Store, number: int, run_class: type[Run]) -> bool:
    prepare_extension(store)
    older, superseded = MortalStore(store), False
    finished: dict[str, str] = {}

    def finish_meanwhile(verb: str, name: str) -> None:
        if len(older.calls) == number and not finished:
            _survive(lambda: play(store, run_class=run_class))
            check_same_end(store, whole)
            finished.update(versions(store))

    older.before = finish_meanwhile
    try:
        play(older, run_class=run_class)
    except Superseded:
        superseded = True
    assert finished
    check_newer_is_untouched(finished, versions(store), allowed=OLDER_CHECKPOINT)
    check_is_complete(store)
    store.close()
    return superseded


def find_every_name_taken(new_store: NewStore, run_class: type[Run] = Run) -> int:
    """Damage the first upload of each checkpoint, so that other bytes hold its name. Returns their number."""
    store, taken = new_store(), []
    mortal = MortalStore(store)

    def damage(verb: str, name: str) -> None:
        step = name.partition("-a")[0]
        if verb == "upload" and step not in taken:
            taken.append(step)
            store.create(name, b"damaged on the way")

    mortal.before = damage
    _survive(lambda: play(mortal, run_class=run_class))
    check_commits_are_whole(store, read_record(store))
    check_is_complete(store)
    store.close()
    return len(taken)


def cut_the_power(store: LocalStore, run_class: type[Run] = Run) -> int:
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
            if path.is_relative_to(store.root) and ".staging" not in path.parts:
                given.append(path.name)
                assert os.stat(source).st_ino in synced, f"{path.name} is named before its content is safe"
                if path.name == "record.json":
                    assert not folders, "the record is swapped before what it names is safe"
                folders.add(path.parent.stat().st_ino)
            action(source, target, **rest)

        return give_name

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(os, "fsync", watch_fsync))
        stack.enter_context(mock.patch.object(os, "link", watch(link)))
        stack.enter_context(mock.patch.object(os, "replace", watch(rename)))
        play(store, run_class=run_class)
    assert not folders, "the last names are not safe"
    return len(given)


def check_same_end(store: Store, whole: Store) -> None:
    """The run ended with the bits of the undisturbed one, and left nothing else."""
    check_is_complete(store)
    check_same_history(store, whole)
    digests = [json.loads(content(one, MODEL))["digest"] for one in (store, whole)]
    assert digests[0] == digests[1], "another result than that of the undisturbed run"


def _survive(action: Callable[[], None]) -> None:
    """Run an attempt that nothing disturbs: it must not fail."""
    try:
        action()
    except (JobError, KeyError, ValueError) as error:
        raise AssertionError(f"an undisturbed attempt failed: {error!r}") from error


def stores_in(folder: str, kind: Callable[[str], Store]) -> Iterator[Store]:
    """Make stores below a folder, one after another."""
    number = 0
    while True:
        number += 1
        yield kind(f"{folder}/{number}")
