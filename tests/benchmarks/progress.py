"""What a contender that is killed leaves of its work. Standard library only, as ``turns``."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COUNTER, RESULT = "steps", "result.json"  # in a contender's folder


class StepCounter:
    """Counts the steps of all of a contender's processes, in a file that a SIGKILL leaves right."""

    def __init__(self, folder: str) -> None:
        self._file = os.open(Path(folder, COUNTER), os.O_RDWR | os.O_CREAT, 0o666)
        self._count = count_of(folder)

    def did(self, steps: int) -> None:
        """Count some more."""
        self._count += steps
        os.pwrite(self._file, struct.pack("<q", self._count), 0)


def count_of(folder: str | Path) -> int:
    """Steps that were counted in a folder so far."""
    path = Path(folder, COUNTER)
    data = path.read_bytes() if path.exists() else b""
    return int(struct.unpack("<q", data)[0]) if data else 0


def digest_of(arrays: Iterable[bytes]) -> str:
    """Of a network's weights."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


def tell_result(folder: str, **values: Any) -> None:
    """Say that the training is over, and with what."""
    Path(folder, RESULT).write_text(json.dumps(values))
