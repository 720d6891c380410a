"""What must hold of a run, whatever happened to it; a checker raises ``AssertionError`` with what is wrong.

They read a run as any user could, through a ``Store``, and know nothing of who wrote it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from job.checkpoints import MODEL, RESULT, Record, read_record
from job.storage import NotFound, Store, crc32c

TIMES = {"wall_time", "seconds", "images_per_second", "timed_seconds", "timed_images", "total_seconds"}
SEGMENT = re.compile(r"(?:train|validation)/events\.out\.tfevents\.(\d{10})")


def without_times(value: Any) -> Any:
    """Drop what the clock decides."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list | tuple) else value


def check_readers_are_safe(store: Store) -> None:
    """At any instant: all that the record names is there and whole, and no file is ahead of the record."""
    names = {entry.name for entry in store.list()}
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
    if record.state != "complete":
        assert RESULT not in names or record.attempt > 1, "a result of a run that is not complete"


def check_commits_are_whole(store: Store, record: Record) -> None:
    """Every commit that the record names can be restored."""
    for commit in record.commits:
        path = store.staging() / "verdict"
        try:
            store.download(commit.name, path)
        except NotFound:
            raise AssertionError(f"the record names {commit.name}, which is not there") from None
        try:
            assert (path.stat().st_size, crc32c(path)) == (commit.size, commit.crc32c), (
                f"{commit.name} is damaged"
            )
        finally:
            path.unlink()


def check_is_complete(store: Store) -> None:
    """The run is finished, tidy, and has the files that people read."""
    record = read_record(store)
    assert record.state == "complete", f"the run is {record.state}"
    check_readers_are_safe(store)
    names = {entry.name for entry in store.list()}
    expected = {f"train/events.out.tfevents.{entry['step']:010d}" for entry in record.history}
    missing = {MODEL, RESULT, "config.json", *expected} - names
    assert not missing, f"a complete run lacks {missing}"
    assert content(store, MODEL) == content(store, record.commits[0].name), f"{MODEL} is another state"


def check_no_litter(store: Store) -> None:
    """Nothing but the named checkpoints is left: of a run whose last attempt nobody fenced."""
    named = {commit.name for commit in read_record(store).commits}
    litter = {entry.name for entry in store.list("checkpoints/")} - named
    assert not litter, f"nobody names {litter}"


def check_newer_is_untouched(
    before: dict[str, str], after: dict[str, str], *, allowed: str = r"(?!)"
) -> None:
    """An older attempt changed and deleted nothing; it may have added names that match ``allowed``."""
    changed = [name for name in before if after.get(name) != before[name]]
    assert not changed, f"the older attempt touched {changed}"
    added = [name for name in after.keys() - before.keys() if not re.fullmatch(allowed, name)]
    assert not added, f"the older attempt made {added}"


def versions(store: Store) -> dict[str, str]:
    """Return every object's version by name."""
    return {entry.name: entry.version for entry in store.list()}


def content(store: Store, name: str) -> bytes:
    path: Path = store.staging() / "content"
    store.download(name, path)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def check_same_history(store: Store, whole: Store) -> None:
    """Metrics, without times, and result are those of the undisturbed run."""
    left, right = read_record(store), read_record(whole)
    histories = [without_times(record.history) for record in (left, right)]
    assert histories[0] == histories[1], f"another history: {histories}"
    assert left.confusion == right.confusion, "another confusion matrix"
