"""The protocol survives every crash and every freeze on both stores; protocols broken on purpose do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.domain.record import Commit, Record
from job.publish.publication import MODEL, RESULT
from job.run import owner
from job.run.committer import Committer
from job.run.names import checkpoint_name
from job.run.owner import HeldRun
from job.run.position import Position
from job.run.record_log import Change, RecordLog
from job.store import local
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists
from job.store.gcs import GcsStore
from job.store.local import LocalStore
from tests.durability.protocol import publish
from tests.durability.scenarios import (
    NewStore,
    cut_the_power,
    find_every_name_taken,
    freeze_before_every_call,
    kill_after_every_change,
    kill_while_it_is_extended,
    stores_in,
)

Break = Callable[[pytest.MonkeyPatch], None]
STORES: dict[str, type[Any]] = {"local": LocalStore, "gcs": GcsStore}


@pytest.fixture(params=["local", pytest.param("gcs", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[type[Any], str]:
    """A store's class, and a location below which all is empty."""
    kind: type[Any] = STORES[request.param]
    return kind, request.getfixturevalue("gcs_bucket") if kind is GcsStore else str(tmp_path)


def new_store(place: tuple[type[Any], str], *mixins: type[Any]) -> NewStore:
    kind, folder = place
    stores = stores_in(folder, type("Store", (*mixins, kind), {}))
    return lambda: next(stores)


def test_killed_after_any_change(place: tuple[type[Any], str]) -> None:
    assert kill_after_every_change(new_store(place)) == 32


def test_killed_while_a_finished_run_is_extended(place: tuple[type[Any], str]) -> None:
    assert kill_while_it_is_extended(new_store(place)) == 16


def test_frozen_before_any_call(place: tuple[type[Any], str]) -> None:
    # Not superseded is only who was frozen after its last revision: the newer one found a complete run.
    assert freeze_before_every_call(new_store(place)) == 31


def test_every_name_taken(place: tuple[type[Any], str]) -> None:
    assert find_every_name_taken(new_store(place)) == 4


def test_order_of_syncs(tmp_path: Path) -> None:
    assert cut_the_power(LocalStore(str(tmp_path / "run"))) == 24


# -- broken on purpose -------------------------------------------------------------------------------------


def name_before_the_upload(patch: pytest.MonkeyPatch) -> None:
    """The record names a checkpoint before it is stored."""

    def commit(self: Committer, state: Any, position: Position, change: Change) -> None:
        path = self._run.store.scratch() / "first"
        self._save(state, path)
        commit = Commit(
            name=checkpoint_name(position.progress.step, self._run.record.attempt),
            size=path.stat().st_size,
            crc32c=crc32c(path),
            progress=position.progress,
            timing=position.timing,
        )

        def committed(before: Record) -> Record:
            commits = (commit, *before.commits)[: self._keep]
            return change(replace(before, commits=commits, history=position.history))

        record = self._run.append(committed)
        self._run.store.upload(commit.name, path)
        self._publish(record)

    patch.setattr(Committer, "_commit", commit)


def ignore_the_fence(patch: pytest.MonkeyPatch) -> None:
    """An attempt goes on behind the revisions of a newer one."""
    patch.setattr(RecordLog, "_own", lambda self, revision: replace(self.record, revision=revision))


def prune_claims(patch: pytest.MonkeyPatch) -> None:
    """A claim's revision is pruned like the others, so an older attempt finds its next name free."""
    inner = RecordLog._advance

    def advance(self: RecordLog, after: Record) -> None:
        self._claim = 0
        inner(self, after)

    patch.setattr(RecordLog, "_advance", advance)


def prune_first(patch: pytest.MonkeyPatch) -> None:
    """Space is freed before the record has let go of it."""
    inner = RecordLog.append

    def append(self: RecordLog, change: Change) -> Record:
        kept = {commit.name for commit in change(self.record).restorable}
        self.forget({commit.name for commit in self.record.restorable} - kept)
        self.prune()
        return inner(self, change)

    patch.setattr(RecordLog, "append", append)


def remove_what_is_unnamed(patch: pytest.MonkeyPatch) -> None:
    """A lingering attempt takes a newer one's checkpoints for litter."""
    inner = owner.leftovers
    patch.setattr(owner, "leftovers", lambda store, record, below: inner(store, record, below=10**9))


def delete_the_result(patch: pytest.MonkeyPatch) -> None:
    """The result of a finished run is deleted when it is extended."""
    inner = HeldRun.remove_leftovers

    def remove(self: HeldRun) -> None:
        for name in (MODEL, RESULT):
            self.store.delete(name)
        inner(self)

    patch.setattr(HeldRun, "remove_leftovers", remove)


def forget_the_result(patch: pytest.MonkeyPatch) -> None:
    """The record of a run that is extended knows no result."""
    patch_append(
        patch, lambda before, after: replace(after, finished=None) if after.state == "running" else after
    )


def forget_history(patch: pytest.MonkeyPatch) -> None:
    """The scalars of earlier epochs are not in the record."""
    patch_append(patch, lambda before, after: replace(after, history=after.history[-1:]))


def publish_first(patch: pytest.MonkeyPatch) -> None:
    """Events are written before the record that they are made from is safe."""
    inner = HeldRun.append

    def append(self: HeldRun, change: Change) -> Record:
        publish(self.store, replace(change(self.record), finished=None))
        return inner(self, change)

    patch.setattr(HeldRun, "append", append)


def patch_append(patch: pytest.MonkeyPatch, after: Callable[[Record, Record], Record]) -> None:
    inner = RecordLog.append
    patch.setattr(
        RecordLog,
        "append",
        lambda self, change: inner(self, lambda before: after(before, change(before))),
    )


class AcceptAnyUpload:
    """Whatever holds a create-only name is taken for ours: "any 412 is success"."""

    def upload(self, name: str, path: Path) -> None:
        with suppress(AlreadyExists):
            super().upload(name, path)  # type: ignore[misc]


class AcceptAnyRevision:
    """The same with a revision of the record."""

    def create(self, name: str, data: bytes) -> None:
        with suppress(AlreadyExists):
            super().create(name, data)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("broken", "scenario", "finding"),
    [
        (name_before_the_upload, kill_after_every_change, r"names .* which is not there"),
        (ignore_the_fence, freeze_before_every_call, "the older attempt (touched|made|failed)"),
        (prune_claims, freeze_before_every_call, "the older attempt (made|failed)"),
        (prune_first, kill_after_every_change, r"names .* which is not there"),
        (remove_what_is_unnamed, freeze_before_every_call, "the older attempt touched"),
        (delete_the_result, kill_while_it_is_extended, "not published any more"),
        (forget_the_result, kill_while_it_is_extended, "not finished|no result any more"),
        (publish_first, kill_after_every_change, "ahead of the record"),
        (forget_history, kill_after_every_change, "ahead of the record|failed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_protocol_is_caught(
    place: tuple[type[Any], str],
    broken: Break,
    scenario: Callable[[NewStore], int],
    finding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=finding):
        scenario(new_store(place))


def test_a_store_that_accepts_any_upload_is_caught(place: tuple[type[Any], str]) -> None:
    with pytest.raises(AssertionError, match=r"is damaged|failed"):
        find_every_name_taken(new_store(place, AcceptAnyUpload))


def test_a_store_that_accepts_any_revision_is_caught(place: tuple[type[Any], str]) -> None:
    """The older attempt does not learn that it was superseded."""
    with pytest.raises(AssertionError, match="the older attempt made"):
        freeze_before_every_call(new_store(place, AcceptAnyRevision))


def test_a_store_that_syncs_no_folder_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's name may come after the record that names it."""
    store = LocalStore(str(tmp_path / "run"))
    monkeypatch.setattr(store._names, "make_durable", lambda folder, **like: None)
    with pytest.raises(AssertionError, match=r"before what it names is safe|last names are not safe"):
        cut_the_power(store)


def test_a_store_that_syncs_no_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves names of empty files."""
    without_fsync = SimpleNamespace(**{**vars(os), "fsync": lambda descriptor: None})
    monkeypatch.setattr(local, "os", without_fsync)
    with pytest.raises(AssertionError, match="before its content is safe"):
        cut_the_power(LocalStore(str(tmp_path / "run")))
