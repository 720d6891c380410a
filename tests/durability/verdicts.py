"""What must hold of a run, whatever happened to it; a checker raises ``AssertionError`` with what is wrong.

They read a run as any user could, through a ``Store``, and know nothing of who wrote it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from job.domain.record import Commit, Record
from job.publish.publication import MODEL, RESULT
from job.report.finding import load_runs
from job.run.names import RECORD
from job.run.reader import read_record
from job.store.checksum import crc32c
from job.store.contract import NotFound, Store

TIMES = {"wall_time", "seconds", "images_per_second"}
SEGMENT = re.compile(r"(?:train/)?events\.out\.tfevents\.(\d{10})(?:-final)?")


def without_times(value: Any) -> Any:
    """Drop what the clock decides."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list | tuple) else value


def check_readers_are_safe(store: Store) -> None:
    """At any instant: all that the record names is there and whole, and no file is ahead of the record."""
    names = names_of(store)
    try:
        record = read_record(store)
    except NotFound:
        assert not names - {"config.json"}, f"there is no record, but there are {sorted(names)}"
        return
    check_commits_are_whole(store, record)
    steps = {entry["step"] for entry in record.history} | {0}
    for name in names:
        if match := SEGMENT.fullmatch(name):
            assert int(match[1]) in steps, f"{name} is ahead of the record, which has {sorted(steps)}"
    assert RESULT not in names or record.finished, "a result of a run that is not finished"


def check_commits_are_whole(store: Store, record: Record) -> None:
    """Every commit that the record names can be restored."""
    for commit in record.restorable:
        check_is_whole(store, commit)


def check_is_whole(store: Store, commit: Commit) -> None:
    try:
        data = store.read(commit.name)
    except NotFound:
        raise AssertionError(f"the record names {commit.name}, which is not there") from None
    assert (len(data), crc32c(data)) == (commit.size, commit.crc32c), f"{commit.name} is damaged"


def check_result_is_there(store: Store, *, epochs: int, steps: int) -> None:
    """At any instant: a result of so many epochs or more can be read, with its model, and be compared."""
    finished = read_record(store).finished
    assert finished, "the record has no result any more"
    assert finished.epochs >= epochs
    names = names_of(store)
    assert {MODEL, RESULT} <= names, f"the result is not published any more: {sorted(names)}"
    assert json.loads(store.read(RESULT))["steps"] >= steps
    runs, skipped = load_runs([store.location])
    assert not skipped, f"the run is not compared: {skipped}"
    assert [run.complete and len(run.history) >= epochs for run in runs] == [True], f"compared as {runs}"


def check_is_complete(store: Store) -> None:
    """The run is finished, tidy, and has the files that people read."""
    record = read_record(store)
    assert record.state == "complete", f"the run is {record.state}"
    check_readers_are_safe(store)
    expected = {f"train/events.out.tfevents.{entry['step']:010d}" for entry in record.history}
    missing = {MODEL, RESULT, "config.json", *expected} - names_of(store)
    assert not missing, f"a complete run lacks {missing}"
    assert record.finished
    assert record.finished.commit
    assert json.loads(store.read(RESULT)) == record.finished.result, f"{RESULT} is another result"
    assert store.read(MODEL) == store.read(record.finished.commit.name), f"{MODEL} is another state"


def check_no_litter(store: Store) -> None:
    """Nothing but the named checkpoints is left: of a run whose last attempt nobody fenced."""
    named = {commit.name for commit in read_record(store).restorable}
    litter = {entry.name for entry in store.list("checkpoints/")} - named
    assert not litter, f"nobody names {litter}"


def check_newer_is_untouched(
    before: dict[str, int], after: dict[str, int], *, allowed: str = r"(?!)"
) -> None:
    """An older attempt changed and deleted nothing; it may have added names that match ``allowed``.

    Args:
        before: what lasts, before the older attempt went on.
        after: all objects, after it has ended.
        allowed: a pattern for the names of new ones.
    """
    changed = [name for name in before if after.get(name) != before[name]]
    assert not changed, f"the older attempt touched {changed}"
    added = [name for name in lasting_names(set(after)) - before.keys() if not re.fullmatch(allowed, name)]
    assert not added, f"the older attempt made {added}"


def check_no_revision_is_new(before: set[str], store: Store) -> None:
    """An older attempt committed nothing: also no revision below the newest, where a name is free again."""
    made = revisions(store) - before
    assert not made, f"the older attempt made {sorted(made)}"


def revisions(store: Store) -> set[str]:
    """Return the names of all revisions of the record."""
    return {name for name in names_of(store) if RECORD.fullmatch(name)}


def lasting(store: Store) -> dict[str, int]:
    """Return checksums of what nobody but the run's owner may remove.

    Others are revisions of the record that were replaced and checkpoints that it does not name any more:
    their maker may be frozen just before it deletes them.
    """
    named = {commit.name for commit in read_record(store).restorable}
    every = digests(store)
    return {
        name: every[name]
        for name in lasting_names(set(every))
        if not name.startswith("checkpoints/") or name in named
    }


def lasting_names(names: set[str]) -> set[str]:
    """Leave out the revisions of the record, but the newest."""
    revisions = {name for name in names if RECORD.fullmatch(name)}
    return names - revisions | {max(revisions)}


def names_of(store: Store) -> set[str]:
    return {entry.name for entry in store.list()}


def digests(store: Store) -> dict[str, int]:
    """Return every object's checksum by name."""
    return {name: crc32c(store.read(name)) for name in names_of(store)}


def check_same_history(store: Store, whole: Store) -> None:
    """Metrics, without times, and result are those of the undisturbed run."""
    left, right = read_record(store), read_record(whole)
    histories = [without_times(record.history) for record in (left, right)]
    assert histories[0] == histories[1], f"another history: {histories}"
    assert left.confusion == right.confusion, "another confusion matrix"
