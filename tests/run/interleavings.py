"""All orders in which a few processes can reach one store, up to a number of switches between them.

A process is a function that is given a store. It stands still before each call of the store until it is its
turn. ``explore`` plays the same processes again and again, with switches at other calls each time. A process
that is switched away from is frozen there, whatever it was doing; it goes on at a later switch, or when the
others have ended. What is checked after every call also holds for a process that is killed there.

Faults of such protocols need few switches: Musuvathi and Qadeer 2007, Iterative Context Bounding for
Systematic Testing of Multithreaded Programs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from job.domain.errors import StorageFailed
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists, Entry, NotFound

PATIENCE_SECONDS = 60.0  # for one call: a process that makes none in this time hangs

Switches = Mapping[int, int]  # the n-th call of all, counted from 0, is made by this process


@dataclass(frozen=True)
class Call:
    """One call that was made, and who else could have made one instead."""

    process: int
    text: str
    others: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'ABCDEF'[self.process]}: {self.text}"


class Turns:
    """Lets one process run at a time: from one call of its store to its next."""

    def __init__(self, switches: Switches) -> None:
        self._switches = switches
        self._waiting: dict[int, tuple[str, threading.Semaphore]] = {}
        self._stands = threading.Semaphore(0)
        self.calls: list[Call] = []

    def wait(self, process: int, text: str) -> None:
        """Stand still until it is this process's turn to make a call."""
        turn = threading.Semaphore(0)
        self._waiting[process] = (text, turn)
        self._stands.release()
        assert turn.acquire(timeout=PATIENCE_SECONDS), "nobody has given a turn"

    def play(self, processes: Sequence[Callable[[], None]], after_call: Callable[[], None]) -> None:
        """Run processes to their ends, the first one first."""
        for number, process in enumerate(processes):
            threading.Thread(target=self._live, args=(number, process), daemon=True).start()
            self._wait_until_all_stand()
        current = 0
        while self._waiting:
            ready = sorted(self._waiting)
            current = self._switches.get(len(self.calls), current if current in ready else ready[0])
            text, turn = self._waiting.pop(current)
            self.calls.append(Call(current, text, tuple(set(ready) - {current})))
            turn.release()
            self._wait_until_all_stand()
            after_call()

    def _live(self, number: int, process: Callable[[], None]) -> None:
        try:
            self.wait(number, "begin")
            process()
        finally:
            self._stands.release()

    def _wait_until_all_stand(self) -> None:
        assert self._stands.acquire(timeout=PATIENCE_SECONDS), "a process hangs"


def explore(play: Callable[[Switches], Sequence[Call]], *, switches: int) -> int:
    """Play with every placement of at most so many switches, and return how often that was.

    Args:
        play: plays once, checks, and returns the calls that were made.
        switches: the most of one play; that another goes on where a process has ended is none.
    """
    stack: list[dict[int, int]] = [{}]
    plays = 0
    while stack:
        chosen = stack.pop()
        calls = play(chosen)
        plays += 1
        if len(chosen) < switches:
            for moment in range(max(chosen, default=0) + 1, len(calls)):
                stack += [{**chosen, moment: other} for other in calls[moment].others]
    return plays


@dataclass
class Objects:
    """What all processes share."""

    now: dict[str, bytes] = field(default_factory=dict)


class MemoryStore:
    """A ``Store`` as one process reaches it.

    Args:
        objects: what is stored, shared with the other processes.
        scratch: an existing folder.
        wait: is told each call, and returns when it may be made.
        faults: one for each call that creates an object: "" for none, "lost" where the call is obeyed and its
            answer lost, "refused" where it is not even obeyed.
    """

    def __init__(
        self,
        objects: Objects,
        scratch: Path,
        wait: Callable[[str], None] = lambda text: None,
        faults: Sequence[str] = (),
    ) -> None:
        self.location = "memory"
        self._objects, self._scratch, self._wait = objects, scratch, wait
        self._faults: Iterator[str] = iter(faults)

    def check(self, *, write: bool = True) -> None:
        self._wait("check")

    def read(self, name: str) -> bytes:
        self._wait(f"read {name}")
        return self._content(name)

    def checksum(self, name: str) -> tuple[int, int]:
        self._wait(f"checksum {name}")
        return len(data := self._content(name)), crc32c(data)

    def exists(self, name: str) -> bool:
        self._wait(f"exists {name}")
        return name in self._objects.now

    def create(self, name: str, data: bytes) -> None:
        self._wait(f"create {name}")
        self._create(name, data)

    def upload(self, name: str, path: Path) -> None:
        self._wait(f"upload {name}")
        self._create(name, path.read_bytes())

    def replace(self, name: str, data: bytes) -> None:
        self._wait(f"replace {name}")
        self._objects.now[name] = data

    def copy(self, source: str, target: str) -> None:
        self._wait(f"copy {source} to {target}")
        self._objects.now[target] = self._content(source)

    def download(self, name: str, path: Path) -> None:
        self._wait(f"download {name}")
        path.write_bytes(self._content(name))

    def list(self, prefix: str = "") -> list[Entry]:
        self._wait(f"list {prefix}")
        names = sorted(name for name in self._objects.now if name.startswith(prefix))
        return [Entry(name, len(self._objects.now[name])) for name in names]

    def delete(self, name: str) -> None:
        self._wait(f"delete {name}")
        self._objects.now.pop(name, None)

    def begin_attempt(self, number: int) -> None:
        """Nothing is ever unfinished here."""

    def scratch(self) -> Path:
        return self._scratch

    def finish_within(self, seconds: float) -> None:
        """No call takes time here."""

    def close(self) -> None:
        """Nothing is open."""

    def _content(self, name: str) -> bytes:
        try:
            return self._objects.now[name]
        except KeyError:
            raise NotFound(name) from None

    def _create(self, name: str, data: bytes) -> None:
        fault = next(self._faults, "")
        if fault == "refused":
            raise StorageFailed("the store is out")
        taken = self._objects.now.setdefault(name, data) != data
        if fault == "lost":
            raise StorageFailed("the answer was lost")
        if taken:
            raise AlreadyExists(name)
