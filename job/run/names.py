"""The names of a run's objects in its store."""

from __future__ import annotations

import re
import secrets

CONFIG = "config.json"
RECORD = re.compile(r"record-(\d{10})\.json")
CHECKPOINT = re.compile(r"checkpoints/step-\d{10}-a(?P<attempt>\d{4,})-[0-9a-f]+\.keras")


def record_name(revision: int) -> str:
    """Of a revision of the record."""
    return f"record-{revision:010d}.json"


def checkpoint_name(step: int, attempt: int) -> str:
    """Of a new checkpoint of an attempt; each call gives another, so that none is written twice."""
    return f"checkpoints/step-{step:010d}-a{attempt:04d}-{secrets.token_hex(4)}.keras"
