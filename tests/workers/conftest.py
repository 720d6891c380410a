"""Processes and places for runs of several workers, and the run that nothing disturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.store.location import join, open_store
from tests.durability import jobs
from tests.durability.jobs import Nursery
from tests.durability.outcome import Outcome
from tests.workers.groups import Place

PATIENCE_SECONDS = 280.0  # three processes that compile at once on a busy machine


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "PATIENCE_SECONDS", PATIENCE_SECONDS)
        with contextlib.closing(Nursery(tmp_path_factory.mktemp("workers"))) as opened:
            yield opened


@pytest.fixture(scope="session")
def reference(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of two workers that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    with contextlib.closing(open_store(str(folder / "runs" / "run"))) as store:
        place = Place(nursery, str(folder / "runs"), folder, store)
        place.finish(2)
        return place.outcome


@pytest.fixture
def place_in(nursery: Nursery, tmp_path: Path) -> Iterator[Callable[[str], Place]]:
    """Make a place for a run below an output location. No process outlives the test."""
    before = len(nursery.jobs)
    with contextlib.ExitStack() as stack:

        def make(output: str) -> Place:
            store = stack.enter_context(contextlib.closing(open_store(join(output, "run"))))
            return Place(nursery, output, tmp_path, store)

        yield make
    for job in nursery.jobs[before:]:
        if job.code is None and job.state() not in ("", "Z"):
            job.kill()


@pytest.fixture
def place(place_in: Callable[[str], Place], tmp_path: Path) -> Place:
    """A new place on a disk."""
    return place_in(str(tmp_path / "runs"))
