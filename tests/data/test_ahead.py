"""Data is read beside TensorFlow's import where nothing speaks against it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from job.cli import commands
from job.console import Reporter
from job.data import fetch, sources
from job.data.ahead import begin_reading
from job.domain.errors import MissingInput

SECONDS = 60.0  # for what happens at once


def test_a_local_source_is_read_before_it_is_asked_for() -> None:
    expected = sources.load("sample")
    read = begin_reading("sample", Reporter("plain"))
    assert read().sha256 == expected.sha256
    assert (read().train.images == expected.train.images).all()


def test_a_fault_is_raised_by_the_one_who_asks(tmp_path: Path) -> None:
    read = begin_reading(str(tmp_path), Reporter("plain"))
    for _ in range(2):
        with pytest.raises(MissingInput, match="data_batch_1"):
            read()


@pytest.mark.parametrize("data", ["gs://bucket/data", None])
def test_what_is_in_a_bucket_or_absent_is_left_to_the_call(
    data: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("JOB_DATA", str(tmp_path / "absent"))
    calls: list[str] = []

    def note(called: str, place: str) -> str:
        calls.append(f"{called} {place}")
        return place

    monkeypatch.setattr(fetch, "fetch", lambda to, **_: note("fetch", to))
    monkeypatch.setattr(sources, "load", lambda source: note("load", source))
    read: Any = begin_reading(data, Reporter("plain"))
    assert not calls
    assert read() == (data or str(tmp_path / "absent"))
    place = data or str(tmp_path / "absent")
    assert calls == ([] if data else [f"fetch {place}"]) + [f"load {place}"]


def test_train_reads_while_tensorflow_is_imported(monkeypatch: Any) -> None:
    """The import ends after the reading has begun, and the reading after the import."""
    reading, imported = threading.Event(), threading.Event()
    trained: list[Any] = []

    def load(source: str) -> str:
        reading.set()
        assert imported.wait(SECONDS)
        return f"data of {source}"

    def import_run(filters: int) -> Any:
        assert reading.wait(SECONDS), "nothing was read before the import"
        imported.set()
        return SimpleNamespace(attempt=SimpleNamespace(train=lambda _, __, read, ___: trained.append(read())))

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.setattr(commands, "import_run", import_run)
    ran = CliRunner().invoke(commands.cli, ["train", "--data", "sample"], catch_exceptions=False)
    assert ran.exit_code == 0
    assert trained == ["data of sample"]
