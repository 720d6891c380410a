"""Restoring reads arrays: nothing that a checkpoint names is run, whoever wrote it."""

from __future__ import annotations

import warnings
import zipfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from job.domain.record import Record
from job.model import keras_file
from job.run.names import record_name
from job.run.reader import read_commit, read_record
from job.store.checksum import crc32c
from job.store.location import open_store
from tests.run.test_attempt import SETTINGS, newest_state, tiny_world, train, twin_of
from tests.support import assert_same_state

assert tiny_world  # the fixture


def trap(folder: Path) -> tuple[bytes, Path]:
    """The configuration of a network that makes a file as soon as it is built, and that file."""
    sprung = folder / "sprung"
    path = folder / "trap.keras"
    body = f"lambda x: (open({str(sprung)!r}, 'w').close(), x)[1]"
    layers = [keras.layers.Input((32, 32, 3)), keras.layers.Lambda(eval(body))]
    keras.Sequential(layers).save(path)
    sprung.unlink(missing_ok=True)
    with zipfile.ZipFile(path) as archive:
        return archive.read("config.json"), sprung


def with_configuration(checkpoint: bytes, configuration: bytes, path: Path) -> bytes:
    """The same arrays in a file that describes another network."""
    path.write_bytes(checkpoint)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | {"config.json": configuration}).items():
            archive.writestr(name, data)
    return path.read_bytes()


def replace_newest_checkpoint(run: str, data: bytes) -> None:
    """As somebody who may write into the bucket could: the record is made to fit."""
    with closing(open_store(run)) as store:
        record: Record = read_record(store)
        commit = replace(record.commits[0], size=len(data), crc32c=crc32c(data))
        store.replace(commit.name, data)
        changed = replace(record, commits=(commit, *record.commits[1:]), finished=None, state="running")
        store.replace(record_name(record.revision), changed.to_bytes())


def test_a_checkpoint_that_would_run_code_runs_none(tmp_path: Path) -> None:
    train(replace(SETTINGS, epochs=1))
    before = newest_state("runs/run")
    configuration, sprung = trap(tmp_path)
    checkpoint = next(Path("runs/run/checkpoints").iterdir()).read_bytes()
    data = with_configuration(checkpoint, configuration, tmp_path / "trapped.keras")
    replace_newest_checkpoint("runs/run", data)

    keras.saving.load_model(tmp_path / "trapped.keras", safe_mode=False)
    assert sprung.exists(), "the trap works"
    sprung.unlink()

    train(replace(SETTINGS, epochs=2))
    assert not sprung.exists()
    whole = train(replace(SETTINGS, epochs=2, name="whole"))
    assert whole["steps"] == 14
    assert_same_state(newest_state("runs/run"), newest_state("runs/whole"))
    assert before.optimizer[0] == 7


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "another network"])
def test_what_is_no_checkpoint_of_this_network_is_a_value_error(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.keras"
    if content is None:
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
        model.save(path)
    else:
        path.write_bytes(content)
    identity = SETTINGS.identity(precision="float32", data_sha256="5" * 64)
    twin = keras_file.plain_twin(identity.network, identity.recipe, precision="float32", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as outside of tests, where they are no errors
        with pytest.raises((ValueError, OSError)):
            keras_file.load(twin, path)


def test_restoring_gives_the_arrays_of_the_file_bit_for_bit() -> None:
    train(replace(SETTINGS, epochs=1))
    with closing(open_store("runs/run")) as store:
        record = read_record(store)
        state = read_commit(store, record.commits[0], lambda path: keras_file.load(twin_of("runs/run"), path))
    opened = keras.saving.load_model("runs/run/model.keras")
    for mine, theirs in zip(state.weights, opened.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy())
    for mine, theirs in zip(state.optimizer, opened.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy())
