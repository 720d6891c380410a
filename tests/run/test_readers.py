"""Whoever reads a run while its owner commits and prunes gets an answer, always."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.domain.errors import StorageFailed
from job.domain.record import Progress
from job.report.finding import load_runs
from job.run.committer import Committer
from job.run.owner import claim
from job.run.position import Position
from job.run.reader import read_newest_whole, read_record
from job.store.contract import NotFound, Store
from job.store.location import open_store
from tests.durability.protocol import IDENTITY, load, play, save

ROUNDS = 1000


@contextlib.contextmanager
def committing_all_the_time(location: str) -> Iterator[Callable[[], int]]:
    """An owner that never rests; tells the step of its last commit."""
    done, steps = threading.Event(), [0]
    with contextlib.closing(open_store(location)) as store:
        run = claim(store, IDENTITY, settings={"epochs": 9}, take_over=True)
        committer = Committer(run, keep=1, save=save, publish=lambda record: None)
        history = run.record.history

        def work() -> None:
            first = run.record.commits[0].progress if run.record.commits else Progress()
            step = first.step
            while not done.is_set():
                step += 1
                committer.submit(step, Position(progress=Progress(step=step), history=history))
                steps[0] = step

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield lambda: steps[0]
        finally:
            done.set()
            thread.join()
            committer.close()
            run.close()


@pytest.fixture(params=["local", "gcs"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return str(request.getfixturevalue("gcs_bucket")) + "/run"


@pytest.mark.slow
def test_a_living_run_can_always_be_evaluated_and_compared(location: str) -> None:
    with contextlib.closing(open_store(location)) as store:
        play(store, epochs=1)  # finished, and extended from here on
        seen = read_all_the_time(location, store)
    assert seen == sorted(seen), "what is read never goes back"
    assert len(set(seen)) > 10, "the run went on meanwhile"


def read_all_the_time(location: str, store: Store) -> list[int]:
    seen: list[int] = []
    with committing_all_the_time(location) as last:
        while last() < 10:
            time.sleep(0.01)
        for _ in range(ROUNDS):
            _, commit = read_newest_whole(store, load)
            seen.append(commit.progress.step)
            (summary,), skipped = load_runs([location])
            assert skipped == []
            assert summary.location == location
    return seen


def test_a_record_that_is_always_replaced_while_it_is_read_is_a_failure_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(open_store(str(tmp_path / "run"))) as store:
        play(store, epochs=1)

        def gone(name: str) -> Any:
            raise NotFound(name)

        monkeypatch.setattr(store, "read", gone)
        with pytest.raises(StorageFailed, match="changes faster than it can be read"):
            read_record(store)
