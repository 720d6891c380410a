"""What settings come to: which run they name, and whether that is finished already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from job.console import Reporter
from job.data.splits import Splits
from job.domain.errors import UsageError
from job.domain.identity import Identity
from job.domain.record import Record
from job.domain.settings import Settings
from job.engine import devices
from job.engine.devices import Precision
from job.model import keras_file
from job.publish.publication import Publication
from job.run.owner import delete_leftovers, find_record
from job.run.reader import read_config, read_record
from job.store.contract import Store

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")


def identity_of(settings: Settings, data_sha256: str, runs: Store, reporter: Reporter) -> Identity:
    """What run these settings name; ``--precision auto`` stays with what the run began in, if it exists.

    Else a job that moves to other hardware would begin anew, under another name.
    """
    fastest = devices.resolve_precision(
        settings.precision, filters=settings.network.filters, replicas=settings.replicas
    )
    wanted = settings.identity(precision=fastest, data_sha256=data_sha256)
    others = [precision for precision in PRECISIONS if precision != fastest]
    for precision in [fastest, *others] if settings.precision == "auto" else [fastest]:
        identity = replace(wanted, precision=precision)
        name = settings.name or identity.default_name
        config = read_config(runs, name)
        if config and Identity.from_json(config["identity"]) == identity:
            if precision != fastest:
                reporter.note(f"{name} computes in {precision}, as it began; {fastest} would be faster here")
            return identity
    return wanted


def has_finished(record: Record, epochs: int) -> bool:
    """Whether a run was trained to its end at least that far."""
    return record.finished is not None and record.finished.epochs >= epochs


def refuse_untrainable(store: Store, record: Record, epochs: int) -> None:
    """Raise UsageError where a run is past those epochs, or has no checkpoint to be trained from."""
    begun = len(record.history) + any(commit.progress.batch for commit in record.commits[:1])
    if begun > epochs:
        raise UsageError(
            f"--epochs must not be below the {begun} epochs that {store.location} has begun, not {epochs}; "
            f"example: --epochs {begun}"
        )
    if record.history and not record.restorable:
        raise UsageError(
            f"{store.location} holds the results of {begun} epochs and no checkpoint, so it cannot be "
            "trained further; choose another --output or --name"
        )


def already_finished(
    store: Store, identity: Identity, settings: Settings, splits: Splits, reporter: Reporter
) -> dict[str, Any] | None:
    """The result of a run that was finished at least as far as asked; what people read of it is mended.

    Raises:
        UsageError: it cannot be trained, as :func:`refuse_untrainable` says.
    """
    record = find_record(store, identity)
    if record is None:
        return None
    if not has_finished(record, settings.epochs):
        refuse_untrainable(store, record, settings.epochs)
        return None
    assert record.finished is not None
    delete_leftovers(store, record)
    twin = keras_file.plain_twin(identity.network, identity.recipe, precision=identity.precision, seed=0)
    Publication(store, read_config(store) or {}, splits.train, twin, read=read_record).publish(record)
    reporter.note(f"{store.location}: already complete after {record.finished.epochs} epochs; nothing to do")
    return record.finished.result
