"""The engine and the image of the container tests, for the pods that run as containers."""

from __future__ import annotations

import pytest

from tests.container.conftest import engine, images

__all__ = ["engine", "figures", "images"]


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines that the container tests end with, and these do not."""
    return []
