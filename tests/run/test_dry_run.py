"""What `train` would do is told without doing it."""

from __future__ import annotations

import os
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.console import Reporter
from job.data import fetch, sources
from job.domain.errors import IdentityConflict, MissingInput, Superseded, UsageError
from job.domain.identity import Identity
from job.domain.settings import Settings
from job.engine import cluster as hardware
from job.run import dry_run, owner
from job.run.names import record_name
from job.run.processes import name_of
from job.run.reader import read_record
from job.store.local import LocalStore
from tests.support import TINY, cluster_of

SETTINGS = Settings(network=TINY, data="sample", epochs=3, batch_size=64, precision="float32")
NAME = "resnet6-article-seed0-"


@pytest.fixture(autouse=True)
def tiny_world(monkeypatch: Any) -> None:
    monkeypatch.setattr(hardware, "connect_alone", lambda settings: cluster_of(settings.replicas or 1))
    monkeypatch.setattr(dry_run, "TIMED_SECONDS", 0.0)


def plan(settings: Settings = SETTINGS) -> dict[str, str]:
    lines = dry_run.plan(settings, Reporter("plain"))
    return {line[:11].strip(): line[11:] for line in lines}


def test_all_is_told_and_nothing_is_done() -> None:
    told = plan()
    assert list(told) == ["run", "data", "precision", "devices", "steps", "time"]
    assert re.fullmatch(r"runs/resnet6-article-seed0-[0-9a-f]{8} \(new\)", told["run"])
    assert told["data"] == "sample (1,000 training images, 500 test images)"
    assert told["precision"] == "float32"
    assert told["devices"] == "test CPU"
    assert told["steps"] == "16 an epoch, 48 in all"
    assert re.fullmatch(
        r"about .+ for the steps of an epoch, .+ in all, after .+ of compiling \(\d+ images/s here\)",
        told["time"],
    )
    assert list(Path().iterdir()) == []


@pytest.fixture
def begun(monkeypatch: Any) -> str:
    """The location of a run with these settings that another process of this host trains."""
    name = plan()["run"].split()[0]
    monkeypatch.setattr(owner, "this_process", lambda: name_of(os.getppid()))
    with closing(LocalStore(name)) as store:
        owner.claim(store, identity_of_run(), settings={"epochs": 3}).close()
    return name


def identity_of_run() -> Identity:
    return SETTINGS.identity(precision="float32", data_sha256=sources.digest_of("sample"))


def test_what_is_there_is_told(begun: str) -> None:
    assert plan(replace(SETTINGS, take_over=True))["run"] == f"{begun} (running, epochs done: 0)"


def test_what_train_would_refuse_is_refused(begun: str) -> None:
    with pytest.raises(Superseded, match="is being trained by process"):
        plan()
    with pytest.raises(IdentityConflict, match="seed"):
        plan(replace(SETTINGS, name=Path(begun).name, seed=7, take_over=True))


def test_a_run_of_which_only_results_were_kept_is_not_extended(begun: str) -> None:
    with closing(LocalStore(begun)) as store:
        record = replace(read_record(store), state="complete", revision=2, history=({"epoch": 1},))
        store.create(record_name(2), record.to_bytes())
    with pytest.raises(UsageError, match="holds the results of 1 epochs and no checkpoint"):
        plan()
    with pytest.raises(UsageError, match="--epochs must not be below the 1 epochs"):
        plan(replace(SETTINGS, epochs=0))


def test_a_holdout_that_leaves_nothing_is_refused_as_train_refuses_it() -> None:
    with pytest.raises(UsageError, match=r"the hold-out must be divisible by 10.* received 1000"):
        plan(replace(SETTINGS, holdout=1000))


def test_data_that_would_be_fetched_is_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(fetch, "fetch", lambda *_, **__: pytest.fail("fetched"))
    told = plan(replace(SETTINGS, data=None, holdout=5000, workers=2, batch_size=100))
    assert told["data"] == "data (would be fetched first: 50,000 training images, 10,000 test images)"
    assert told["devices"] == "test CPU, in each of 2 workers"
    assert told["steps"] == "450 an epoch, 1,350 in all"


def test_an_output_that_is_a_file_is_refused() -> None:
    Path("taken").write_text("a file")
    with pytest.raises(MissingInput, match="taken must be a folder, but it is a file"):
        plan(replace(SETTINGS, output="taken"))


def test_what_could_not_be_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 6, one image for each replica, but is 5"):
        plan(replace(SETTINGS, replicas=2, workers=3, batch_size=5))
