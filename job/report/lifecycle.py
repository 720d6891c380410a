"""What a record says of a run's life: the programs of its attempts, and whether its process is gone."""

from __future__ import annotations

import socket

from job.domain.record import Record
from job.run.processes import is_alive

SILENCE_SECONDS = 600.0  # without a sign of life, after which a run counts as interrupted


def programs(record: Record) -> dict[str, str]:
    """Version and source revision of the program, of all attempts; of a kept result, of the last one."""
    ran = [(owner.version, owner.revision) for owner in record.owners]
    if not ran and record.finished and (program := record.finished.result.get("program")):
        ran = [(program["version"], program["revision"])]
    values = {
        "program version": [version for version, _ in ran],
        "source revision": [revision for _, revision in ran if revision],
    }
    return {title: " and ".join(dict.fromkeys(found)) for title, found in values.items() if found}


def is_abandoned(record: Record, now: float) -> bool:
    """Whether the process of a record that says "running" seems to be gone, ``now`` in seconds since 1970.

    On its own host a process is looked for. Elsewhere its last sign of life decides: it may be as old as
    SILENCE_SECONDS, or as twice the time within which the next was due. Who commits by steps or epochs does
    not say when that is, and counts as running. A record without ``spent`` has twice its longest epoch.
    """
    if record.owners and record.owners[-1].host == socket.gethostname():
        return not is_alive(record.owners[-1])
    spent = record.owners[-1].spent if record.owners else None
    if spent is not None and spent.due is None:
        return False
    epochs = [entry["train"]["seconds"] + entry["validation"]["seconds"] for entry in record.history]
    due = max(epochs, default=0.0) if spent is None else spent.due or 0.0
    return now - record.written > max(SILENCE_SECONDS, 2 * due)
