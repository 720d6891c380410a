"""Where the time of all attempts went: sums that add up, and clocks that disagree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.domain.account import KINDS, PARTS, Spent, account_of

KILLED = Spent(began=1000.0, starting=5.0, restoring=1.0, training=20.0, evaluation=3.0, other=1.0, due=10.0)
SECOND = Spent(began=1036.0, starting=4.0, restoring=2.0, training=30.0, evaluation=2.0, ended=True)


def account(*attempts: Spent, training: float = 50.0, evaluation: float = 5.0) -> dict[str, Any]:
    values = account_of(attempts, training=training, evaluation=evaluation)
    assert values is not None
    return values


def test_an_undisturbed_attempt_is_divided_into_what_it_did() -> None:
    values = account(SECOND, training=30.0, evaluation=2.0)
    assert values["wall_seconds"] == 38.0
    assert values["goodput"] == 32.0 / 38.0
    assert values["lost_seconds"] == values["gap_seconds"] == 0.0


def test_what_came_between_the_last_revision_of_a_killed_attempt_and_the_next_is_lost() -> None:
    values = account(KILLED, SECOND)  # 30 s are noted, and the next began after 36
    assert (values["lost_seconds"], values["gap_seconds"]) == (6.0, 0.0)
    assert values["wall_seconds"] == 30.0 + 6.0 + 38.0
    assert values["goodput"] == 55.0 / 74.0
    assert values["attempts"] == 2


def test_no_more_is_lost_than_until_the_next_revision_was_due() -> None:
    values = account(KILLED, replace(SECOND, began=1630.0))
    assert (values["lost_seconds"], values["gap_seconds"]) == (10.0, 590.0)


def test_where_that_is_unknown_all_of_it_counts_as_lost() -> None:
    values = account(replace(KILLED, due=None), replace(SECOND, began=1630.0))
    assert (values["lost_seconds"], values["gap_seconds"]) == (600.0, 0.0)


def test_an_attempt_that_ended_by_itself_lost_nothing() -> None:
    values = account(replace(KILLED, ended=True), SECOND)
    assert (values["lost_seconds"], values["gap_seconds"]) == (0.0, 6.0)


def test_steps_that_were_trained_again_are_lost() -> None:
    values = account(replace(KILLED, ended=True), SECOND, training=37.5, evaluation=2.0)
    assert values["training_seconds"] == 37.5
    assert values["lost_seconds"] == 12.5 + 3.0
    assert values["wall_seconds"] == 68.0


def test_a_clock_that_is_behind_makes_nothing_negative() -> None:
    values = account(KILLED, replace(SECOND, began=-1e6))
    assert (values["lost_seconds"], values["gap_seconds"]) == (0.0, 0.0)
    assert values["wall_seconds"] == 68.0


def test_no_attempt_no_account() -> None:
    assert account_of([], training=1.0, evaluation=1.0) is None


seconds = st.floats(0.0, 1e6)
attempts = st.builds(
    Spent,
    began=st.floats(-1e9, 1e9),
    due=st.none() | seconds,
    ended=st.booleans(),
    **dict.fromkeys(KINDS, seconds),
)


@given(st.lists(attempts, min_size=1, max_size=5), seconds, seconds)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
def test_whatever_the_clocks_say_nothing_is_negative_and_parts_add_up(
    found: list[Spent], training: float, evaluation: float
) -> None:
    values = account(*found, training=training, evaluation=evaluation)
    assert min(values.values()) >= 0.0
    assert 0.0 <= values["goodput"] <= 1.0
    assert values["wall_seconds"] == pytest.approx(sum(values[f"{part}_seconds"] for part in PARTS))
