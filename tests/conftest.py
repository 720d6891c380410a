"""One environment for all tests: TensorFlow's settings, none of the user's, and the object store."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.engine.startup import set_environment

set_environment(filters=16)
for name in [name for name in os.environ if name.startswith("JOB_")]:
    del os.environ[name]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # the servers of tests are here

pytest_plugins = ["tests.gcs_server"]


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """A reporter takes the job's logger over, for its test alone."""
    log = logging.getLogger("job")
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Any, monkeypatch: Any) -> None:
    """Relative defaults such as ``runs`` and ``data`` must never touch the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for the processes that tests start
