"""Attempts on a run without a network to train: one crc32c stands for all that training would change.

``play`` keeps the order of events of ``job.run.attempt``, through the real parts that claim, commit and
publish, in milliseconds. So a process can be made to die after each single change that it makes to a store,
and the same checkers that judge real training processes (``verdicts``) can be shown to catch protocols that
are broken on purpose.
"""

from __future__ import annotations

import copy
import functools
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from job.domain.errors import StorageFailed, Superseded
from job.domain.network import Network
from job.domain.record import Finished, Progress, Record
from job.domain.settings import Settings
from job.publish.publication import Publication, withdraw
from job.run.committer import Committer
from job.run.names import RECORD
from job.run.owner import HeldRun, claim, delete_leftovers, find_record
from job.run.position import Position
from job.run.reader import read_record
from job.store.checksum import crc32c
from job.store.contract import Entry, Store
from tests.support import split_of

STEPS_PER_EPOCH, EPOCHS, EVERY, KEEP = 4, 3, 3, 2
PATIENCE_SECONDS = 60.0  # for a commit of a few bytes
IDENTITY = Settings(network=Network(blocks=(1,), filters=4)).identity(
    precision="float32", data_sha256="5" * 64
)
CONFIG = {"identity": IDENTITY.to_json(), "settings": {"created": 0.0}}


class Killed(BaseException):
    """The process is dead: nothing that it still tries to do happens."""


class MortalStore:
    """A store that a process reaches until it dies after its ``die_after``-th change of it."""

    def __init__(self, store: Store, *, die_after: int | None = None) -> None:
        self._store = store
        self._left = die_after
        self._losing = False
        self.location = store.location
        self.calls: list[str] = []
        self.changes: list[str] = []
        self.before: Callable[[str, str], None] = lambda verb, name: None

    def die_after(self, changes: int) -> None:
        """Die after so many further changes."""
        self._left = changes

    def lose_the_answer_of_a_revision(self) -> None:
        """Obey the next revision of the record, and answer nothing."""
        self._losing = True

    def _change(self, verb: str, name: str, action: Callable[[], None]) -> None:
        self._call(verb, name, action)
        self.changes.append(f"{verb} {name}")
        if self._left is not None:
            self._left -= 1
        self._live()  # a lost answer: the store has changed, the process does not know

    def _call(self, verb: str, name: str, action: Callable[[], Any]) -> Any:
        self.before(verb, name)
        self._live()
        self.calls.append(f"{verb} {name}")
        return action()

    def _live(self) -> None:
        if self._left is not None and self._left <= 0:
            raise Killed

    def create(self, name: str, data: bytes) -> None:
        self._change("create", name, lambda: self._store.create(name, data))
        if self._losing and RECORD.fullmatch(name):
            self._losing = False
            raise StorageFailed("the answer was lost")

    def upload(self, name: str, path: Path) -> None:
        self._change("upload", name, lambda: self._store.upload(name, path))

    def replace(self, name: str, data: bytes) -> None:
        self._change("replace", name, lambda: self._store.replace(name, data))

    def copy(self, source: str, target: str) -> None:
        self._change("copy", target, lambda: self._store.copy(source, target))

    def delete(self, name: str) -> None:
        self._change("delete", name, lambda: self._store.delete(name))

    def check(self, *, write: bool = True) -> None:
        self._store.check(write=write)

    def read(self, name: str) -> bytes:
        return cast(bytes, self._call("read", name, lambda: self._store.read(name)))

    def checksum(self, name: str) -> tuple[int, int]:
        return cast("tuple[int, int]", self._call("checksum", name, lambda: self._store.checksum(name)))

    def exists(self, name: str) -> bool:
        return bool(self._call("exists", name, lambda: self._store.exists(name)))

    def download(self, name: str, path: Path) -> None:
        self._call("download", name, lambda: self._store.download(name, path))

    def list(self, prefix: str = "") -> list[Entry]:
        return cast("list[Entry]", self._call("list", prefix, lambda: self._store.list(prefix)))

    def begin_attempt(self, number: int) -> None:
        self._store.begin_attempt(number)

    def scratch(self) -> Path:
        return self._store.scratch()

    def finish_within(self, seconds: float) -> None:
        self._store.finish_within(seconds)

    def close(self) -> None:
        self._store.close()


def save(digest: int, path: Path) -> None:
    """Write a checkpoint whose bytes, like those of a ``.keras`` file, differ each time."""
    path.write_text(json.dumps({"digest": digest, "date": secrets.token_hex(8)}))


def load(path: Path) -> int:
    return int(json.loads(path.read_text())["digest"])


def step_on(digest: int, step: int) -> int:
    return crc32c(b"%d after %d" % (step, digest))


@functools.cache
def _publication() -> Publication:
    return Publication(cast(Store, None), CONFIG, split_of(10), SimpleNamespace(layers=[]), read=read_record)


def publish(store: Store, record: Record) -> None:
    """Write what the record implies and the run lacks."""
    publication = copy.copy(_publication())
    publication._store = store
    publication.publish(record)


def play(store: Store, *, epochs: int = EPOCHS) -> None:
    """One attempt on the run, to its end. Raises what the protocol raises, and ``Killed``."""
    found = find_record(store, IDENTITY)
    if found is not None and found.finished is not None and found.finished.epochs >= epochs:
        delete_leftovers(store, found)
        publish(store, found)
        return
    run = claim(store, IDENTITY, settings={"epochs": epochs}, take_over=True)
    committer = Committer(run, keep=KEEP, save=save, publish=lambda record: publish(store, record))
    try:
        _train(run, committer, epochs)
    finally:
        committer.close()
        run.close()


def _train(run: HeldRun, committer: Committer, epochs: int) -> None:
    digest, position = _restore(run)
    committed = position.progress.step
    while position.progress.epoch < epochs:
        if position.progress.batch < STEPS_PER_EPOCH:
            digest, position = _after_step(digest, position)
        else:
            position = _after_epoch(digest, position)
        if position.progress.step - committed >= EVERY or position.progress.epoch == epochs:
            committed = position.progress.step
            committer.submit(digest, position)
            committer.wait(PATIENCE_SECONDS)  # one thread at a time: "the n-th change" is always the same

    def complete(record: Record) -> Record:
        progress, last = position.progress, position.history[-1]
        about = {"digest": digest, "epochs": progress.epoch, "steps": progress.step}
        metrics = {key: last[key] for key in ("train", "validation")}
        result = {**about, **metrics, "test": None, "confusion": None}
        finished = Finished(epochs=progress.epoch, result=result, commit=record.commits[0])
        return replace(record, state="complete", finished=finished)

    committer.finish(position, lambda: (digest, position), complete)


def _restore(run: HeldRun) -> tuple[int, Position]:
    restored = run.restore(load)
    run.remove_leftovers()
    withdraw(run.store, read_record)
    publish(run.store, run.record)
    return (restored[0], Position.of(run.record)) if restored else (0, Position())


def _after_step(digest: int, position: Position) -> tuple[int, Position]:
    progress = position.progress
    digest = step_on(digest, progress.step + 1)
    moved = replace(progress, step=progress.step + 1, batch=progress.batch + 1)
    return digest, replace(position, progress=moved)


def _after_epoch(digest: int, position: Position) -> Position:
    progress = position.progress
    numbers = {"loss": float(digest), "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 1.0}
    entry = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "wall_time": time.time(),
        "train": numbers,
        "validation": numbers,
    }
    moved = Progress(step=progress.step, epoch=progress.epoch + 1)
    return replace(position, progress=moved, history=(*position.history, entry))


def play_until_killed(store: Store, die_after: int, *, epochs: int = EPOCHS) -> bool:
    """Play an attempt that dies after so many changes; False if it ended before."""
    try:
        play(MortalStore(store, die_after=die_after), epochs=epochs)
    except Killed:
        return True
    except Superseded:
        pass
    return False
