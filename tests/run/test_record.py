"""A record is read back as it was written, and garbage is no record."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from job.domain.account import Spent
from job.domain.errors import InvalidData
from job.domain.record import Commit, Finished, Owner, Progress, Record, Timing

COMMIT = Commit(
    name="checkpoints/x",
    size=1,
    crc32c=2,
    progress=Progress(step=391, epoch=1, batch=1, loss_sum=0.1 + 0.2, loss_scale=1024.0, finite_steps=7),
    timing=Timing(epoch=1.5, total=2.5, timed_images=3, timed=0.5, trained=1.25, evaluated=0.25),
)
RECORD = Record(
    attempt=3,
    nonce="9f",
    revision=8,
    written=12.5,
    epochs=20,
    commits=(COMMIT,),
    history=({"epoch": 1, "step": 390, "train": {"loss": 1 / 3}},),
    confusion=[[1, 2], [3, 4]],
    finished=Finished(epochs=1, result={"epochs": 1}, commit=COMMIT),
    owners=(
        Owner(
            attempt=1,
            began=1.0,
            host="here",
            process="b/1/2",
            version="0.1",
            revision=None,
            spent=Spent(began=0.5, starting=2.0, training=1.5, evaluation=0.5, due=10.0),
        ),
    ),
)


def test_a_record_is_read_back_as_it_was_written() -> None:
    assert Record.from_bytes(RECORD.to_bytes(), "here") == RECORD
    assert Record.from_bytes(Record().to_bytes(), "here") == Record()


def test_a_record_of_an_earlier_version_has_no_account() -> None:
    values = json.loads(RECORD.to_bytes())
    del values["owners"][0]["spent"]
    for commit in (values["commits"][0], values["finished"]["commit"]):
        del commit["timing"]["trained"], commit["timing"]["evaluated"]
    earlier = Record.from_bytes(json.dumps(values).encode(), "here")
    assert earlier.owners[0].spent is None
    assert earlier.commits[0].timing.total == 2.5
    assert earlier.account() is None


def test_an_account_is_made_of_all_attempts_that_noted_their_time() -> None:
    owners = (replace(RECORD.owners[0], spent=None), RECORD.owners[0])
    account = replace(RECORD, owners=owners).account()
    assert account is not None
    assert (account["attempts"], account["wall_seconds"], account["goodput"]) == (1, 4.0, 1.5 / 4.0)
    assert account["lost_seconds"] == 0.25 + 0.25  # noted, and in no commit


def test_what_can_be_restored_is_named_once_and_the_finished_commit_last() -> None:
    other = Commit(name="checkpoints/y", size=1, crc32c=2, progress=Progress(step=400), timing=Timing())
    assert RECORD.restorable == (COMMIT,)
    longer = Record(commits=(other,), finished=RECORD.finished)
    assert longer.restorable == (other, COMMIT)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"[]", b"null", b'"format"', b"{}", b'{"format": 2}', b"[" * 100_000],
    ids=["empty", "no text", "a list", "null", "a word", "no format", "format alone", "deep"],
)
def test_garbage_is_no_record(data: bytes) -> None:
    with pytest.raises(InvalidData, match=r"here .*choose another --name"):
        Record.from_bytes(data, "here")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["attempt"], "3", "attempt"),
        (["attempt"], True, "attempt"),
        (["nonce"], 1, "nonce"),
        (["revision"], None, "revision"),
        (["written"], "now", "written"),
        (["state"], "asleep", "state"),
        (["epochs"], 1.5, "epochs"),
        (["commits"], 3, "commits"),
        (["commits"], ["x"], r"commits\[0\]"),
        (["commits"], {"a": 1}, "commits"),
        (["history"], 3, "history"),
        (["history"], ["x"], "history"),
        (["confusion"], "x", "confusion"),
        (["confusion"], [["x"]], "confusion"),
        (["surprise"], 1, "surprise"),
        (["commits", 0, "name"], 1, "name"),
        (["commits", 0, "size"], "1", "size"),
        (["commits", 0, "progress"], None, "progress"),
        (["commits", 0, "progress", "step"], "1", "step"),
        (["commits", 0, "progress", "loss_sum"], None, "loss_sum"),
        (["commits", 0, "timing", "total"], [], "total"),
        (["finished", "epochs"], "1", "epochs"),
        (["finished", "result"], [], "result"),
        (["finished", "commit", "crc32c"], "1", "crc32c"),
        (["owners"], None, "owners"),
        (["owners", 0, "host"], 1, "host"),
        (["owners", 0, "revision"], 1, "revision"),
        (["owners", 0, "spent", "training"], "1", "training"),
        (["owners", 0, "spent", "ended"], 1, "ended"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_value_of_another_type_is_refused_by_its_name(path: list[Any], value: Any, named: str) -> None:
    values = json.loads(RECORD.to_bytes())
    *parents, last = path
    inner = values
    for key in parents:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(InvalidData, match=rf"here is not a run's record: .*{named}"):
        Record.from_bytes(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("missing", ["attempt", "commits", "history", "finished", "owners"])
def test_a_field_that_is_missing_is_refused_by_its_name(missing: str) -> None:
    values = json.loads(RECORD.to_bytes())
    del values[missing]
    with pytest.raises(InvalidData, match=rf"here is not a run's record: .*{missing}"):
        Record.from_bytes(json.dumps(values).encode(), "here")


def test_another_format_is_refused_by_its_number() -> None:
    data = json.dumps(json.loads(RECORD.to_bytes()) | {"format": 3}).encode()
    with pytest.raises(InvalidData, match="format 3, but this version reads format 2; use the version"):
        Record.from_bytes(data, "here")
