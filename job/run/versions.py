"""Versions of what decides a run's numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).parents[2]
ASK_GIT_SECONDS = 5.0


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    packages = ("tensorflow", "keras", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def source_revision() -> str | None:
    """The commit of this program's source: $JOB_REVISION, which an image sets, else git's answer.

    A checkout with changes that are not committed ends in "-dirty". None where neither knows.
    """
    revision = os.environ.get("JOB_REVISION")
    if revision and revision != "unknown":  # which the Dockerfile says where nobody told it
        return revision
    if not (SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
