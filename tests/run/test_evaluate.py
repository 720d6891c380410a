"""Which data a run is evaluated on; that the numbers are right is tested with the attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from job.console import Reporter
from job.data import fetch, sources
from job.data.ahead import begin_reading
from job.domain.errors import IdentityConflict
from job.domain.settings import Settings
from job.engine import cluster as hardware
from job.run import attempt, evaluate
from tests.run.test_attempt import Signal
from tests.support import TINY, cluster_of

SETTINGS = Settings(network=TINY, data="sample", epochs=1, batch_size=200, name="run", log_format="plain")


@pytest.fixture(autouse=True)
def no_fetch(monkeypatch: Any) -> None:
    monkeypatch.setattr(fetch, "fetch", lambda *_, **__: pytest.fail("a download was started"))
    for connect in ("connect", "connect_alone"):
        monkeypatch.setattr(hardware, connect, lambda settings: cluster_of(settings.replicas or 1))


def test_a_run_is_evaluated_on_its_own_data_and_nothing_is_fetched_for_other(monkeypatch: Any) -> None:
    read = begin_reading(SETTINGS.data, Reporter("plain"))
    trained = attempt.train(SETTINGS, cast(Any, Signal()), read, Reporter("plain"))
    evaluated = evaluate.evaluate("runs/run", data=None)
    assert evaluated["validation"]["accuracy"] == trained["validation"]["accuracy"]
    Path("official").mkdir()
    for data in ("official", "gs://bucket/data"):
        with pytest.raises(IdentityConflict, match=r"was trained on data of SHA-256 .*; name its data"):
            evaluate.evaluate("runs/run", data=data)


def test_the_data_that_the_environment_names_is_compared_too(monkeypatch: Any) -> None:
    """A run on the official files, whose data is gone, is not evaluated on what JOB_DATA names."""
    monkeypatch.setenv("JOB_DATA", "sample")
    identity = SETTINGS.identity(precision="float32", data_sha256=sources.digest_of("data"))
    with pytest.raises(IdentityConflict, match="name its data with --data"):
        evaluate._data_of("runs/run", identity, "gone", None)
    monkeypatch.setenv("JOB_DATA", "elsewhere")
    assert evaluate._data_of("runs/run", identity, "gone", None) is None


def test_data_of_an_earlier_run(tmp_path: Path, monkeypatch: Any) -> None:
    sample, official = sources.digest_of("sample"), sources.digest_of("data")
    assert sources.of_run(sample, None) == sources.of_run(sample, "somewhere") == "sample"
    assert sources.of_run(official, None) is sources.of_run(official, "gone") is None
    assert sources.of_run(official, str(tmp_path)) == str(tmp_path)
    assert sources.of_run(official, "gs://bucket/data") == "gs://bucket/data"

    def refuse(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "exists", refuse)
    assert sources.of_run(official, "/home/somebody/data") is None
