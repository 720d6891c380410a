"""What users, disks and networks do to a run: a clear error and its exit code, nothing lost, it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.domain.errors import Diverged, InvalidData, PermissionRefused, StorageFailed
from job.run.names import CONFIG, RECORD
from job.run.reader import read_record
from job.store.contract import Store
from tests.durability.conftest import Place
from tests.durability.outcome import Outcome, check_same_outcome
from tests.durability.verdicts import check_no_litter, check_readers_are_safe, digests
from tests.gcs_server import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DISK_BYTES = 8 << 20
AFTER_TWO_COMMITS = ("append", 4)  # the claim's revision is the first

# What strikes a run after its first requests, while it is written and while it is continued: the fault, the
# requests that it hits, and how.
Faults = list[tuple[str, str, dict[str, int]]]
FIRST_REQUESTS = 8  # a bucket that does not answer at the start is refused within seconds, by design
WRITING: Faults = [
    ("status", "any", {"status": 429, "times": 3, "skip": FIRST_REQUESTS}),
    ("reset", "chunk", {}),
    ("flip", "chunk", {"skip": 2}),
    ("lose", "chunk", {"skip": 2}),  # stored or not, the answer never comes
    ("reset", "upload", {}),  # of a segment, or of a revision, as the next two
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
    store.delete(name)
    if data is not None:
        store.create(name, data)


def newest(store: Store) -> str:
    """Name of the record's newest revision."""
    return max(entry.name for entry in store.list() if RECORD.fullmatch(entry.name))


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


def test_a_disk_filled_to_its_last_byte_is_read_without_any_room(
    disk: Path, place_in: Callable[[str], Place], reference: Outcome
) -> None:
    """Whatever is restored from there is staged in the spool, on another disk."""
    place = place_in(str(disk / "runs"))
    place.stopped_at(*AFTER_TWO_COMMITS).kill()
    whole, filler = digests(place.store), fill(disk)
    evaluation = place.nursery.start("evaluate", place.store.location, cwd=place.folder)
    assert evaluation.wait() == 0, evaluation.text
    assert "validation" in evaluation.text
    job = place.start()
    assert job.wait() == StorageFailed.exit_code, job.text
    assert re.search(r"No space left on device, 0 MB are free\. .* is intact\. Make room", job.text), job.text
    assert "Traceback" not in job.text
    assert digests(place.store) == whole
    filler.unlink()
    place.finish()
    check_same_outcome(place.store, reference)


def test_a_run_goes_on_where_no_checkpoint_fits_but_cannot_commit(
    disk: Path, place_in: Callable[[str], Place], reference: Outcome
) -> None:
    """Room for its claim is all that a restored run needs on a disk; its next commit says what is missing."""
    place = place_in(str(disk / "runs"))
    place.stopped_at("write", 3).kill()
    commits, filler = read_record(place.store).commits, fill(disk)
    os.truncate(filler, filler.stat().st_size - commits[0].size // 2)
    job = place.start()
    assert job.wait() == StorageFailed.exit_code, job.text
    assert "continuing from step 6" in job.text
    assert re.search(r"cannot write .*/checkpoints/.*: No space left on device", job.text), job.text
    assert read_record(place.store).commits == commits
    filler.unlink()
    place.finish()
    check_same_outcome(place.store, reference)


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
    assert "name another place" in job.text
    place.finish()
    check_same_outcome(place.store, reference)


def test_a_record_that_cannot_be_trusted(place: Place, reference: Outcome) -> None:
    place.stopped_at(*AFTER_TWO_COMMITS).kill()
    record = newest(place.store)
    whole = {name: place.store.read(name) for name in (CONFIG, record)}
    newer = json.dumps({**json.loads(whole[record]), "format": 3}).encode()
    for name, data, message in (
        (record, b"\0" * 100, "must be a JSON object with a format number"),
        (record, whole[record][:-100], "must be a JSON object with a format number"),
        (record, newer, "has format 3, but this version reads format 2"),
        (CONFIG, b"{}", "must be a JSON object with a format number"),
        (CONFIG, None, "has a record but no config.json"),
    ):
        put(place.store, name, data)
        before = digests(place.store)
        job = place.start()
        assert job.wait() == InvalidData.exit_code, job.text
        assert message in job.text
        assert digests(place.store) == before
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
    before = digests(place.store)
    job = place.start()
    assert job.wait() == InvalidData.exit_code, job.text
    assert "none of its 2 commits can be read" in job.text
    after = digests(place.store)
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
def test_a_divergence_waits_for_storage_five_seconds_at_most(place: Place, gcs_server: Gateway) -> None:
    """It could not say so in its record: a commit would have waited a minute."""
    job = place.stopped_at("called", 1, "--learning-rate", "1e20")
    before = gcs_server.injected["status"]
    fault = gcs_server.inject("status", "any", status=503, times=10_000)
    began = time.monotonic()
    try:
        job.send(signal.SIGCONT)
        assert job.wait() == Diverged.exit_code, job.text
    finally:
        fault.times = 0
    assert time.monotonic() - began < 30  # seconds: the steps before it, too, on a busy machine
    assert gcs_server.injected["status"] > before + 1
    assert read_record(place.store).state == "running"
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


def test_an_answer_that_was_lost_before_storage_is_back(
    place: Place, reference: Outcome, server: Gateway | None
) -> None:
    """The commit is stored and nobody says so: the next one finds it, and goes on behind it."""
    with place.losing_an_answer(server, eio=1) as job:
        job.send(signal.SIGCONT)
        job.wait_until_said("A commit failed")
    assert job.wait() == 0, job.text
    assert read_record(place.store).attempt == 1
    check_same_outcome(place.store, reference)
    check_no_litter(place.store)


def test_an_answer_that_was_lost_before_storage_stays_out(
    place: Place, reference: Outcome, server: Gateway | None
) -> None:
    with place.losing_an_answer(server) as job:
        job.send(signal.SIGCONT)
        assert job.wait() == StorageFailed.exit_code, job.text
    assert "a newer attempt" not in job.text
    assert read_record(place.store).commits[0].progress.step >= 6
    check_readers_are_safe(place.store)
    place.finish()
    check_same_outcome(place.store, reference)
    check_no_litter(place.store)


@contextlib.contextmanager
def storm(server: Gateway, faults: Faults) -> Iterator[None]:
    """Inject the faults, and see that each of them struck as often as it should."""
    injected = [server.inject(name, kind, **options) for name, kind, options in faults]
    yield
    assert [fault for fault in injected if fault.times > 0] == []
