"""Who is in a group: from an Indexed Job's variables, or from TF_CONFIG."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from job.domain.errors import ResourceUnavailable, UsageError
from job.domain.settings import Settings
from job.engine import rendezvous
from job.engine.rendezvous import WorkerGroup
from tests.workers.groups import free_ports, has_ipv6


def group_of(monkeypatch: pytest.MonkeyPatch, index: str = "1", **settings: Any) -> WorkerGroup | None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    return WorkerGroup.of(Settings(**settings))


def test_a_host_pattern_gives_each_workers_address(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(monkeypatch, workers=2, worker_hosts="resnet-{index}.resnet:2222")
    assert group == WorkerGroup(("resnet-0.resnet:2222", "resnet-1.resnet:2222"), 1)
    assert group_of(monkeypatch) is None


@pytest.mark.parametrize(
    ("hosts", "parsed"),
    [
        ("a:1, b:2", ("a:1", "b:2")),
        ("[fd00::1]:2222,[fd00::2]:2222", ("[fd00::1]:2222", "[fd00::2]:2222")),
        ("[::1]:2301 , [fe80::1%eth0]:2302", ("[::1]:2301", "[fe80::1%eth0]:2302")),
    ],
)
def test_blanks_and_ipv6_addresses_are_understood(
    monkeypatch: pytest.MonkeyPatch, hosts: str, parsed: tuple[str, ...]
) -> None:
    assert group_of(monkeypatch, workers=2, worker_hosts=hosts) == WorkerGroup(parsed, 1)


def test_tf_config_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert group_of(monkeypatch) == WorkerGroup(("a:1", "b:1"), 1)


def test_the_tf_config_of_a_kubeflow_trainer_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "cluster": {"chief": ["n-chief-0.d.svc:2222"], "worker": ["n-worker-0.d.svc:2222", "[fd00::2]:2222"]},
        "task": {"type": "worker", "index": 1},
        "environment": "cloud",
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    hosts = ("n-chief-0.d.svc:2222", "n-worker-0.d.svc:2222", "[fd00::2]:2222")
    assert group_of(monkeypatch) == WorkerGroup(hosts, 2)


@pytest.mark.parametrize("role", ["evaluator", "ps"])
@pytest.mark.parametrize("own", [True, False])
def test_a_role_of_tf_config_that_this_job_does_not_have_is_named(
    monkeypatch: pytest.MonkeyPatch, role: str, own: bool
) -> None:
    config = {
        "cluster": {"worker": ["a:1", "b:1"], role: ["c:1"]},
        "task": {"type": role if own else "worker", "index": 0},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(UsageError, match=f"roles chief and worker only, not '{role}'.*remove that role"):
        group_of(monkeypatch)


def test_an_empty_tf_config_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", "")
    assert group_of(monkeypatch) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "cluster"),
        ("not JSON", "Expecting value"),
        ('{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}', "not a, b"),
        ('{"cluster": {"worker": [1, 2]}, "task": {"type": "worker", "index": 0}}', "strip"),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
            "no worker of number 2",
        ),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": -1}}', "number -1"),
        (
            '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "chief", "index": 1}}',
            "no chief of",
        ),
    ],
)
def test_a_tf_config_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: str, message: str
) -> None:
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UsageError, match=f"TF_CONFIG must name a cluster .*{message}"):
        group_of(monkeypatch)


@pytest.mark.parametrize(
    ("index", "hosts", "message"),
    [
        ("0", "a:1,b:1,c:1", r"host:port of 2 workers, not 'a:1,b:1,c:1'"),
        ("0", "a,b", r"host:port of 2 workers, not 'a,b'"),
        ("0", "a:1,b:99999", r"host:port of 2 workers, not 'a:1,b:99999'"),
        ("0", "a:1,b..c:1", r"host:port of 2 workers, not 'a:1,b..c:1'"),
        ("0", f"a:1,{'b' * 64}:1", r"host:port of 2 workers, not 'a:1,b*:1'"),
        ("2", "a:1,b:1", r"JOB_COMPLETION_INDEX must be from 0 to 1.*not '2'"),
    ],
)
def test_impossible_groups_are_refused(
    monkeypatch: pytest.MonkeyPatch, index: str, hosts: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        group_of(monkeypatch, index, workers=2, worker_hosts=hosts)


def test_hosts_without_a_number_of_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--worker-hosts a:1,b:1 needs --workers of 2 or more, not 1"):
        group_of(monkeypatch, worker_hosts="a:1,b:1")
    assert group_of(monkeypatch, worker_hosts="a:1") is None  # one worker of a Job that has but one


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        group = WorkerGroup((f"127.0.0.1:{port}", "127.0.0.1:1"), 0)
        with pytest.raises(
            ResourceUnavailable, match=f"port {port} cannot be opened: Address already in use"
        ):
            rendezvous.meet(group)


def test_a_worker_answers_on_ipv4_and_on_ipv6() -> None:
    (port,) = free_ports(1)
    with rendezvous._answering(port) as found_all:
        for answer in (rendezvous.LOOKING, rendezvous.FOUND_ALL):
            assert rendezvous._answer_of(f"127.0.0.1:{port}") == answer
            assert rendezvous._answer_of(f"localhost:{port}") == answer
            assert rendezvous._answer_of(f"[::1]:{port}") == (answer if has_ipv6() else None)
            found_all.set()
    assert rendezvous._answer_of(f"127.0.0.1:{port}") is None
    with socket.create_server(("", port)):  # TensorFlow's will
        pass


def test_a_worker_answers_its_peers_however_long_it_waits() -> None:
    """Each peer asks some times a second; a queue of calls that nobody takes would be full after a minute."""
    mine, late = (f"127.0.0.1:{port}" for port in free_ports(2))
    meeting = threading.Thread(target=rendezvous.meet, args=[WorkerGroup((mine, late), 0)], daemon=True)
    meeting.start()
    for _ in range(4):
        time.sleep(0.7)
        assert {rendezvous._answer_of(mine) for _ in range(50)} == {rendezvous.LOOKING}
    assert meeting.is_alive()
    with rendezvous._answering(int(late.rpartition(":")[2])) as found_all:
        found_all.set()
        meeting.join(timeout=30)
    assert not meeting.is_alive()


def test_nobody_leaves_a_meeting_before_all_have_found_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finds the other at once, which does not find it yet: its name service says that it is not there."""
    hosts = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
    inner, known = rendezvous._answer_of, threading.Event()

    def answer_of(address: str) -> bytes | None:
        is_blind = threading.current_thread().name == "worker 0" and address == hosts[2]
        return None if is_blind and not known.is_set() else inner(address)

    monkeypatch.setattr(rendezvous, "_answer_of", answer_of)
    workers = [
        threading.Thread(
            target=rendezvous.meet, args=[WorkerGroup(hosts, index)], name=f"worker {index}", daemon=True
        )
        for index in range(3)
    ]
    for worker in workers:
        worker.start()
    time.sleep(3 * rendezvous.LINGER_SECONDS)
    assert all(worker.is_alive() for worker in workers)
    known.set()
    for worker in workers:
        worker.join(timeout=30)
    assert not any(worker.is_alive() for worker in workers)


def test_who_was_ready_and_changes_to_tensorflows_server_is_not_missed() -> None:
    hosts = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    group, found_all = WorkerGroup(hosts, 0), threading.Event()
    answers: dict[int, bytes | None] = {}
    port = int(hosts[1].rpartition(":")[2])
    assert rendezvous.not_ready(group, answers, found_all) == [f"worker 1 ({hosts[1]})"]
    assert not found_all.is_set()
    with rendezvous._answering(port) as theirs:
        assert rendezvous.not_ready(group, answers, found_all) == [
            f"worker 1 ({hosts[1]}), which misses others"
        ]
        assert found_all.is_set()
        theirs.set()
        assert rendezvous.not_ready(group, answers, found_all) == []
    assert rendezvous.not_ready(group, answers, found_all) == []
    with rendezvous._answering(port):  # it has died, and begins anew
        assert rendezvous.not_ready(group, answers, found_all) == [
            f"worker 1 ({hosts[1]}), which misses others"
        ]
    assert rendezvous.not_ready(group, answers, found_all) == [f"worker 1 ({hosts[1]})"]
