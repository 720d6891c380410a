"""What people read of a run is what its record says, whatever earlier attempts have left there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.domain.errors import InvalidData
from job.domain.recipe import RECIPES
from job.domain.record import Commit, Finished, Progress, Record, Timing
from job.domain.settings import Settings
from job.model import keras_file
from job.publish import publication as publishing
from job.publish.publication import MODEL, RESULT, Publication
from job.run.names import record_name
from job.run.reader import read_record
from job.store.checksum import crc32c
from job.store.local import LocalStore
from tests.support import TINY, dataset_of

IDENTITY = Settings(network=TINY, epochs=1).identity(precision="float32", data_sha256="5" * 64)
CONFIG: dict[str, Any] = {"identity": IDENTITY.to_json(), "settings": {"created": 0.0}}


def commit(step: int, content: bytes) -> Commit:
    return Commit(
        name=f"checkpoints/step-{step:010d}-a0001-00.keras",
        size=len(content),
        crc32c=crc32c(content),
        progress=Progress(step=step, epoch=step // 7),
        timing=Timing(),
    )


def entry(epoch: int) -> dict[str, Any]:
    train = {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 9.0, "seconds": 1.0}
    validation = {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0}
    return {"epoch": epoch, "step": 7 * epoch, "wall_time": 1.0, "train": train, "validation": validation}


def complete(epochs: int, content: bytes, **changes: Any) -> Record:
    newest = commit(7 * epochs, content)
    result = {"steps": 7 * epochs, "test": None, "confusion": None}
    record = Record(
        attempt=epochs,
        nonce=f"attempt {epochs}",
        revision=epochs,
        state="complete",
        commits=(newest,),
        history=tuple(map(entry, range(1, epochs + 1))),
        finished=Finished(epochs=epochs, result=result, commit=newest),
    )
    return replace(record, **changes)


SHORT, LONG = complete(1, b"the shorter"), complete(2, b"the longer one")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with closing(LocalStore(str(tmp_path / "run"))) as store:
        yield store


def append(store: LocalStore, record: Record, content: bytes) -> None:
    """What the owner of a run does before it publishes."""
    store.create(record.commits[0].name, content)
    store.create(record_name(record.revision), record.to_bytes())


@pytest.fixture
def publication(store: LocalStore) -> Publication:
    model = keras_file.plain_twin(TINY, RECIPES["article"], precision="float32", seed=0)
    return Publication(store, CONFIG, dataset_of().train, model, read=read_record)


def check_published(store: LocalStore, record: Record, content: bytes) -> None:
    assert record.finished
    assert json.loads(store.read(RESULT)) == record.finished.result
    assert store.read(MODEL) == content


def test_a_finished_run_is_published_and_its_model_is_a_file_of_its_own(
    store: LocalStore, publication: Publication
) -> None:
    append(store, SHORT, b"the shorter")
    publication.publish(SHORT)
    check_published(store, SHORT, b"the shorter")
    (store.root / MODEL).write_bytes(b"somebody saved another model under this name")
    assert store.read(SHORT.commits[0].name) == b"the shorter"


def test_what_is_published_is_not_written_again(
    store: LocalStore, publication: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, SHORT, b"the shorter")
    publication.publish(SHORT)
    for writes in ("create", "replace", "copy", "upload"):
        monkeypatch.setattr(store, writes, None)
    publication.publish(SHORT)


def test_a_longer_result_replaces_a_shorter_one(store: LocalStore, publication: Publication) -> None:
    append(store, SHORT, b"the shorter")
    publication.publish(SHORT)
    append(store, LONG, b"the longer one")
    publication.publish(LONG)
    check_published(store, LONG, b"the longer one")


def test_a_result_stays_while_a_longer_training_goes_on(store: LocalStore, publication: Publication) -> None:
    append(store, SHORT, b"the shorter")
    publication.publish(SHORT)
    running = replace(LONG, state="running", finished=SHORT.finished)
    append(store, running, b"the longer one")
    publication.publish(running)
    check_published(store, SHORT, b"the shorter")


@pytest.mark.parametrize("moment", ["copy", "replace"])
def test_who_was_frozen_while_it_published_a_shorter_result_mends_it(
    moment: str, store: LocalStore, publication: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, SHORT, b"the shorter")
    inner = getattr(store, moment)

    def freeze(*arguments: Any) -> None:
        monkeypatch.setattr(store, moment, inner)
        append(store, LONG, b"the longer one")
        publication.publish(LONG)
        inner(*arguments)

    monkeypatch.setattr(store, moment, freeze)
    publication.publish(SHORT)
    check_published(store, LONG, b"the longer one")


def test_a_checkpoint_that_a_newer_attempt_has_pruned_is_no_fault(
    store: LocalStore, publication: Publication
) -> None:
    append(store, SHORT, b"the shorter")
    append(store, LONG, b"the longer one")
    store.delete(SHORT.commits[0].name)
    publication.publish(SHORT)
    check_published(store, LONG, b"the longer one")


def test_a_damaged_checkpoint_does_not_replace_a_model(store: LocalStore, publication: Publication) -> None:
    append(store, SHORT, b"the shorter")
    publication.publish(SHORT)
    store.replace(SHORT.commits[0].name, b"the shor")
    store.delete(RESULT)
    publication.publish(SHORT)
    check_published(store, SHORT, b"the shorter")


def test_a_model_of_a_shorter_training_is_replaced(store: LocalStore, publication: Publication) -> None:
    """Left by a process that was frozen in its copy, overtaken, and killed when it went on."""
    append(store, LONG, b"the longer one")
    publication.publish(LONG)
    store.replace(MODEL, b"the shorter")
    publication.publish(LONG)
    check_published(store, LONG, b"the longer one")


@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_without_a_whole_checkpoint_and_without_a_model_there_is_none(
    fault: str,
    store: LocalStore,
    publication: Publication,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(publishing.log, "propagate", True)
    append(store, SHORT, b"the shorter")
    if fault == "gone":
        store.delete(SHORT.commits[0].name)
    else:
        store.replace(SHORT.commits[0].name, b"the shor")
    with pytest.raises(InvalidData, match=r"checkpoint is damaged or gone, and model\.keras is missing"):
        publication.publish(SHORT)
    store.create(MODEL, b"somebody's copy")
    publication.publish(SHORT)
    check_published(store, SHORT, b"somebody's copy")
    assert f"{SHORT.commits[0].name} is damaged or gone" in caplog.text
