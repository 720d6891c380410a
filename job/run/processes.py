"""Which process an attempt is, and whether one of this host is alive: a courtesy, never a fence."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from job.domain.record import Owner


def this_process() -> str:
    """Boot, process id and start time of this process: no other process of this host has the same."""
    return name_of(os.getpid()) or ""


def is_alive(owner: Owner) -> bool:
    """Whether an attempt's process is another one of this host, and runs."""
    process = owner.process.split("/")
    if owner.host != socket.gethostname() or len(process) != 3 or owner.process == this_process():
        return False
    return process[1].isdigit() and name_of(int(process[1])) == owner.process


def seconds_since_start() -> float:
    """How long ago this process was started, before Python was: 0 where the system does not tell."""
    try:
        ticks = int(_stat("self")[19])
    except OSError:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def name_of(pid: int) -> str | None:
    """Boot, id and start time of a process; None for one that is not there, or is dead and not yet reaped."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = _stat(pid)
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else f"{boot}/{pid}/{started}"


def _stat(pid: int | str) -> list[str]:
    """What the system says of a process after its command's name, which may hold blanks; proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
