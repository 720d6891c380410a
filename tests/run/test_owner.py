"""Claim, commit, restore and prune on a local disk, without TensorFlow: units, and random histories."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from job.domain.errors import Diverged, IdentityConflict, InvalidData, MissingInput, StorageFailed, Superseded
from job.domain.record import Progress
from job.publish.publication import MODEL, RESULT
from job.run import committer as committing
from job.run import owner
from job.run.committer import Committer
from job.run.names import CONFIG, RECORD, record_name
from job.run.owner import HeldRun, claim, find_record
from job.run.position import Position
from job.run.reader import read_config, read_record
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists
from job.store.local import LocalStore
from tests.durability.protocol import IDENTITY, KEEP, Killed, MortalStore, load, play, save
from tests.durability.verdicts import (
    check_commits_are_whole,
    check_newer_is_untouched,
    check_no_litter,
    digests,
    lasting,
    names_of,
)


@dataclass
class Owner:
    """A run that a test owns, and what commits to it."""

    run: HeldRun
    committer: Committer

    @classmethod
    def of(cls, store: Any, **options: Any) -> Owner:
        run = claim(store, IDENTITY, **{"settings": {"epochs": 2}, "take_over": True, **options})
        return cls(run, Committer(run, keep=KEEP, save=save, publish=lambda record: None))

    @property
    def steps(self) -> list[int]:
        return [commit.progress.step for commit in self.run.record.commits]

    def commit(self, step: int, digest: int | None = None, **position: Any) -> None:
        """Commit, and raise what it met."""
        at = Position(progress=Progress(step=step, epoch=len(position.get("history", ()))), **position)
        self.committer.submit(step if digest is None else digest, at)
        self.settle()

    def settle(self) -> None:
        in_flight, self.committer._in_flight = self.committer._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def close(self) -> None:
        self.committer.close()
        self.run.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with contextlib.closing(LocalStore(str(tmp_path / "run"))) as opened:
        yield opened


@pytest.fixture
def own(store: LocalStore) -> Iterator[Callable[..., Owner]]:
    """Claim the run as a new attempt; all are let go at the end."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Owner:
            owned = Owner.of(store, **options)
            stack.callback(owned.close)
            return owned

        yield start


def newest(store: LocalStore) -> Path:
    return store.root / max(name for name in names_of(store) if RECORD.fullmatch(name))


def damage(store: LocalStore, name: str) -> None:
    path = store.root / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


# -- claim -------------------------------------------------------------------------------------------------


def test_each_claim_is_a_higher_attempt_and_fences_the_one_before(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    first = own()
    first.commit(3)
    second = own()
    assert (first.run.record.attempt, second.run.record.attempt) == (1, 2)
    assert second.run.record.commits == first.run.record.commits
    before = lasting(store)
    with pytest.raises(Superseded, match="its attempt 2 began"):
        first.commit(6)
    assert first.run.superseded
    check_newer_is_untouched(before, digests(store), allowed=r"checkpoints/step-0000000006-a0001-.*")
    second.commit(6)
    assert second.steps == [6, 3]


def test_claims_stay_and_other_revisions_go(store: LocalStore, own: Callable[..., Owner]) -> None:
    first = own()
    for step in (3, 6, 9):
        first.commit(step)
    own().commit(12)
    # The claims, and the two newest of each attempt.
    kept = {1, 3, 4, 5, 6}
    assert {name for name in names_of(store) if RECORD.fullmatch(name)} == set(map(record_name, kept))


def test_a_claim_that_loses_a_race_sees_what_the_winner_did_and_claims_after_it(store: LocalStore) -> None:
    mortal = MortalStore(store)
    winners: list[Owner] = []

    def win(verb: str, name: str) -> None:
        if name.startswith("record-") and verb == "create" and not winners:
            winners.append(Owner.of(store))
            winners[0].commit(3)

    mortal.before = win
    owned = Owner.of(mortal)
    assert owned.run.record.attempt == 2
    assert owned.steps == [3]
    with pytest.raises(Superseded):
        winners[0].commit(6)
    for one in (owned, *winners):
        one.close()


def test_a_claim_under_a_name_that_the_owner_has_pruned_is_made_again(store: LocalStore) -> None:
    """It would hold a run of its own behind the owner's back, and take the owner's commits for litter."""
    first = Owner.of(store)
    first.commit(3)
    mortal = MortalStore(store)

    def freeze(verb: str, name: str) -> None:
        if verb == "create":
            mortal.before = lambda verb, name: None
            for step in (6, 9, 12):
                first.commit(step)
            assert name not in names_of(store), "the name is free again"

    mortal.before = freeze
    second = Owner.of(mortal)
    assert second.steps == [12, 9]
    second.run.remove_leftovers()
    check_commits_are_whole(store, read_record(store))
    with pytest.raises(Superseded):
        first.commit(15)
    for one in (first, second):
        one.close()


def test_a_claimer_that_was_frozen_after_its_claim_does_not_take_the_run_back(store: LocalStore) -> None:
    mortal = MortalStore(store)
    newer: list[Owner] = []

    def freeze(verb: str, name: str) -> None:
        if mortal.calls[-1:] == [f"create {record_name(1)}"]:
            mortal.before = lambda verb, name: None
            newer.append(Owner.of(store))

    mortal.before = freeze
    with pytest.raises(Superseded, match="its attempt 2 began"):
        Owner.of(mortal)
    newer[0].commit(3)
    newer[0].close()


def test_a_claim_that_loses_every_race_gives_up(store: LocalStore) -> None:
    mortal = MortalStore(store)
    winners: list[Owner] = []

    def win(verb: str, name: str) -> None:
        if verb == "create" and name.startswith("record-"):
            winners.append(Owner.of(store))

    mortal.before = win
    with pytest.raises(Superseded, match="again and again"):
        Owner.of(mortal)
    assert len(winners) == owner.CLAIM_TRIES
    for one in winners:
        one.close()


def test_another_identity_is_refused_before_anything_is_changed(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    own().commit(3)
    before = digests(store)
    with pytest.raises(IdentityConflict, match="seed: 0, not 1"):
        claim(store, replace(IDENTITY, seed=1), settings={})
    assert digests(store) == before


def test_of_two_identities_that_start_at_once_one_is_refused(store: LocalStore) -> None:
    mortal = MortalStore(store)

    def win(verb: str, name: str) -> None:
        mortal.before = lambda verb, name: None
        Owner.of(store).close()

    mortal.before = win
    with pytest.raises(IdentityConflict, match="seed: 0, not 1"):
        claim(mortal, replace(IDENTITY, seed=1), settings={})


def test_a_configuration_without_a_record_is_a_new_run(store: LocalStore, own: Callable[..., Owner]) -> None:
    with pytest.raises(Killed):
        Owner.of(MortalStore(store, die_after=1))
    assert names_of(store) == {CONFIG}
    assert find_record(store, IDENTITY) is None
    assert own().run.record.attempt == 1


def test_a_record_without_a_configuration_could_be_any_runs(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    own().commit(3)
    (store.root / CONFIG).unlink()
    before = digests(store)
    with pytest.raises(InvalidData, match=r"has a record but no config\.json"):
        own()
    assert digests(store) == before


def test_a_run_of_an_older_version_is_not_begun_anew(store: LocalStore) -> None:
    store.create("record.json", b"{}")
    before = digests(store)
    with pytest.raises(InvalidData, match=r"run of an older version \(record\.json\)"):
        claim(store, IDENTITY, settings={})
    assert digests(store) == before


@pytest.mark.parametrize("data", [b"{", b'{"format": 1}', b'{"format": 1, "identity": {"model": "resnet"}}'])
def test_a_configuration_of_garbage_is_refused(
    store: LocalStore, own: Callable[..., Owner], data: bytes
) -> None:
    own().commit(3)
    (store.root / CONFIG).write_bytes(data)
    with pytest.raises(InvalidData, match=r"config\.json"):
        own()


def test_a_configuration_of_no_network_is_garbage(store: LocalStore, own: Callable[..., Owner]) -> None:
    own()
    config = json.loads(store.read(CONFIG))
    store.replace(CONFIG, json.dumps(config | {"identity": config["identity"] | {"model": "moon"}}).encode())
    with pytest.raises(InvalidData, match=r"is not a run.s configuration: .*moon"):
        read_config(store)


def test_a_newer_format_is_refused_by_its_number_and_nothing_is_touched(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    own().commit(3)
    path = newest(store)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": 3}))
    before = digests(store)
    with pytest.raises(
        InvalidData, match=r"format 3, but this version reads format 2; use the version that wrote it"
    ):
        own()
    assert digests(store) == before


# -- the owner of this host --------------------------------------------------------------------------------


@pytest.fixture
def other(store: LocalStore) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run, and waits."""
    program = (
        "import sys, time\n"
        "from job.store.local import LocalStore\n"
        "from job.run.owner import claim\n"
        "from tests.durability.protocol import IDENTITY\n"
        "run = claim(LocalStore(sys.argv[1]), IDENTITY, settings={'epochs': 2})\n"
        "print('claimed', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, store.location]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_a_living_owner_is_named_and_only_superseded_if_that_is_wanted(
    store: LocalStore, other: subprocess.Popen[str], own: Callable[..., Owner]
) -> None:
    before = digests(store)
    with pytest.raises(Superseded, match=rf"process {other.pid} on this host.*--take-over"):
        own(take_over=False)
    assert digests(store) == before
    other.send_signal(signal.SIGSTOP)  # frozen is not dead
    with pytest.raises(Superseded, match=f"process {other.pid}"):
        own(take_over=False)
    assert own(take_over=True).run.record.attempt == 2


def test_a_dead_owner_is_no_owner_even_before_its_parent_asks(
    store: LocalStore, other: subprocess.Popen[str], own: Callable[..., Owner]
) -> None:
    os.kill(other.pid, signal.SIGKILL)
    while "Z" not in Path(f"/proc/{other.pid}/stat").read_text():  # not reaped yet
        pass
    assert own(take_over=False).run.record.attempt == 2


@pytest.mark.parametrize("change", ["another host", "another start", "garbage"])
def test_a_process_that_only_has_the_owners_number_is_not_the_owner(
    change: str, store: LocalStore, other: subprocess.Popen[str], own: Callable[..., Owner]
) -> None:
    record = read_record(store)
    boot, pid, _ = record.owners[-1].process.split("/")
    changed: dict[str, Any] = {
        "another host": {"host": "elsewhere"},
        "another start": {"process": f"{boot}/{pid}/1"},
        "garbage": {"process": "?"},
    }[change]
    owners = (replace(record.owners[-1], **changed),)
    store.replace(record_name(record.revision), replace(record, owners=owners).to_bytes())
    assert own(take_over=False).run.record.attempt == 2


# -- commit and prune --------------------------------------------------------------------------------------


def test_the_newest_commits_stay_and_the_dropped_one_is_deleted_afterwards(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    owned = own()
    for step in (3, 6, 9):
        owned.commit(step)
    assert owned.steps == [9, 6]
    check_no_litter(store)
    assert read_record(store) == owned.run.record


def test_a_commit_in_flight_is_waited_for_and_tells_what_it_met_at_the_next(
    own: Callable[..., Owner],
) -> None:
    owned = own()

    def fail(state: int, path: Path) -> None:
        raise Diverged("the weights are not finite")

    owned.committer._save = fail
    owned.committer.submit(3, Position(progress=Progress(step=3)))
    with pytest.raises(Diverged):
        owned.commit(6)
    assert owned.steps == []


def test_a_full_disk_under_the_checkpoint_is_a_failure_of_storage(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    owned = own()
    owned.commit(3)

    def fill(state: int, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    owned.committer._save = fill
    with pytest.raises(StorageFailed, match="No space left on device"):
        owned.commit(6)
    assert owned.steps == [3]
    assert list(store.scratch().iterdir()) == []


def test_a_name_that_is_taken_by_damaged_bytes_is_replaced_by_another(
    store: LocalStore, own: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    owned = own()
    inner, names = store.upload, []

    def upload(name: str, path: Path) -> None:
        names.append(name)
        if len(names) < committing.UPLOAD_TRIES:
            raise AlreadyExists(name)
        inner(name, path)

    monkeypatch.setattr(store, "upload", upload)
    owned.commit(3)
    assert len(set(names)) == committing.UPLOAD_TRIES
    assert owned.run.record.commits[0].name == names[-1]
    names[:] = []
    monkeypatch.setattr(committing, "UPLOAD_TRIES", 0)
    with pytest.raises(StorageFailed, match="arrived damaged"):
        owned.commit(6)


def test_a_checkpoint_whose_answer_was_lost_for_good_goes_with_the_next_commit(
    store: LocalStore, own: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record can name it, so it would stay until another attempt comes."""
    owned, inner = own(), store.upload

    def upload(name: str, path: Path) -> None:
        inner(name, path)
        raise StorageFailed("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(store, "upload", upload)
        with pytest.raises(StorageFailed, match="the answer was lost"):
            owned.commit(3)
    assert len(store.list("checkpoints/")) == 1
    owned.commit(6)
    assert [entry.name for entry in store.list("checkpoints/")] == [owned.run.record.commits[0].name]


def test_a_revision_whose_answer_was_lost_is_ours(
    store: LocalStore, own: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is linked, and the folder cannot be made durable any more: the disk says EIO, and heals."""
    owned = own()
    owned.commit(3)
    inner = store._names.make_durable
    faulty = [True]

    def make_durable(folder: Path, **like: Any) -> None:
        if folder == store.root and faulty:
            faulty.pop()
            raise OSError(errno.EIO, "Input/output error")
        inner(folder, **like)

    monkeypatch.setattr(store._names, "make_durable", make_durable)
    with pytest.raises(StorageFailed, match="Input/output error"):
        owned.commit(6)
    assert [commit.progress.step for commit in read_record(store).commits] == [6, 3], "it is stored"
    assert not owned.run.superseded
    owned.commit(9)
    assert owned.steps == [9, 6]
    check_no_litter(store)


def test_what_killed_attempts_left_is_deleted_but_nothing_of_ours_or_of_strangers(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    own().commit(3)
    for name in (
        "checkpoints/step-0000000006-a0001-0badcafe.keras",  # a killed attempt's
        "checkpoints/step-0000000006-a0002-0badcafe.keras",  # ours
        "checkpoints/step-0000000006-a0003-0badcafe.keras",  # a newer attempt's
        "checkpoints/notes.txt",
    ):
        store.create(name, b"?")
    owned = own()
    before = names_of(store)
    owned.run.remove_leftovers()
    assert before - names_of(store) == {"checkpoints/step-0000000006-a0001-0badcafe.keras"}


def test_a_delete_or_a_listing_that_fails_costs_space_and_never_the_run(
    store: LocalStore,
    own: Callable[..., Owner],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owned = own()
    monkeypatch.setattr(owner.log, "propagate", True)

    def fail(*_: Any) -> Any:
        raise StorageFailed("the disk is on strike")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", fail)
        for step in (3, 6, 9):
            owned.commit(step)
        patch.setattr(store, "list", fail)
        owned.run.remove_leftovers()
    assert owned.steps == [9, 6]
    assert "what is not needed any more stays: the disk is on strike" in caplog.text
    owned.commit(12)  # and later it goes
    check_no_litter(store)


def test_a_folder_that_was_renamed_is_said_to_be_gone(store: LocalStore, own: Callable[..., Owner]) -> None:
    owned = own()
    owned.commit(3)
    store.root.rename(store.root.with_name("elsewhere"))
    with pytest.raises(MissingInput, match="was moved or deleted"):
        owned.commit(6)
    assert not store.root.exists()
    assert not owned.run.superseded


def test_the_fence_is_seen_without_a_commit_too(
    own: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "FENCE_POLL_SECONDS", 0.01)
    first = own()
    first.commit(3)
    assert not first.run._superseded.wait(0.2)
    own()
    assert first.run._superseded.wait(30)
    assert first.run.superseded


# -- restore -----------------------------------------------------------------------------------------------


def test_a_run_without_commits_restores_nothing(own: Callable[..., Owner]) -> None:
    assert own().run.restore(load) is None


@pytest.mark.parametrize("fault", ["damaged", "missing", "unreadable"])
def test_the_commit_before_is_restored_with_a_warning_and_the_bad_one_is_dropped(
    store: LocalStore,
    own: Callable[..., Owner],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(owner.log, "propagate", True)
    first = own()
    first.commit(3, 30)
    first.commit(6, 60, history=({"epoch": 1, "step": 4},), confusion=[[1]])
    bad = first.run.record.commits[0].name
    if fault == "damaged":
        damage(store, bad)
    elif fault == "missing":
        (store.root / bad).unlink()
    owned = own()

    def read(path: Path) -> int:
        if fault == "unreadable" and load(path) == 60:
            raise ValueError("not a Keras file")
        return load(path)

    restored = owned.run.restore(read)
    assert restored
    assert (restored[0], restored[1].progress) == (30, Progress(step=3))
    assert f"{bad}: " in caplog.text
    assert "trying the commit before it" in caplog.text
    assert "1 epochs are trained again" in caplog.text
    assert (owned.run.record.history, owned.run.record.confusion) == ((), None)
    owned.commit(6, 60)
    assert owned.steps == [6, 3]
    assert bad not in names_of(store)
    check_commits_are_whole(store, read_record(store))


def test_commits_that_are_all_bad_end_the_attempt_and_nothing_is_deleted(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    first = own()
    for step in (3, 6):
        first.commit(step)
    for commit in first.run.record.commits:
        damage(store, commit.name)
    owned = own()
    before = digests(store)
    with pytest.raises(InvalidData, match=r"none of its 2 commits can be read.*nothing was deleted"):
        owned.run.restore(load)
    owned.run.remove_leftovers()
    assert digests(store) == before


def test_who_is_fenced_while_it_restores_says_so(store: LocalStore, own: Callable[..., Owner]) -> None:
    own().commit(3)
    older, newer = own(), own()
    for step in (6, 9):
        newer.commit(step)
    with pytest.raises(Superseded):
        older.run.restore(load)


def test_a_finished_result_is_the_last_resort_and_stays(store: LocalStore, own: Callable[..., Owner]) -> None:
    play(store, epochs=1)
    owned = own()
    for step in (7, 8):
        owned.commit(step, history=owned.run.record.history)
    finished = read_record(store).finished
    assert finished
    assert finished.commit
    assert finished.epochs == 1
    assert owned.steps == [8, 7]
    check_commits_are_whole(store, read_record(store))
    for commit in owned.run.record.commits:
        damage(store, commit.name)
    third = own()
    restored = third.run.restore(load)
    assert restored
    assert restored[1] == finished.commit
    assert third.run.record.finished == finished
    assert {MODEL, RESULT} <= names_of(store)


def test_a_record_that_leads_out_of_the_run_is_not_followed(
    store: LocalStore, own: Callable[..., Owner]
) -> None:
    owned = own()
    owned.commit(3)
    path = newest(store)
    path.write_text(path.read_text().replace(owned.run.record.commits[0].name, "../../etc/passwd"))
    with pytest.raises(InvalidData, match="none of its 1 commits can be read"):
        own().run.restore(load)


def test_the_record_is_read_while_its_owner_replaces_it(
    store: LocalStore, own: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the reading the revision is pruned, twice."""
    owned = own()
    owned.commit(3)
    inner, steps = store.read, iter((6, 9, 12, 15))

    def read(name: str) -> bytes:
        if RECORD.fullmatch(name):
            for step in (next(steps, None), next(steps, None)):
                if step:
                    owned.commit(step)
        return inner(name)

    monkeypatch.setattr(store, "read", read)
    assert read_record(store).commits[0].progress.step == 15


# -- random histories --------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A process of the model, and what it would know."""

    owned: Owner
    store: MortalStore
    digests: list[int]  # of the commits that it has, newest first
    alive: bool = True


@dataclass
class Model:
    """What a run must be, in a few lines."""

    digests: list[int] = field(default_factory=list)  # of the named commits, newest first
    damaged: set[int] = field(default_factory=set)
    claims: int = 0
    owner: Attempt | None = None


class Histories(RuleBasedStateMachine):
    """Claims, commits, crashes, restores and prunes of several hosts' attempts, in any order, interleaved."""

    attempts: Bundle[Attempt] = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.location = os.path.join(self.folder.name, "run")
        self.store = LocalStore(self.location)
        self.model = Model()
        self.owned: list[Owner] = []
        self.digest = 0

    def teardown(self) -> None:
        for owned in self.owned:
            owned.close()
        self.store.close()
        self.folder.cleanup()

    def new_claim(self) -> Attempt:
        store = MortalStore(LocalStore(self.location))  # another host's: it knows nothing of the others
        attempt = Attempt(Owner.of(store), store, list(self.model.digests))
        self.owned.append(attempt.owned)
        self.model.claims += 1
        self.model.owner = attempt
        assert attempt.owned.run.record.attempt == self.model.claims
        return attempt

    @rule(target=attempts)
    def claim(self) -> Attempt:
        return self.new_claim()

    @rule(attempt=attempts)
    def restore(self, attempt: Attempt) -> None:
        if not attempt.alive:
            return
        good = [digest for digest in attempt.digests if digest not in self.model.damaged]
        is_owner = attempt is self.model.owner
        try:
            restored = attempt.owned.run.restore(load)
        except (InvalidData, Superseded) as error:
            attempt.alive = False
            if isinstance(error, Superseded) == is_owner or (good and is_owner):
                raise
            return
        if not is_owner:
            return
        if not good:
            assert restored is None
            return
        assert restored
        assert (restored[0], restored[1].progress.step) == (good[0], good[0])
        attempt.digests = attempt.digests[attempt.digests.index(good[0]) :]
        self.model.digests = list(attempt.digests)

    @rule(
        attempt=attempts,
        rival=st.sampled_from(["none", "claims", "claims and commits"]),
        answer=st.sampled_from(["given", "lost", "lost before an outage"]),
    )
    def commit(self, attempt: Attempt, rival: str, answer: str) -> None:
        """With a rival, another attempt comes between the upload and the revision."""
        if not attempt.alive:
            return
        self.digest += 1
        digest, before = self.digest, lasting(self.store)

        def interfere(verb: str, name: str) -> None:
            if verb == "create" and rival != "none":
                attempt.store.before = lambda verb, name: None
                newer = self.new_claim()
                if rival == "claims and commits":
                    self.finish_commit(newer, self.digest + 1)
                before.clear()
                before.update(lasting(self.store))

        attempt.store.before = interfere
        try:
            if attempt is self.model.owner and rival == "none":
                if answer != "given":
                    self.lose_an_answer(attempt, outage=answer != "lost")
                self.finish_commit(attempt, self.digest)
            else:
                with pytest.raises(Superseded):
                    attempt.owned.commit(digest)
                check_newer_is_untouched(before, digests(self.store), allowed=r"checkpoints/.*")
                attempt.alive = False
        finally:
            attempt.store.before = lambda verb, name: None

    def lose_an_answer(self, attempt: Attempt, *, outage: bool) -> None:
        """A commit is stored and not answered; then, maybe, the store answers nothing for a while."""
        digest = self.digest
        attempt.store.lose_the_answer_of_a_revision()
        with pytest.raises(StorageFailed):
            attempt.owned.commit(digest)
        self.model.digests = [digest, *attempt.digests][:KEEP]
        attempt.digests = list(self.model.digests)
        self.the_record_names_what_the_model_says()
        self.digest += 1

        def refuse(verb: str, name: str) -> None:
            raise StorageFailed("the store is out")

        if outage:
            attempt.store.before = refuse
            with pytest.raises(StorageFailed):
                attempt.owned.commit(self.digest)
            attempt.store.before = lambda verb, name: None
            self.digest += 1

    def finish_commit(self, attempt: Attempt, digest: int) -> None:
        self.digest = digest
        attempt.owned.commit(digest)
        attempt.digests = [digest, *attempt.digests][:KEEP]
        self.model.digests = list(attempt.digests)

    @rule(attempt=attempts)
    def prune(self, attempt: Attempt) -> None:
        if not attempt.alive:
            return
        named = {commit.name for commit in read_record(self.store).commits}
        before = names_of(self.store)
        attempt.owned.run.remove_leftovers()
        after = names_of(self.store)
        assert named & before <= after
        mine = attempt.owned.run.record.attempt
        gone = {name for name in before - after if not RECORD.fullmatch(name)}
        assert all(int(name.split("-a")[1][:4]) <= mine for name in gone)
        if attempt is self.model.owner:
            litter = {name for name in after if name.startswith("checkpoints/")} - named
            assert all(int(name.split("-a")[1][:4]) >= mine for name in litter)

    @rule(attempt=attempts, changes=st.integers(0, 4))
    def crash_in_a_commit(self, attempt: Attempt, changes: int) -> None:
        """Die after 0: nothing, 1: the upload, 2: the revision, 3 and 4: a delete."""
        if not attempt.alive:
            return
        attempt.alive = False
        attempt.store.die_after(changes)
        self.digest += 1
        with contextlib.suppress(Killed, Superseded):
            attempt.owned.commit(self.digest)
        if attempt is self.model.owner and changes >= 2:
            self.model.digests = [self.digest, *attempt.digests][:KEEP]

    @precondition(
        lambda self: len(self.model.digests) > 1 and self.model.digests[0] not in self.model.damaged
    )
    @rule(missing=st.booleans())
    def lose_the_newest_checkpoint(self, missing: bool) -> None:
        name = read_record(self.store).commits[0].name
        if missing:
            (self.store.root / name).unlink()
        else:
            damage(self.store, name)
        self.model.damaged.add(self.model.digests[0])

    @invariant()
    def the_record_names_what_the_model_says(self) -> None:
        if not self.model.claims:
            return
        record = read_record(self.store)
        assert record.attempt == self.model.claims
        assert [commit.progress.step for commit in record.commits] == self.model.digests
        whole = [commit for commit in record.commits if commit.progress.step not in self.model.damaged]
        check_commits_are_whole(self.store, replace(record, commits=tuple(whole)))
        for commit in whole:
            assert load(self.store.root / commit.name) == commit.progress.step
            assert crc32c(self.store.root / commit.name) == commit.crc32c


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
