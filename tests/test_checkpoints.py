"""The checkpoint protocol on a local disk, without TensorFlow: units, and random histories of attempts."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from job import checkpoints
from job.checkpoints import (
    CONFIG,
    MODEL,
    RECORD,
    RESULT,
    Claim,
    Commit,
    Follower,
    Progress,
    Record,
    Run,
    read_config,
    read_record,
)
from job.errors import Diverged, IdentityConflict, InvalidData, MissingInput, StorageFailed, Superseded
from job.storage import AlreadyExists, LocalStore, crc32c
from tests.durability.protocol import (
    IDENTITY,
    KEEP,
    Killed,
    MortalStore,
    payload,
    play,
    read_payload,
)
from tests.durability.verdicts import (
    check_commits_are_whole,
    check_newer_is_untouched,
    check_no_litter,
    content,
    versions,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with contextlib.closing(LocalStore(str(tmp_path / "run"))) as opened:
        yield opened


@pytest.fixture
def claim(store: LocalStore) -> Iterator[Callable[[], Run]]:
    """Claim the run as a new attempt; all are let go at the end."""
    with contextlib.ExitStack() as stack:

        def start() -> Run:
            run = Claim(store, IDENTITY, settings={"epochs": 2}).claim(keep=KEEP)
            stack.callback(run.close)
            return run

        yield start


def commit(run: Run, step: int, digest: int | None = None, **changes: Any) -> None:
    run.commit(
        payload(step if digest is None else digest), Progress(step=step), after=lambda: None, **changes
    )
    run.wait()


def steps(run: Run) -> list[int]:
    return [entry.progress.step for entry in run.record.commits]


def damage(store: LocalStore, name: str) -> None:
    path = store.root / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


# -- records -----------------------------------------------------------------------------------------------


def test_a_record_is_read_back_as_it_was_written() -> None:
    progress = Progress(step=391, epoch=1, batch=1, loss_sum=0.1 + 0.2, loss_scale=(1024.0, 7))
    entry = {"epoch": 0, "step": 390, "train": {"loss": 1 / 3}}
    record = Record(
        attempt=3,
        nonce="9f",
        revision=8,
        epochs=20,
        commits=(Commit(name="checkpoints/x", size=1, crc32c=2, progress=progress),),
        history=(entry,),
        confusion=[[1, 2], [3, 4]],
        result={"epochs": 1},
    )
    assert Record.from_bytes(record.to_bytes(), "here") == record


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"format"',
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "commits": 3, "history": []}',
        b'{"format": 1, "commits": [{"name": "x"}], "history": []}',
        b'{"format": 1, "commits": [{"progress": {"loss_scale": 1}}], "history": []}',
        b'{"format": 1, "commits": ["x"], "history": []}',
        b'{"format": 1, "commits": [], "history": [], "surprise": 1}',
    ],
)
def test_garbage_is_no_record(data: bytes) -> None:
    with pytest.raises(InvalidData, match=r"here .*choose another --name"):
        Record.from_bytes(data, "here")


def test_a_newer_format_is_refused_by_its_number_and_nothing_is_touched(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    commit(claim(), 3)
    newer = json.loads((store.root / RECORD).read_bytes()) | {"format": 2}
    (store.root / RECORD).write_text(json.dumps(newer))
    before = versions(store)
    with pytest.raises(
        InvalidData, match=r"format 2, but this version reads format 1; use the version that wrote it"
    ):
        claim()
    assert versions(store) == before


# -- claim -------------------------------------------------------------------------------------------------


def test_each_claim_is_a_higher_attempt_and_fences_the_one_before(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    first = claim()
    commit(first, 3)
    second = claim()
    assert (first.record.attempt, second.record.attempt) == (1, 2)
    assert second.record.commits == first.record.commits
    before = versions(store)
    with pytest.raises(Superseded):
        commit(first, 6)
    assert first.superseded
    check_newer_is_untouched(before, versions(store), allowed=r"checkpoints/step-0000000006-a0001-.*")
    commit(second, 6)
    assert steps(second) == [6, 3]


def test_a_claim_that_loses_a_race_sees_what_the_winner_did_and_claims_after_it(store: LocalStore) -> None:
    store.check()
    mortal = MortalStore(store)
    winners: list[Run] = []

    def win(verb: str, name: str) -> None:
        if verb == "swap" and not winners:
            winners.append(Claim(store, IDENTITY).claim(keep=KEEP))
            commit(winners[0], 3)

    mortal.before = win
    run = Claim(mortal, IDENTITY).claim(keep=KEEP)
    assert run.record.attempt == 2
    assert steps(run) == [3]
    with pytest.raises(Superseded):
        commit(winners[0], 6)
    for one in (run, *winners):
        one.close()


def test_a_claim_that_loses_every_race_gives_up(store: LocalStore) -> None:
    mortal = MortalStore(store)
    winners: list[Run] = []

    def win(verb: str, name: str) -> None:
        if verb == "swap":
            winners.append(Claim(store, IDENTITY).claim(keep=KEEP))

    mortal.before = win
    with pytest.raises(Superseded):
        Claim(mortal, IDENTITY).claim(keep=KEEP)
    assert len(winners) == checkpoints.CLAIM_TRIES
    for one in winners:
        one.close()


def test_another_identity_is_refused_before_anything_is_changed(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    commit(claim(), 3)
    before = versions(store)
    with pytest.raises(IdentityConflict, match="seed: 0, not 1"):
        Claim(store, replace(IDENTITY, seed=1)).claim(keep=KEEP)
    assert versions(store) == before


def test_of_two_identities_that_start_at_once_one_is_refused(store: LocalStore) -> None:
    mortal = MortalStore(store)

    def win(verb: str, name: str) -> None:
        mortal.before = lambda verb, name: None
        Claim(store, IDENTITY).claim(keep=KEEP).close()

    mortal.before = win
    with pytest.raises(IdentityConflict, match="seed: 0, not 1"):
        Claim(mortal, replace(IDENTITY, seed=1)).claim(keep=KEEP)


def test_a_configuration_without_a_record_is_a_new_run(store: LocalStore, claim: Callable[[], Run]) -> None:
    Claim(store, IDENTITY)._create_config()
    assert Claim(store, IDENTITY).look() is None
    assert claim().record.attempt == 1


def test_a_record_without_a_configuration_could_be_any_runs(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    commit(claim(), 3)
    (store.root / CONFIG).unlink()
    before = versions(store)
    with pytest.raises(InvalidData, match=r"has a record\.json but no config\.json"):
        claim()
    assert versions(store) == before


@pytest.mark.parametrize("data", [b"{", b'{"format": 1}', b'{"format": 1, "identity": {"model": "resnet"}}'])
def test_a_configuration_of_garbage_is_refused(
    store: LocalStore, claim: Callable[[], Run], data: bytes
) -> None:
    commit(claim(), 3)
    (store.root / CONFIG).write_bytes(data)
    with pytest.raises(InvalidData, match=r"config\.json"):
        claim()


# -- commit and prune --------------------------------------------------------------------------------------


def test_the_newest_commits_stay_and_the_dropped_one_is_deleted_after_the_swap(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    run = claim()
    for step in (3, 6, 9):
        commit(run, step)
    assert steps(run) == [9, 6]
    check_no_litter(store)
    assert read_record(store) == run.record


def test_a_commit_in_flight_is_waited_for_and_tells_what_it_met_at_the_next(
    claim: Callable[[], Run],
) -> None:
    run = claim()

    def fail(path: Path) -> None:
        raise Diverged("the weights are not finite")

    run.commit(fail, Progress(step=3), after=lambda: None)
    with pytest.raises(Diverged):
        commit(run, 6)
    run.wait()
    assert steps(run) == []


def test_a_full_disk_under_the_checkpoint_is_a_failure_of_storage(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    run = claim()
    commit(run, 3)

    def fill(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run.commit(fill, Progress(step=6), after=lambda: None)
    with pytest.raises(StorageFailed, match="No space left on device"):
        run.wait()
    assert steps(run) == [3]
    assert not [path for path in store.staging().iterdir() if "step" in path.name]


def test_a_name_that_is_taken_by_damaged_bytes_is_replaced_by_another(
    store: LocalStore, claim: Callable[[], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = claim()
    inner, names = store.upload, []

    def upload(name: str, path: Path) -> Any:
        names.append(name)
        if len(names) < checkpoints.UPLOAD_TRIES:
            raise AlreadyExists(name)
        return inner(name, path)

    monkeypatch.setattr(store, "upload", upload)
    commit(run, 3)
    assert len(set(names)) == checkpoints.UPLOAD_TRIES
    assert run.record.commits[0].name == names[-1]
    names[:] = []
    monkeypatch.setattr(checkpoints, "UPLOAD_TRIES", 0)
    with pytest.raises(StorageFailed, match="arrived damaged"):
        commit(run, 6)


def test_what_killed_attempts_left_is_deleted_after_the_claim_but_nothing_of_ours_or_of_strangers(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    commit(claim(), 3)
    for name in (
        "checkpoints/step-0000000006-a0001-0badcafe.keras",  # a killed attempt's
        "checkpoints/step-0000000006-a0002-0badcafe.keras",  # ours
        "checkpoints/step-0000000006-a0003-0badcafe.keras",  # a newer attempt's
        "checkpoints/notes.txt",
    ):
        store.create(name, b"?")
    run = claim()
    before = versions(store)
    run.prune_lower_attempts()
    assert before.keys() - versions(store).keys() == {"checkpoints/step-0000000006-a0001-0badcafe.keras"}


def test_a_delete_or_a_listing_that_fails_costs_space_and_never_the_run(
    store: LocalStore,
    claim: Callable[[], Run],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = claim()
    monkeypatch.setattr(checkpoints.log, "propagate", True)

    def fail(*_: Any) -> Any:
        raise StorageFailed("the disk is on strike")

    monkeypatch.setattr(store, "delete", fail)
    for step in (3, 6, 9):
        commit(run, step)
    monkeypatch.setattr(store, "list", fail)
    run.prune_lower_attempts()
    assert steps(run) == [9, 6]
    assert caplog.text.count("an old checkpoint stays: the disk is on strike") == 2


def test_the_result_before_the_claim_is_withdrawn_and_a_newer_attempts_is_not(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    play(store)
    lingering = claim()  # to train more epochs; it is frozen here
    newer = claim()
    newer.withdraw({MODEL, RESULT})
    assert not {MODEL, RESULT} & versions(store).keys()
    commit(newer, 12)
    store.copy(newer.record.commits[0].name, MODEL)
    store.create(RESULT, b"{}")
    before = versions(store)
    lingering.withdraw({MODEL, RESULT})
    lingering.prune_lower_attempts()
    assert versions(store) == before


def test_a_record_that_somebody_deleted_is_said_to_be_gone(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    run = claim()
    store.delete(RECORD, store.read(RECORD)[1])
    with pytest.raises(Superseded, match=r"record\.json is gone"):
        commit(run, 3)


def test_a_worker_whose_storage_is_another_is_told_so(store: LocalStore, claim: Callable[[], Run]) -> None:
    run = claim()
    commit(run, 3)
    with contextlib.closing(LocalStore(f"{store.location}-of-another-host")) as elsewhere:
        follower = Follower(elsewhere, run.record)
        with pytest.raises(MissingInput, match="several workers need the same --output"):
            follower.restore(read_payload)


def test_a_configuration_of_no_network_is_garbage(store: LocalStore, claim: Callable[[], Run]) -> None:
    claim()
    config = json.loads(store.read(CONFIG)[0])
    store.delete(CONFIG, store.read(CONFIG)[1])
    store.create(CONFIG, json.dumps(config | {"identity": config["identity"] | {"model": "moon"}}).encode())
    with pytest.raises(InvalidData, match=r"is not a run.s configuration: .*moon"):
        read_config(store)


def test_the_fence_is_seen_without_a_swap_too(
    claim: Callable[[], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FENCE_POLL_SECONDS", 0.01)
    first = claim()
    assert not first._superseded.wait(0.2)
    claim()
    assert first._superseded.wait(5)
    assert first.superseded


# -- restore -----------------------------------------------------------------------------------------------


def test_a_run_without_commits_restores_nothing(claim: Callable[[], Run]) -> None:
    assert claim().restore(read_payload) is None


@pytest.mark.parametrize("fault", ["damaged", "missing", "unreadable"])
def test_the_commit_before_is_restored_with_a_warning_and_the_bad_one_stays_until_a_swap_drops_it(
    store: LocalStore,
    claim: Callable[[], Run],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checkpoints.log, "propagate", True)
    first = claim()
    history = ({"epoch": 0, "step": 4},)
    first.commit(payload(30), Progress(step=3), after=lambda: None)
    commit(first, 6, 60, history=history, confusion=[[1]])
    bad = first.record.commits[0].name
    if fault == "damaged":
        damage(store, bad)
    elif fault == "missing":
        (store.root / bad).unlink()
    run = claim()

    def read(path: Path) -> int:
        if fault == "unreadable" and read_payload(path) == 60:
            raise ValueError("not a Keras file")
        return read_payload(path)

    assert run.restore(read) == (30, Progress(step=3))
    assert f"{bad}: " in caplog.text
    assert "trying the commit before it" in caplog.text
    assert (run.record.history, run.record.confusion) == ((), None)
    before = versions(store)
    run.prune_lower_attempts()
    assert versions(store) == before
    commit(run, 6, 60)
    assert steps(run) == [6, 3]
    assert bad not in versions(store)
    check_commits_are_whole(store, read_record(store))


def test_commits_that_are_all_bad_end_the_attempt_and_nothing_is_deleted(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    first = claim()
    for step in (3, 6):
        commit(first, step)
    for entry in first.record.commits:
        damage(store, entry.name)
    run = claim()
    before = versions(store)
    with pytest.raises(InvalidData, match=r"none of its 2 commits can be read.*nothing was deleted"):
        run.restore(read_payload)
    run.prune_lower_attempts()
    assert versions(store) == before


def test_a_record_that_leads_out_of_the_run_is_not_followed(
    store: LocalStore, claim: Callable[[], Run]
) -> None:
    run = claim()
    commit(run, 3)
    text = (store.root / RECORD).read_text().replace(run.record.commits[0].name, "../../etc/passwd")
    (store.root / RECORD).write_text(text)
    with pytest.raises(InvalidData, match="none of its 1 commits can be read"):
        claim().restore(read_payload)


# -- random histories --------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A process of the model, and what it would know."""

    run: Run
    store: MortalStore
    digests: list[int]  # of the commits that it has, newest first
    alive: bool = True
    started: bool = False  # it has restored


@dataclass
class Model:
    """What a run must be, in a few lines."""

    digests: list[int] = field(default_factory=list)  # of the named commits, newest first
    damaged: set[int] = field(default_factory=set)
    claims: int = 0
    owner: Attempt | None = None


class Histories(RuleBasedStateMachine):
    """Claims, commits, crashes, restores and prunes of several attempts, in any order, interleaved."""

    attempts: Bundle[Attempt] = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = LocalStore(os.path.join(self.folder.name, "run"))
        self.model = Model()
        self.runs: list[Run] = []
        self.digest = 0

    def teardown(self) -> None:
        for run in self.runs:
            run.close()
        self.store.close()
        self.folder.cleanup()

    def new_claim(self) -> Attempt:
        store = MortalStore(self.store)
        attempt = Attempt(Claim(store, IDENTITY).claim(keep=KEEP), store, list(self.model.digests))
        self.runs.append(attempt.run)
        self.model.claims += 1
        self.model.owner = attempt
        assert attempt.run.record.attempt == self.model.claims
        return attempt

    @rule(target=attempts)
    def claim(self) -> Attempt:
        return self.new_claim()

    @rule(attempt=attempts)
    def restore(self, attempt: Attempt) -> None:
        if not attempt.alive:
            return
        good = [digest for digest in attempt.digests if digest not in self.model.damaged]
        try:
            restored = attempt.run.restore(read_payload)
        except (InvalidData, Superseded) as error:
            attempt.alive = False
            fenced = attempt is not self.model.owner
            if isinstance(error, Superseded) != fenced or (good and not fenced):
                raise
            return
        attempt.started = True
        if attempt is self.model.owner:
            assert restored == ((good[0], Progress(step=good[0])) if good else None)
            attempt.digests = good if not good else attempt.digests[attempt.digests.index(good[0]) :]

    @rule(attempt=attempts, rival=st.sampled_from(["none", "claims", "claims and commits"]))
    def commit(self, attempt: Attempt, rival: str) -> None:
        """With a rival, another attempt comes between the upload and the swap."""
        if not attempt.alive:
            return
        self.digest += 1
        digest, before = self.digest, versions(self.store)

        def interfere(verb: str, name: str) -> None:
            if verb == "swap" and rival != "none":
                newer = self.new_claim()
                if rival == "claims and commits":
                    self.finish_commit(newer, self.digest + 1)
                before.clear()
                before.update(versions(self.store))

        attempt.store.before = interfere
        try:
            if attempt is self.model.owner and rival == "none":
                self.finish_commit(attempt, digest)
            else:
                with pytest.raises(Superseded):
                    commit(attempt.run, digest)
                check_newer_is_untouched(
                    before, versions(self.store), allowed=rf"checkpoints/step-{digest:010d}-.*"
                )
                attempt.alive = False
        finally:
            attempt.store.before = lambda verb, name: None

    def finish_commit(self, attempt: Attempt, digest: int) -> None:
        self.digest = digest
        commit(attempt.run, digest)
        attempt.digests = [digest, *attempt.digests][:KEEP]
        self.model.digests = list(attempt.digests)

    @rule(attempt=attempts)
    def prune(self, attempt: Attempt) -> None:
        if not attempt.alive:
            return
        named = {entry.name for entry in read_record(self.store).commits}
        before = versions(self.store)
        attempt.run.prune_lower_attempts()
        attempt.run.withdraw({MODEL, RESULT})
        after = versions(self.store)
        assert {name for name in named if name in before} <= after.keys()
        mine = attempt.run.record.attempt
        assert all(int(name.split("-a")[1][:4]) < mine for name in before.keys() - after.keys())
        if attempt is self.model.owner:
            litter = {name for name in after if name.startswith("checkpoints/")} - named
            assert all(int(name.split("-a")[1][:4]) >= mine for name in litter)

    @rule(attempt=attempts, changes=st.integers(0, 4))
    def crash_in_a_commit(self, attempt: Attempt, changes: int) -> None:
        """Die after 0: nothing, 1: the upload, 2: the swap, 3 and 4: a delete."""
        if not attempt.alive:
            return
        attempt.alive = False
        attempt.store.die_after(changes)
        self.digest += 1
        with contextlib.suppress(Killed, Superseded):
            commit(attempt.run, self.digest)
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
        assert [entry.progress.step for entry in record.commits] == self.model.digests
        whole = [entry for entry in record.commits if entry.progress.step not in self.model.damaged]
        check_commits_are_whole(self.store, replace(record, commits=tuple(whole)))
        for entry in whole:
            assert json.loads(content(self.store, entry.name))["digest"] == entry.progress.step
            assert crc32c(self.store.root / entry.name) == entry.crc32c


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
