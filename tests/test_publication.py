"""What people read of a run is what its record says, whatever earlier attempts have left there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job import portable
from job.checkpoints import MODEL, RECORD, RESULT, Commit, Progress, Record
from job.config import RECIPES, Settings
from job.errors import InvalidData
from job.publication import Publication
from job.storage import LocalStore, crc32c
from tests.support import TINY, dataset_of

CHECKPOINT = "checkpoints/step-0000000007-a0001-00.keras"
COMMIT = Commit(name=CHECKPOINT, size=10, crc32c=crc32c(b"the newest"), progress=Progress(step=7, epoch=1))
ENTRY = {
    "epoch": 0,
    "step": 7,
    "wall_time": 1.0,
    "train": {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 9.0, "seconds": 1.0},
    "validation": {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0},
}
COMPLETE = Record(
    attempt=2,
    nonce="ours",
    state="complete",
    commits=(COMMIT,),
    history=(ENTRY,),
    result={"steps": 7, "test": None},
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    """A run that is complete; nothing of it is published."""
    with closing(LocalStore(str(tmp_path / "run"))) as store:
        store.create(CHECKPOINT, b"the newest")
        store.swap(RECORD, COMPLETE.to_bytes(), None)
        yield store


@pytest.fixture
def publication(store: LocalStore) -> Publication:
    settings = Settings(network=TINY, epochs=1)
    identity = settings.identity(precision="float32", data_sha256="5" * 64)
    config: dict[str, Any] = {"identity": identity.to_json(), "settings": {"created": 0.0}}
    model = portable.plain_twin(TINY, RECIPES["article"], precision="float32", seed=0)
    return Publication(store, config, dataset_of().train, model)


def published(store: LocalStore) -> dict[str, bytes]:
    return {name: store.read(name)[0] for name in (MODEL, RESULT)}


def test_a_shorter_runs_result_that_a_lingering_attempt_wrote_late_is_replaced(
    store: LocalStore, publication: Publication
) -> None:
    store.create(MODEL, b"an older model")
    store.create(RESULT, b'{"steps": 3}')
    publication.publish(COMPLETE)
    assert published(store) == {
        MODEL: b"the newest",
        RESULT: (json.dumps(COMPLETE.result, indent=1) + "\n").encode(),
    }
    before = {entry.name: entry.version for entry in store.list()}
    publication.publish(COMPLETE)
    assert {entry.name: entry.version for entry in store.list()} == before


def test_who_no_longer_owns_the_run_replaces_nothing(store: LocalStore, publication: Publication) -> None:
    newer = {MODEL: b"a newer model", RESULT: b'{"steps": 14}'}
    for name, data in newer.items():
        store.create(name, data)
    store.swap(RECORD, replace(COMPLETE, attempt=3, nonce="newer").to_bytes(), store.read(RECORD)[1])
    publication.publish(COMPLETE)
    assert published(store) == newer


def test_a_damaged_checkpoint_does_not_replace_a_model(
    store: LocalStore, publication: Publication, caplog: pytest.LogCaptureFixture
) -> None:
    store.create(MODEL, b"the newest")
    (store.root / CHECKPOINT).write_bytes(b"the new")
    publication.publish(COMPLETE)
    assert store.read(MODEL)[0] == b"the newest"
    assert f"{CHECKPOINT} is damaged or gone" in caplog.text


def test_a_model_that_is_there_will_do_where_the_checkpoint_is_gone(
    store: LocalStore, publication: Publication
) -> None:
    for record in (COMPLETE, replace(COMPLETE, commits=())):
        for entry in store.list():
            if entry.name in (CHECKPOINT, MODEL, RESULT):
                store.delete(entry.name, entry.version)
        store.swap(RECORD, record.to_bytes(), store.read(RECORD)[1])
        with pytest.raises(InvalidData, match=r"checkpoint is damaged or gone, and model\.keras is missing"):
            publication.publish(record)
        store.create(MODEL, b"somebody's copy")
        publication.publish(record)
        assert store.read(MODEL)[0] == b"somebody's copy"
