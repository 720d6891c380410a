"""The protocol survives every crash and every freeze on both stores; protocols broken on purpose do not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job import storage
from job.checkpoints import RECORD, Progress, Run
from job.gcs import GcsStore
from job.storage import AlreadyExists, Conflict, LocalStore, Store
from tests.durability.protocol import publish
from tests.durability.scenarios import (
    NewStore,
    cut_the_power,
    find_every_name_taken,
    freeze_before_every_call,
    kill_after_every_change,
    stores_in,
)

Scenario = Callable[..., int]
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
    assert kill_after_every_change(new_store(place)) == 22


def test_frozen_before_any_call(place: tuple[type[Any], str]) -> None:
    # Not superseded is only who was frozen after its last swap: the newer one found a complete run.
    assert freeze_before_every_call(new_store(place)) == 19


def test_every_name_taken(place: tuple[type[Any], str]) -> None:
    assert find_every_name_taken(new_store(place)) == 4


def test_order_of_syncs(tmp_path: Path) -> None:
    assert cut_the_power(LocalStore(str(tmp_path / "run"))) == 18


# -- broken on purpose -------------------------------------------------------------------------------------


class SwapFirst(Run):
    """The record names a checkpoint before it is stored."""

    def _commit(self, write: Any, progress: Progress, after: Any, changes: dict[str, Any]) -> None:
        inner, path = self.store, self.store.staging() / "first"
        write(path)
        name = self._checkpoint_name(progress.step)
        commit = replace(_commit_of(path, name), progress=progress)
        self.swap(commits=(commit, *self.record.commits)[: self._keep], **changes)
        inner.upload(name, path)
        after()


def _commit_of(path: Path, name: str) -> Any:
    from job.checkpoints import Commit

    return Commit(name=name, size=path.stat().st_size, crc32c=storage.crc32c(path), progress=Progress())


class NoFence(Run):
    """The record is replaced whoever wrote it."""

    def swap(self, **changes: Any) -> None:
        self._version = self.store.read(RECORD)[1]
        super().swap(**changes)


class PruneBeforeSwap(Run):
    """Space is freed before the record has let go of it."""

    def swap(self, **changes: Any) -> None:
        kept = {commit.name for commit in changes.get("commits", self.record.commits)}
        self._delete_checkpoints(lambda name: name in self._named - kept)
        super().swap(**changes)


class PruneWhatIsUnnamed(Run):
    """A lingering attempt takes a newer one's checkpoints for litter."""

    def _is_of_lower_attempt(self, name: str) -> bool:
        return name.startswith("checkpoints/step-")


class WithdrawWhatIsThere(Run):
    """A lingering attempt takes a newer one's result for an old one."""

    def withdraw(self, names: Collection[str]) -> None:
        for entry in self.store.list():
            if entry.name in names:
                self.store.delete(entry.name, entry.version)


class SegmentBeforeSwap(Run):
    """Events are written before the record that they are made from is safe."""

    def swap(self, **changes: Any) -> None:
        publish(self.store, replace(self.record, **{**changes, "state": "running"}))
        super().swap(**changes)


class ForgetHistory(Run):
    """The scalars of an epoch are not in the record."""

    def swap(self, **changes: Any) -> None:
        super().swap(**{**changes, "history": changes.get("history", ())[-1:]})


class AcceptAnyName:
    """Whatever holds a create-only name is taken for ours: "any 412 is success"."""

    def upload(self, name: str, path: Path) -> Any:
        try:
            return super().upload(name, path)  # type: ignore[misc]
        except AlreadyExists:
            path.unlink()


class AcceptAnySwap:
    """A refused swap is taken for one of ours whose answer was lost: "any 412 is success"."""

    def swap(self, name: str, data: bytes, expected: str | None) -> str:
        try:
            return str(super().swap(name, data, expected))  # type: ignore[misc]
        except Conflict:
            store: Store = self  # type: ignore[assignment]
            return store.read(name)[1]


@pytest.mark.parametrize(
    ("broken", "scenario", "finding"),
    [
        (SwapFirst, kill_after_every_change, r"names .* which is not there"),
        (NoFence, freeze_before_every_call, "the older attempt touched"),
        (PruneBeforeSwap, kill_after_every_change, r"names .* which is not there"),
        (PruneWhatIsUnnamed, freeze_before_every_call, "the older attempt touched"),
        (WithdrawWhatIsThere, freeze_before_every_call, "the older attempt touched"),
        (SegmentBeforeSwap, kill_after_every_change, "ahead of the record"),
        (ForgetHistory, kill_after_every_change, "ahead of the record"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_protocol_is_caught(
    place: tuple[type[Any], str], broken: type[Run], scenario: Scenario, finding: str
) -> None:
    with pytest.raises(AssertionError, match=finding):
        scenario(new_store(place), broken)


def test_a_store_that_accepts_any_name_is_caught(place: tuple[type[Any], str]) -> None:
    with pytest.raises(AssertionError, match=r"is damaged|failed"):
        find_every_name_taken(new_store(place, AcceptAnyName))


def test_a_store_that_accepts_any_swap_is_caught(place: tuple[type[Any], str]) -> None:
    with pytest.raises(AssertionError):
        freeze_before_every_call(new_store(place, AcceptAnySwap))


class NoSyncOfFiles(LocalStore):
    """A power cut leaves names of empty files."""

    def _write(self, data: bytes) -> Path:
        path = self._spool.path() / "unsafe"
        path.write_bytes(data)
        return path


class NoSyncOfUploads(LocalStore):
    """The checkpoint's content may come after the record that names it."""

    def upload(self, name: str, path: Path) -> Any:
        self._publish(path, self._path(name))
        path.unlink()


class NoSyncOfFolders(LocalStore):
    """The checkpoint's name may come after the record that names it."""

    def _publish(self, source: Path, target: Path, *, rename: bool = True) -> None:
        storage.make_folders(target.parent)
        self._link(source, target, rename=rename)


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        (NoSyncOfFiles, "before its content is safe"),
        (NoSyncOfUploads, "before its content is safe"),
        (NoSyncOfFolders, "before what it names is safe|last names are not safe"),
    ],
)
def test_a_store_without_the_order_of_syncs_is_caught(
    tmp_path: Path, broken: type[LocalStore], finding: str
) -> None:
    with pytest.raises(AssertionError, match=finding):
        cut_the_power(broken(str(tmp_path / "run")))
