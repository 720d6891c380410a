"""One environment for all tests: TensorFlow's settings, none of the user's, and the object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from job.startup import set_environment

set_environment(filters=16)
for name in [name for name in os.environ if name.startswith("JOB_")]:
    del os.environ[name]

pytest_plugins = ["tests.gcs_server"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Any, monkeypatch: Any) -> None:
    """Relative defaults such as ``runs`` and ``data`` must never touch the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for the processes that tests start
