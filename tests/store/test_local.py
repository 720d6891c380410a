"""The local store is durable, and whoever freezes, dies or is swept at any call blocks nobody."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.domain.disk import disk_errors
from job.domain.errors import MissingInput, StorageFailed
from job.store import exclusive, local
from job.store.contract import AlreadyExists, NotFound
from job.store.local import LocalStore
from tests.store.conftest import (
    Open,
    Stopped,
    hidden,
    names,
    refuse,
    run_python,
    scratch_file,
)

# -- durability ----------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Records, in order, what is made durable and what is given a name."""
    seen: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "replace", "rename")}

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def give_name(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            real[name](source, target, **options)
            seen.append((f"{name} from", str(source)))
            seen.append((name, str(target)))

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("link", "replace", "rename"):
        monkeypatch.setattr(os, name, give_name(name))
    return seen


def assert_durable(events: list[tuple[str, str]], step: str, target: Path) -> None:
    """The content before the name, the name before the call's end: else a crash could show half a file."""
    named = events.index((step, str(target)))
    source = events[named - 1][1]
    assert ("fsync", source) in events[:named], "content is durable before it has a name"
    assert ("fsync", str(target.parent)) in events[named:], "the name is durable when the call returns"


def test_create_is_durable(tmp_path: Path, opened: Open, events: list[tuple[str, str]]) -> None:
    opened(tmp_path / "runs" / "x").create("checkpoints/a", b"data")
    target = tmp_path / "runs" / "x" / "checkpoints" / "a"
    assert_durable(events, "link", target)
    for parent in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "x"):
        assert ("fsync", str(parent)) in events[: events.index(("link", str(target)))], "new folders too"


def test_upload_is_durable(tmp_path: Path, opened: Open, events: list[tuple[str, str]]) -> None:
    store = opened(tmp_path)
    store.upload("a", scratch_file(store, b"data"))
    assert_durable(events, "link", tmp_path / "a")


def test_replace_and_copy_are_durable(tmp_path: Path, opened: Open, events: list[tuple[str, str]]) -> None:
    store = opened(tmp_path)
    store.replace("a", b"1")
    assert_durable(events, "replace", tmp_path / "a")
    store.copy("a", "b")
    assert_durable(events, "replace", tmp_path / "b")


def test_create_without_links_is_durable(
    tmp_path: Path, opened: Open, events: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.EPERM)
    opened(tmp_path).create("a", b"data")
    taken = events.index(("rename", str(tmp_path / ".taken-a")))
    claim = events[taken - 1][1]
    into = events.index(("rename", f"{claim}/content"))
    assert ("fsync", events[into - 1][1]) in events[:into], "the content, before it is moved"
    assert ("fsync", claim) in events[into:taken], "the claim, before it takes the name"
    named = events.index(("rename", str(tmp_path / "a")))
    assert ("fsync", str(tmp_path)) in events[taken:named]
    assert ("fsync", str(tmp_path)) in events[named:]


def test_what_counts_as_ours_is_durable(tmp_path: Path, opened: Open, events: list[tuple[str, str]]) -> None:
    """An earlier attempt may have died between link and fsync: we finish its work."""
    (tmp_path / "a").write_bytes(b"data")
    opened(tmp_path).create("a", b"data")
    assert ("fsync", str(tmp_path)) in events[events.index(("fsync", str(tmp_path / "a"))) :]


WRITER = """
import sys
from job.store.local import LocalStore
store = LocalStore(sys.argv[1])
store.begin_attempt(int(sys.argv[2]))
first = len(store.list("record-")) + 1
for number in range(first, 10**6):
    store.create(f"record-{number:010d}.json", (b"%08d" % number) * 5000)
    store.replace("result.json", (b"%08d" % number) * 5000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_kill_shows_no_half_of_anything(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setenv("TEST_WITHOUT_LINKS", "yes")
    root = tmp_path / "run"
    store = opened(root)
    for attempt, delay in enumerate((0.0, 0.003, 0.011), start=1):
        process = run_python(WRITER, str(root), str(attempt))
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(20)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        seen += [int(line) for line in process.communicate()[0].splitlines() if len(line) > 0]
        result = store.read("result.json")
        assert result == result[:8] * 5000
        assert int(result[:8]) >= seen[-1], "what was reported is there"
        for name in names(store, "record-"):
            assert store.read(name) == (name[9:17].encode()) * 5000, name
    store.begin_attempt(4)
    assert hidden(root) == [], "what the dead left is swept"


def frozen_before(monkeypatch: pytest.MonkeyPatch, step: Callable[[str], bool]) -> None:
    """Let the first rename to a path that ``step`` picks never happen, as where its process is frozen."""
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if step(str(target)):
            monkeypatch.setattr(os, "rename", real)
            raise Stopped
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)


def test_who_freezes_between_taking_a_name_and_filling_it_blocks_nobody(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.EPERM)
    frozen, other = opened(tmp_path), opened(tmp_path)
    frozen_before(monkeypatch, lambda target: target == str(tmp_path / "record"))
    with pytest.raises(Stopped):
        frozen.create("record", b"frozen")
    assert not (tmp_path / "record").exists()
    assert other.exists("record")
    assert other.read("record") == b"frozen"
    with pytest.raises(AlreadyExists):
        other.create("record", b"other")
    assert (tmp_path / "record").read_bytes() == b"frozen", "who lost has finished the winner's work"
    frozen.create("record", b"frozen")  # it wakes up and tries again
    assert other.read("record") == b"frozen"


def test_what_is_pending_does_not_come_back_after_a_delete(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.EPERM)
    store = opened(tmp_path)
    frozen_before(monkeypatch, lambda target: target == str(tmp_path / "record"))
    with pytest.raises(Stopped):
        store.create("record", b"pending")
    store.delete("record")
    with pytest.raises(NotFound):
        store.read("record")
    store.replace("record", b"new")
    assert store.read("record") == b"new"


# -- a run's folder, and what is unfinished in it ------------------------------------------------------


def test_a_root_that_was_moved_is_not_made_again(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path / "run")
    store.check()
    store.create("record-0000000001.json", b"1")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    attempts: list[Callable[[], object]] = [
        lambda: store.create("record-0000000002.json", b"2"),
        lambda: store.create("checkpoints/a", b"2"),
        lambda: store.replace("result.json", b"2"),
    ]
    for attempt in attempts:
        with pytest.raises(MissingInput, match="was moved or deleted while the job used it"):
            attempt()
    assert not (tmp_path / "run").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    store.create("record-0000000002.json", b"2")


def test_unfinished_files_lie_beside_their_target_and_only_older_ones_are_swept(
    tmp_path: Path, opened: Open
) -> None:
    store = opened(tmp_path)
    store.create("checkpoints/a", b"1")
    for name in (".a0006-00-x", ".a0007-00-x", ".a0008-00-x", ".a0000-00-x", ".b0001-00-x", "a0001-00-x"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half a checkpoint")
    (tmp_path / ".a0003-00-x-claim").mkdir()
    (tmp_path / ".a0003-00-x-claim" / "content").write_bytes(b"half")
    store.begin_attempt(7)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        ".a0007-00-x",
        ".a0008-00-x",
        ".b0001-00-x",
        "a",
        "a0001-00-x",
    ]
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_unfinished_files_are_named_by_attempt(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.begin_attempt(12)
    store.create("b", b"")
    monkeypatch.setattr("job.store.exclusive.remove", lambda path: None)  # as where it is killed here
    store.create("checkpoints/a", b"1")
    assert [name.split("-")[0] for name in hidden(tmp_path)] == [".a0012"] * len(hidden(tmp_path))
    assert any(path.parent.name == "checkpoints" for path in tmp_path.rglob(".a0012-*-a"))


# -- at every call ---------------------------------------------------------------------------------------


def at_call(step: int, act: Callable[[], None]) -> Callable[[], bool]:
    """Do ``act`` before the call number ``step`` to the file system, while its caller is frozen there.

    Returns:
        What stops counting, and says whether there was such a call.
    """
    calls = 0

    def count(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                act()
            return real(*arguments, **options)

        return call

    context = pytest.MonkeyPatch()
    for name in ("open", "fsync", "link", "rename", "replace", "mkdir", "stat", "unlink"):
        context.setattr(os, name, count(getattr(os, name)))

    def finished() -> bool:
        context.undo()
        return calls > step

    return finished


def killed() -> None:
    raise Stopped


@pytest.fixture(params=["links", "no links"])
def links_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no links":
        refuse(monkeypatch, errno.EPERM)


@pytest.mark.usefixtures("links_or_not")
def test_a_file_that_is_swept_while_its_owner_lives_is_written_again(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every call that the owner makes, a later attempt sweeps: the owner's object is there and whole."""
    for step in range(1000):
        owner, later = opened(tmp_path / str(step)), opened(tmp_path / str(step))
        owner.check()
        owner.begin_attempt(1)
        finished = at_call(step, lambda later=later: later.begin_attempt(2))  # type: ignore[misc]
        owner.create("checkpoints/a", b"content")
        if not finished():
            break
        assert later.read("checkpoints/a") == b"content", step
        later.begin_attempt(2)  # what the frozen owner left of the file that was swept under it
        assert hidden(owner.root) == []
    assert step >= 6


@pytest.mark.usefixtures("links_or_not")
def test_check_finds_no_fault_where_another_attempt_begins_meanwhile(tmp_path: Path, opened: Open) -> None:
    """Of two that start at once, one sweeps the file by which the other proves the file system."""
    for step in range(1000):
        mine, other = opened(tmp_path / str(step)), opened(tmp_path / str(step))
        finished = at_call(step, lambda other=other: other.begin_attempt(1))  # type: ignore[misc]
        mine.check()
        if not finished():
            break
        other.begin_attempt(1)
        assert hidden(mine.root) == []
    assert step >= 10


@pytest.mark.parametrize("act", ["download", "copy", "upload"])
def test_what_cannot_be_read_is_said_to_be_unreadable(
    act: str, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad block under a checkpoint: not the place where its copy goes is at fault."""
    store = opened(tmp_path / "run")
    store.create("checkpoints/a", b"content")
    source = store.root / "checkpoints" / "a"

    def read(file: Any) -> bytes:
        with disk_errors("read", file.name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(local, "_block", read)
    calls = {
        "download": lambda: store.download("checkpoints/a", tmp_path / "copy"),
        "copy": lambda: store.copy("checkpoints/a", "model.keras"),
        "upload": lambda: store.upload("checkpoints/b", source),
    }
    with pytest.raises(StorageFailed, match=f"^cannot read {re.escape(str(source))}: Input/output error"):
        calls[act]()


def test_a_sweep_that_freezes_in_the_middle_leaves_its_victim_no_half(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has removed the content of a claim that its living owner is about to move into place."""
    refuse(monkeypatch, errno.EPERM)

    def remove_half(folder: Path, **options: Any) -> None:
        (folder / "content").unlink(missing_ok=True)

    for step in range(1000):
        owner, later = opened(tmp_path / str(step)), opened(tmp_path / str(step))
        owner.check()
        owner.begin_attempt(1)

        def sweep(later: LocalStore = later) -> None:
            with pytest.MonkeyPatch.context() as context:
                context.setattr("shutil.rmtree", remove_half)
                later.begin_attempt(2)

        finished = at_call(step, sweep)
        owner.create("record", b"content")
        if not finished():
            break
        assert later.read("record") == b"content", step
    assert step >= 6


@pytest.mark.usefixtures("links_or_not")
def test_who_freezes_at_any_call_blocks_nobody_and_of_two_one_wins(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival creates the same name while the first is frozen; then the first wakes up."""
    winners = set()
    for step in range(1000):
        first, rival = opened(tmp_path / str(step)), opened(tmp_path / str(step))
        first.check()
        rival.check()
        won: list[bytes] = []

        def create(store: LocalStore, data: bytes, won: list[bytes] = won) -> None:
            try:
                store.create("record", data)
            except AlreadyExists:
                assert store.read("record") != data
            else:
                assert store.read("record") == data
                won.append(data)

        finished = at_call(step, lambda: create(rival, b"rival"))  # noqa: B023
        create(first, b"first")
        if not finished():
            break
        assert len(won) == 1, (step, won)
        assert (first.root / "record").read_bytes() == won[0]
        assert hidden(first.root) == []
        winners.update(won)
    assert step >= 6
    assert winners == {b"first", b"rival"}


@pytest.mark.usefixtures("links_or_not")
def test_who_is_killed_at_any_call_blocks_nobody_and_leaves_all_or_nothing(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusive, "remove", lambda path: None)  # it does not live to tidy up
    outcomes = set()
    for step in range(1000):
        first, later = opened(tmp_path / str(step)), opened(tmp_path / str(step))
        first.begin_attempt(1)
        first.create("config.json", b"")
        finished = at_call(step, killed)
        with contextlib.suppress(Stopped):
            first.create("record", b"first")
        if not finished():
            break
        with pytest.MonkeyPatch.context() as context:
            context.setattr(exclusive, "remove", real_remove)
            later.begin_attempt(2)
            assert hidden(first.root) == []
            try:
                later.create("record", b"later")
            except AlreadyExists:
                assert later.read("record") == b"first", step
            assert later.exists("record")
            outcomes.add((first.root / "record").read_bytes())
            assert names(later) == ["config.json", "record"]
            later.replace("record", b"replaced")
            later.delete("record")
            assert not later.exists("record")
    assert step >= 6
    assert outcomes == {b"first", b"later"}


real_remove = exclusive.remove
