"""What was measured, in one JSON file, which is complete after every test."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from job.run.versions import source_revision, versions
from tests.gpu.scenarios import Device, Run


@dataclass
class Report:
    """Speed and memory of runs, and how far their losses are from a CPU's."""

    path: Path
    device: Device
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def note(self, what: str, run: Run, **more: Any) -> None:
        """Keep what a run tells, and write everything."""
        self.measured[what] = {
            "precision": run.result["precision"],
            "replicas": run.result["replicas"],
            "images_per_second": run.result["images_per_second"],
            "peak_memory_bytes": run.peak_memory_bytes,
            **more,
        }
        self.path.parent.mkdir(exist_ok=True)
        content = {
            "device": asdict(self.device),
            "versions": {**versions(), "job": source_revision()},
            "seconds": round(time.monotonic() - self.started, 1),
            "measured": self.measured,
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n")
