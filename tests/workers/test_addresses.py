"""Who is in a group: from an Indexed Job's variables, or from TF_CONFIG."""

from __future__ import annotations

import json
from typing import Any

import pytest

from job import cluster
from job.config import Settings
from job.errors import UsageError


def group_of(
    monkeypatch: pytest.MonkeyPatch, index: str = "1", **settings: Any
) -> cluster.WorkerGroup | None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    return cluster.WorkerGroup.of(Settings(**settings))


def test_a_host_pattern_gives_each_workers_address(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(monkeypatch, workers=2, worker_hosts="resnet-{index}.resnet:2222")
    assert group == cluster.WorkerGroup(("resnet-0.resnet:2222", "resnet-1.resnet:2222"), 1)
    assert group_of(monkeypatch) is None


def test_tf_config_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert group_of(monkeypatch) == cluster.WorkerGroup(("a:1", "b:1"), 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "cluster"),
        ("not JSON", "Expecting value"),
        ('{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}', "not a, b"),
        ('{"cluster": {"worker": [1, 2]}, "task": {"type": "worker", "index": 0}}', "expected string"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}', "number 2"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": -1}}', "number -1"),
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
        ("2", "a:1,b:1", r"JOB_COMPLETION_INDEX must be from 0 to 1.*not '2'"),
    ],
)
def test_impossible_groups_are_refused(
    monkeypatch: pytest.MonkeyPatch, index: str, hosts: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        group_of(monkeypatch, index, workers=2, worker_hosts=hosts)
