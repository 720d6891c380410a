"""What a worker makes of the chief's last act."""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

from job.domain.errors import ResourceUnavailable
from job.engine.cluster import Cluster


@pytest.fixture
def worker() -> Cluster:
    return Cluster(tf.distribute.get_strategy(), ("one",), False, workers=2, index=1)


def answer(monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    def number(_: Cluster, value: int) -> int:
        if isinstance(told, Exception):
            raise told
        return int(told)

    monkeypatch.setattr(Cluster, "number_from_chief", number)


def test_the_chiefs_last_act_is_waited_for(worker: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 1)
    worker.wait_for_chief(or_leave=False)


def test_a_chief_that_ended_otherwise_has_done_nothing(
    worker: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, 0)  # as it says when it leaves
    with pytest.raises(ResourceUnavailable, match="worker 1: worker 0 has ended"):
        worker.wait_for_chief(or_leave=False)
    worker.wait_for_chief(or_leave=True)


def test_a_lost_peer_matters_only_where_something_is_still_to_come(
    worker: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, tf.errors.UnavailableError(None, None, "reset"))
    with pytest.raises(tf.errors.UnavailableError):
        worker.wait_for_chief(or_leave=False)
    worker.wait_for_chief(or_leave=True)
