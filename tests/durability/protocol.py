"""Attempts on a run without a network to train: one crc32c stands for all that training would change.

``play`` keeps the order of events of ``job.training``, through the real ``Claim`` and ``Run``, in
milliseconds. So a process can be made to die after each single change that it makes to a store, and the same
checkers that judge real training processes (``verdicts``) can be shown to catch protocols that are broken on
purpose.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from job import checkpoints
from job.checkpoints import MODEL, RESULT, Claim, Progress, Record, Run
from job.config import Network, Settings
from job.errors import Superseded
from job.storage import AlreadyExists, Entries, Entry, Store, crc32c

STEPS_PER_EPOCH, EPOCHS, EVERY, KEEP = 4, 3, 3, 2
IDENTITY = Settings(network=Network(blocks=(1,), filters=4)).identity(
    precision="float32", data_sha256="5" * 64
)


class Killed(BaseException):
    """The process is dead: nothing that it still tries to do happens."""


class MortalStore:
    """A store that a process reaches until it dies after its ``die_after``-th change of it."""

    def __init__(self, store: Store, *, die_after: int | None = None) -> None:
        self._store = store
        self._left = die_after
        self.location = store.location
        self.calls: list[str] = []
        self.changes: list[str] = []
        self.before: Callable[[str, str], None] = lambda verb, name: None

    def die_after(self, changes: int) -> None:
        """Die after so many further changes."""
        self._left = changes

    def _change(self, verb: str, name: str, action: Callable[[], Any]) -> Any:
        answer = self._call(verb, name, action)
        self.changes.append(f"{verb} {name}")
        if self._left is not None:
            self._left -= 1
        self._live()  # a lost answer: the store has changed, the process does not know
        return answer

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

    def upload(self, name: str, path: Path) -> Entry:
        entry: Entry = self._change("upload", name, lambda: self._store.upload(name, path))
        return entry

    def copy(self, source: str, target: str) -> None:
        self._change("copy", target, lambda: self._store.copy(source, target))

    def swap(self, name: str, data: bytes, expected: str | None) -> str:
        return str(self._change("swap", name, lambda: self._store.swap(name, data, expected)))

    def delete(self, name: str, version: str) -> None:
        self._change("delete", name, lambda: self._store.delete(name, version))

    def check(self, *, write: bool = True) -> None:
        self._store.check(write=write)

    def read(self, name: str) -> tuple[bytes, str]:
        answer: tuple[bytes, str] = self._call("read", name, lambda: self._store.read(name))
        return answer

    def download(self, name: str, path: Path) -> None:
        self._call("download", name, lambda: self._store.download(name, path))

    def holds(self, name: str, size: int, checksum: int) -> bool:
        return bool(self._call("holds", name, lambda: self._store.holds(name, size, checksum)))

    def list(self, prefix: str = "") -> Entries:
        entries: Entries = self._call("list", prefix, lambda: self._store.list(prefix))
        return entries

    def staging(self) -> Path:
        return self._store.staging()

    def hurry(self, seconds: float) -> None:
        self._store.hurry(seconds)

    def close(self) -> None:
        self._store.close()


def payload(digest: int) -> Callable[[Path], None]:
    """Write a checkpoint whose bytes, like those of a ``.keras`` file, differ each time."""

    def write(path: Path) -> None:
        path.write_text(json.dumps({"digest": digest, "date": secrets.token_hex(8)}))

    return write


def read_payload(path: Path) -> int:
    return int(json.loads(path.read_text())["digest"])


def step_on(digest: int, step: int) -> int:
    return crc32c(b"%d after %d" % (step, digest))


def publish(store: Store, record: Record) -> None:
    """Write what the record implies and the run lacks, as ``job.publication`` does."""
    existing = {entry.name for entry in store.list()}
    for entry in record.history:
        name = f"train/events.out.tfevents.{entry['step']:010d}"
        if name not in existing:
            with suppress(AlreadyExists):
                store.create(name, json.dumps(entry).encode())
    if record.state == "complete":
        if MODEL not in existing:
            store.copy(record.commits[0].name, MODEL)
        if RESULT not in existing:
            store.create(RESULT, json.dumps(record.result).encode())


def play(store: Store, *, run_class: type[Run] = Run, epochs: int = EPOCHS) -> None:
    """One attempt on the run, to its end. Raises what the protocol raises, and ``Killed``."""
    claim = Claim(store, IDENTITY)
    found = claim.look()
    if found is not None and found[0].state == "complete" and len(found[0].history) >= epochs:
        publish(store, found[0])
        return
    with mock.patch.object(checkpoints, "Run", run_class):
        run = claim.claim(keep=KEEP)
    try:
        _train(run, epochs)
    finally:
        run.close()


def _train(run: Run, epochs: int) -> None:
    digest, progress = run.restore(read_payload) or (0, Progress())
    history, committed = list(run.record.history), progress.step
    run.withdraw({MODEL, RESULT})
    run.prune_lower_attempts()
    publish(run.store, run.record)
    while progress.epoch < epochs:
        if progress.batch < STEPS_PER_EPOCH:
            step = progress.step + 1
            digest = step_on(digest, step)
            progress = Progress(step=step, epoch=progress.epoch, batch=progress.batch + 1)
        else:
            history.append(
                {"epoch": progress.epoch, "step": progress.step, "wall_time": time.time(), "loss": digest}
            )
            progress = Progress(step=progress.step, epoch=progress.epoch + 1)
        if progress.step - committed >= EVERY or progress.epoch == epochs:
            committed = progress.step
            _commit(run, digest, progress, history)
    run.wait()
    run.swap(state="complete", result={"digest": digest})
    publish(run.store, run.record)


def _commit(run: Run, digest: int, progress: Progress, history: list[dict[str, Any]]) -> None:
    run.commit(
        payload(digest),
        progress,
        after=lambda: publish(run.store, run.record),
        state="running",
        history=tuple(history),
    )
    run.wait()  # one thread at a time, so that "the n-th change" is always the same one


def play_until_killed(store: Store, die_after: int, *, run_class: type[Run] = Run) -> bool:
    """Play an attempt that dies after so many changes; False if it ended before."""
    try:
        play(MortalStore(store, die_after=die_after), run_class=run_class)
    except Killed:
        return True
    except Superseded:
        pass
    return False
