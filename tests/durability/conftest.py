"""Processes and places for runs, and the run that nothing disturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from job.store.contract import Store
from job.store.location import join, open_store
from tests.durability.jobs import TRAINING, Job, Nursery
from tests.durability.outcome import Outcome, outcome
from tests.gcs_server import Gateway

OUTAGE_DEADLINE_SECONDS = 3.0  # of each call to a bucket that is out, instead of a minute


@dataclass
class Place:
    """Where one run lives, and how to start attempts on it."""

    nursery: Nursery
    output: str
    folder: Path
    store: Store

    def start(self, *options: str, cold: bool = False, **spec: Any) -> Job:
        """Start an attempt; ``spec`` is the driver's: ``point``, ``count``, ``stuck``, ``eio``, ``gcs``."""
        arguments = (*TRAINING, "--output", self.output, *options)
        return self.nursery.start(*arguments, cwd=self.folder, spec=spec, cold=cold)

    def stopped_at(self, point: str, count: int = 1, *options: str, cold: bool = False, **spec: Any) -> Job:
        """Start an attempt and wait until it has stopped itself at a point."""
        job = self.start(*options, cold=cold, point=point, count=count, **spec)
        job.wait_until_stopped()
        return job

    def finish(self, *options: str) -> Job:
        """Run the same command to its end."""
        job = self.start(*options)
        assert job.wait() == 0, job.text
        return job

    @contextlib.contextmanager
    def losing_an_answer(self, server: Gateway | None, *, eio: int = 1000) -> Iterator[Job]:
        """Stop an attempt before its third revision, which will be stored, but whose answer will be lost.

        Storage is out from then on: a bucket as long as this context lasts, a folder for the next ``eio``
        times that it should be made durable (no disk fails on demand: the driver answers in its place).
        """
        job = self.stopped_at("append", 3, eio=eio, gcs={"deadline_seconds": OUTAGE_DEADLINE_SECONDS})
        if server is None:
            yield job
            return
        lost = server.inject("lose", "upload")
        outage = server.inject("status", "any", status=503, times=10_000, skip=1)
        try:
            yield job
        finally:
            outage.times = 0
        assert lost.times == 0


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with contextlib.closing(Nursery(tmp_path_factory.mktemp("logs"))) as opened:
        yield opened


@pytest.fixture(scope="session")
def reference(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of the undisturbed run, on a disk: that of a run in a bucket must be equal to it."""
    folder = tmp_path_factory.mktemp("reference")
    job = nursery.start(*TRAINING, "--output", str(folder / "runs"), cwd=folder)
    assert job.wait() == 0, job.text
    with contextlib.closing(open_store(str(folder / "runs" / "run"))) as store:
        return outcome(store)


@pytest.fixture
def place_in(nursery: Nursery, tmp_path: Path) -> Iterator[Callable[[str], Place]]:
    """Make a place for a run below an output location."""
    with contextlib.ExitStack() as stack:

        def make(output: str) -> Place:
            store = stack.enter_context(contextlib.closing(open_store(join(output, "run"))))
            return Place(nursery, output, tmp_path, store)

        yield make


@pytest.fixture(params=["local", "gcs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, place_in: Callable[[str], Place]) -> Place:
    """A new place on each store."""
    if request.param == "local":
        return place_in(str(tmp_path / "runs"))
    return place_in(request.getfixturevalue("gcs_bucket") + "/runs")


@pytest.fixture
def server(place: Place, request: pytest.FixtureRequest) -> Gateway | None:
    """The server of a place in a bucket."""
    if not place.output.startswith("gs://"):
        return None
    gateway: Gateway = request.getfixturevalue("gcs_server")
    return gateway
