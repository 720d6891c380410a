"""A run's newest record, read from its folder as anyone would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def newest_record(folder: Path) -> Any:
    """The JSON of the newest revision; its owner may replace it while it is read."""
    while True:
        path = max(folder.glob("record-*.json"))
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            continue
