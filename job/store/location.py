"""Locations: ``gs://bucket/prefix``, or the path of a folder."""

from __future__ import annotations

from pathlib import Path

from job.domain.errors import UsageError
from job.store.contract import Store
from job.store.local import LocalStore


def open_store(location: str) -> Store:
    """Open ``gs://bucket/prefix`` or a path, without touching it yet. Raises ``UsageError``."""
    if location.startswith("gs:"):
        from job.store.gcs import GcsStore  # imports google-cloud-storage, which local runs never need

        return GcsStore(location)
    if "://" in location or not location:
        raise UsageError(f"A location is a path or gs://bucket/prefix, not {location!r}.")
    return LocalStore(location)


def join(location: str, *parts: str) -> str:
    """Append path components to a path or a ``gs://`` location."""
    if location.startswith("gs://"):
        return "/".join([location.rstrip("/"), *(part.strip("/") for part in parts if part)])
    return str(Path(location, *parts))
