"""What users, disks and networks do to a run: a clear error and its exit code, nothing lost, it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.checkpoints import CONFIG, RECORD, read_record
from job.errors import Diverged, InvalidData, PermissionRefused, StorageFailed
from job.storage import Store
from tests.durability.conftest import Place
from tests.durability.outcome import Outcome, check_same_outcome
from tests.durability.verdicts import check_no_litter, check_readers_are_safe, versions
from tests.gcs_server import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DISK_BYTES = 8 << 20
AFTER_TWO_COMMITS = ("swap", 4)  # the claim's swap is the first

# What strikes a run after its first requests, while it is written and while it is continued: the fault, the
# requests that it hits, and how.
Faults = list[tuple[str, str, dict[str, int]]]
FIRST_REQUESTS = 8  # a bucket that does not answer at the start is refused within seconds, by design
WRITING: Faults = [
    ("status", "any", {"status": 429, "times": 3, "skip": FIRST_REQUESTS}),
    ("reset", "chunk", {}),
    ("flip", "chunk", {"skip": 2}),
    ("lose", "chunk", {"skip": 2}),  # stored or not, the answer never comes
    ("reset", "upload", {}),  # of a segment, or of the record's swap, as the next two
    ("lose", "upload", {"times": 3}),
    ("flip", "upload", {}),
]
CONTINUING: Faults = [
    ("status", "any", {"status": 503, "times": 3, "skip": FIRST_REQUESTS}),
    ("truncate", "download", {}),
    ("flip_answer", "download", {}),
    ("stall", "download", {}),
    ("reset", "list", {}),
    ("lose", "delete", {}),
    ("lose", "rewrite", {}),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Write until nothing more fits."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
    assert os.statvfs(disk).f_bavail == 0
    return filler


def put(store: Store, name: str, data: bytes | None) -> None:
    """Replace an object behind everybody's back, or remove it."""
    store.delete(name, versions(store)[name])
    if data is not None:
        store.create(name, data)


@pytest.mark.parametrize("point", ["write", "half written"])
def test_a_full_disk(point: str, disk: Path, place_in: Callable[[str], Place], reference: Outcome) -> None:
    place = place_in(str(disk / "runs"))
    job = place.stopped_at(point, 3)
    filler = fill(disk)
    job.send(signal.SIGCONT)
    assert job.wait() == StorageFailed.exit_code, job.text
    assert "No space left on device" in job.text
    assert "Make room" in job.text
    assert "Traceback" not in job.text
    assert read_record(place.store).commits[0].progress.step == 6
    again = place.start()
    assert again.wait() == StorageFailed.exit_code, again.text
    filler.unlink()
    check_readers_are_safe(place.store)
    place.finish()
    check_same_outcome(place.store, reference)
    check_no_litter(place.store)


def test_an_output_that_became_read_only(
    disk: Path, place_in: Callable[[str], Place], reference: Outcome
) -> None:
    place = place_in(str(disk / "runs"))
    place.stopped_at(*AFTER_TWO_COMMITS).kill()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    job = place.start()
    code = job.wait()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert code == PermissionRefused.exit_code, job.text
    assert "Read-only file system" in job.text
    assert "another --output" in job.text
    place.finish()
    check_same_outcome(place.store, reference)


def test_a_record_that_cannot_be_trusted(place: Place, reference: Outcome) -> None:
    place.stopped_at(*AFTER_TWO_COMMITS).kill()
    whole = {name: place.store.read(name)[0] for name in (CONFIG, RECORD)}
    newer = json.dumps({**json.loads(whole[RECORD]), "format": 2}).encode()
    for name, data, message in (
        (RECORD, b"\0" * 100, "must be a JSON object with a format number"),
        (RECORD, whole[RECORD][:-100], "must be a JSON object with a format number"),
        (RECORD, newer, "has format 2, but this version reads format 1"),
        (CONFIG, b"{}", "must be a JSON object with a format number"),
        (CONFIG, None, "has a record.json but no config.json"),
    ):
        put(place.store, name, data)
        before = versions(place.store)
        job = place.start()
        assert job.wait() == InvalidData.exit_code, job.text
        assert message in job.text
        assert versions(place.store) == before
        if data is None:
            place.store.create(name, whole[name])
        else:
            put(place.store, name, whole[name])
    place.finish()
    check_same_outcome(place.store, reference)


@pytest.mark.parametrize("fault", ["garbage", "missing"])
def test_a_newest_checkpoint_that_is(fault: str, place: Place, reference: Outcome) -> None:
    place.stopped_at(*AFTER_TWO_COMMITS).kill()
    name = read_record(place.store).commits[0].name
    put(place.store, name, b"garbage" if fault == "garbage" else None)
    job = place.finish()
    assert "trying the commit before it" in job.text
    assert "continuing from step 3" in job.text
    check_same_outcome(place.store, reference)
    check_no_litter(place.store)


@pytest.mark.parametrize("place", ["local"], indirect=True)
def test_checkpoints_that_are_all_garbage(place: Place) -> None:
    place.stopped_at(*AFTER_TWO_COMMITS).kill()
    for commit in read_record(place.store).commits:
        put(place.store, commit.name, b"garbage")
    before = versions(place.store)
    before.pop(RECORD)  # it was claimed
    job = place.start()
    assert job.wait() == InvalidData.exit_code, job.text
    assert "none of its 2 commits can be read" in job.text
    after = versions(place.store)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("place", ["local"], indirect=True)
def test_a_rate_that_is_far_too_high(place: Place) -> None:
    job = place.start("--learning-rate", "1e20", "--commit-every", "1steps")
    assert job.wait() == Diverged.exit_code, job.text
    record = read_record(place.store)
    assert record.state == "diverged"
    kept = f"step {record.commits[0].progress.step}" if record.commits else "nothing"
    assert f"not a finite number; {kept} is committed" in job.text
    assert "try a smaller --learning-rate" in job.text
    check_readers_are_safe(place.store)


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_a_hostile_network(place: Place, reference: Outcome, gcs_server: Gateway) -> None:
    with storm(gcs_server, WRITING):
        place.stopped_at(*AFTER_TWO_COMMITS).kill()
    with storm(gcs_server, CONTINUING + WRITING[1:]):
        job = place.start(point="none")  # the driver sends in small chunks
        assert job.wait() == 0, job.text
    check_same_outcome(place.store, reference)
    check_no_litter(place.store)


@contextlib.contextmanager
def storm(server: Gateway, faults: Faults) -> Iterator[None]:
    """Inject the faults, and see that each of them struck as often as it should."""
    injected = [server.inject(name, kind, **options) for name, kind, options in faults]
    yield
    assert [fault for fault in injected if fault.times > 0] == []
