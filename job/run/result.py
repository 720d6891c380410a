"""The content of result.json."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np

from job import __version__
from job.console import duration
from job.data.splits import Splits
from job.domain.identity import Identity
from job.domain.network import CLASSES
from job.engine.cluster import Cluster
from job.run.position import Position
from job.run.versions import source_revision, versions


def result_of(
    identity: Identity,
    cluster: Cluster,
    position: Position,
    splits: Splits,
    *,
    test: dict[str, float] | None,
    confusion: list[list[int]],
    recalibrated: dict[str, Any],
) -> dict[str, Any]:
    """Sum a finished run up.

    Args:
        identity: of the run.
        cluster: the devices of the attempt that finishes it.
        position: after the last epoch.
        splits: what validated.
        test: loss and accuracy on the test set, where a hold-out validates.
        confusion: of the test set.
        recalibrated: as :meth:`TrainingLoop.evaluate_at_end` has it.
    """
    last = position.history[-1]
    highest = max(position.history, key=lambda entry: entry["validation"]["accuracy"])
    speeds = [entry["train"]["images_per_second"] for entry in position.history]
    about = identity.to_json()
    return {
        **{key: value for key, value in about.items() if key not in ("recipe_values", "epochs")},
        "classes": list(CLASSES),  # the names of labels 0 to 9
        "layers": identity.network.layers,
        "parameters": identity.network.parameters,
        "epochs": position.progress.epoch,
        "steps": position.progress.step,
        "train": {key: last["train"][key] for key in ("loss", "accuracy")},
        "validation": {
            **{key: last["validation"][key] for key in ("loss", "accuracy")},
            "on": splits.validates_on,
            "highest_accuracy": highest["validation"]["accuracy"],
            "highest_epoch": highest["epoch"],
        },
        "test": test,
        "recalibrated": recalibrated,
        "confusion": confusion,
        "images_per_second": float(np.median([speed for speed in speeds if speed] or [0.0])),
        "seconds": position.timing.total,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "devices": list(cluster.devices),
        "replicas": cluster.replicas,
        "workers": cluster.workers,
        "versions": versions(),
        "program": {"version": __version__, "revision": source_revision()},
    }


def in_words(result: dict[str, Any]) -> str:
    """The accuracies of a result, and the time that it took."""
    validation, recalibrated = result["validation"], result["recalibrated"]["validation"]
    return (
        f"accuracy {validation['accuracy']:.4f} on the {validation['on']} "
        f"({recalibrated['accuracy']:.4f} by batch statistics taken anew), "
        f"{duration(result['seconds'])} of training and evaluation"
    )
