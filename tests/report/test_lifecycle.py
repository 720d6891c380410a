"""A run's life as its record says it: alive or abandoned, finished and being extended, by which programs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from job.domain.account import Spent
from job.domain.network import Network
from job.domain.record import Finished, Owner, Record
from job.domain.settings import Settings
from job.report import comparison
from job.report.caveats import caveats
from job.report.summaries import RunSummary
from job.run.processes import name_of
from tests.report.test_comparison import epoch, result

NOW = 1_800_000_000.0  # seconds since 1970
NETWORK = Network(model="resnet", blocks=(3, 3, 3), filters=16)


def history(
    *accuracies: float, ended: float = NOW - 1.0, seconds: float = 50.0
) -> tuple[dict[str, Any], ...]:
    entries = [epoch(index, accuracy) for index, accuracy in enumerate(accuracies)]
    for entry in entries:
        entry["wall_time"] = ended
        entry["train"]["seconds"] = seconds
    return tuple(entries)


def summary(**fields: Any) -> RunSummary:
    identity = Settings(network=NETWORK).identity(precision="float32", data_sha256="5a" * 32)
    config = {"identity": identity.to_json(), "settings": {"epochs": 4}}
    return RunSummary.from_record("run", config, Record(**fields), NOW)


def owner(host: str, process: str = "boot/1/1", **program: Any) -> Owner:
    values: dict[str, Any] = {"version": "1", "revision": None} | program
    return Owner(attempt=1, began=0.0, host=host, process=process, **values)


@pytest.fixture
def living() -> Iterator[str]:
    """Another process of this host, which runs as long as the test."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield name_of(process.pid) or ""
        process.kill()


@pytest.mark.parametrize(
    ("host", "alive", "age", "state"),
    [
        (socket.gethostname(), True, 1e6, "running"),  # its process is here
        (socket.gethostname(), False, 1.0, "interrupted"),  # its process was here
        ("elsewhere", False, 599.0, "running"),
        ("elsewhere", True, 601.0, "interrupted"),
    ],
)
def test_a_running_run_whose_owner_is_gone_is_interrupted(
    living: str, host: str, alive: bool, age: float, state: str
) -> None:
    process = living if alive else "boot/1/1"
    assert summary(owners=(owner(host, process),), written=NOW - age).state == state


@pytest.mark.parametrize(
    ("seconds", "age", "state"),
    [
        (50.0, 599.0, "running"),
        (50.0, 601.0, "interrupted"),
        (1000.0, 1900.0, "running"),
        (1000.0, 2100.0, "interrupted"),
    ],
)
def test_a_run_may_be_silent_for_as_long_as_its_epochs(seconds: float, age: float, state: str) -> None:
    """An epoch of 1,000 seconds may be as long without a commit."""
    assert summary(history=history(0.5, seconds=seconds), written=NOW - age).state == state


@pytest.mark.parametrize(
    ("due", "age", "state"),
    [
        (70.0, 599.0, "running"),
        (70.0, 601.0, "interrupted"),
        (7200.0, 14_000.0, "running"),  # --commit-every 2h
        (7200.0, 15_000.0, "interrupted"),
        (None, 1e6, "running"),  # --commit-every 5epoch
    ],
)
def test_a_run_may_be_silent_until_its_next_revision_is_due(
    due: float | None, age: float, state: str
) -> None:
    attempt = replace(owner("elsewhere"), spent=Spent(began=0.0, due=due))
    assert summary(owners=(attempt,), history=history(0.5), written=NOW - age).state == state


@pytest.mark.parametrize("state", ["complete", "diverged", "interrupted"])
def test_only_running_runs_can_be_abandoned(state: str) -> None:
    fields: dict[str, Any] = {"history": history(0.5, ended=0.0)}
    if state == "complete":
        about = result(list(fields["history"]), NETWORK, None)
        fields["finished"] = Finished(epochs=1, result=about, commit=None)
    assert summary(state=state, **fields).state == state


def extended(**fields: Any) -> RunSummary:
    """A run that was finished with two epochs, is asked for 20 and has three."""
    entries = history(0.25, 0.5, 0.75)
    finished = Finished(epochs=2, result=result(list(entries[:2]), NETWORK, None), commit=None)
    fields = {"written": NOW - 1.0} | fields
    return summary(history=entries, epochs=20, finished=finished, **fields)


def test_a_finished_run_that_is_extended_shows_its_finished_result() -> None:
    run = extended()

    assert run.complete
    assert (run.status, run.planned_epochs) == ("complete, being extended to 20 epochs", 2)
    assert [entry.validation_accuracy for entry in run.history] == [0.25, 0.5]
    assert run.final_accuracy == 0.5
    assert dict(run.conditions)["epochs"] == 2
    assert caveats([run]) == []
    assert "complete, being extended to 20 epochs" in comparison.table([run])


def test_an_extension_that_has_stopped_says_so() -> None:
    assert extended(written=NOW - 1.0).status == "complete, being extended to 20 epochs"
    gone = extended(written=NOW - 601.0)
    assert gone.status == "complete, being extended to 20 epochs (interrupted)"
    assert extended(state="diverged").status == "complete, being extended to 20 epochs (diverged)"


def test_once_the_extension_is_finished_it_is_the_result() -> None:
    entries = history(0.25, 0.5, 0.75)
    run = summary(
        history=entries,
        state="complete",
        epochs=3,
        finished=Finished(epochs=3, result=result(list(entries), NETWORK, None), commit=None),
    )
    assert (run.status, run.final_accuracy, run.planned_epochs) == ("complete", 0.75, 3)


def test_the_programs_of_all_attempts_are_named() -> None:
    entries = history(0.5)
    programs: list[dict[str, Any]] = [{}, {}, {"version": "2", "revision": "abcd"}]
    run = summary(
        history=entries,
        state="complete",
        finished=Finished(epochs=1, result=result(list(entries), NETWORK, None), commit=None),
        owners=tuple(owner("a", **program) for program in programs),
    )
    assert dict(run.environment) == {"program version": "1 and 2", "source revision": "abcd"}
