"""Where a run's wall time went, over all of its attempts.

Within an attempt a monotonic clock counts, and its parts add up to the whole. Between attempts there are the
clocks of their hosts alone, which may disagree: what they say never counts below 0. A killed attempt counts
as working until its next revision was due, and no longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

Kind = Literal["starting", "restoring", "training", "evaluation", "committing", "waiting", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARTS = (*KINDS, "lost")  # of the wall time of all attempts


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where an attempt's time has gone, in seconds from its process's start to one of its revisions."""

    began: float  # its process: seconds since 1970, by the host's clock
    starting: float = 0.0  # imports, data, building, and the first calls, which trace and compile
    restoring: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    committing: float = 0.0  # as far as commits held the loop
    waiting: float = 0.0  # for other workers
    other: float = 0.0  # between the calls
    due: float | None = None  # seconds from here within which the next revision was to come; None: unknown
    ended: bool = False  # nothing came after this revision: the attempt was not killed

    @property
    def seconds(self) -> float:
        """All of them, since the process began."""
        return sum(self.of(kind) for kind in KINDS)

    def of(self, kind: Kind) -> float:
        """The seconds of one kind."""
        seconds: float = getattr(self, kind)
        return seconds


def account_of(attempts: Sequence[Spent], *, training: float, evaluation: float) -> dict[str, Any] | None:
    """A run's account, as result.json has it; None where no attempt has noted its time.

    Args:
        attempts: what each has spent, as of its last revision, the oldest first.
        training: seconds of the steps that the run is made of.
        evaluation: seconds of the evaluations that it is made of.

    Returns:
        "attempts", their number; "wall_seconds" of all of them, which its parts by kind add up to: in
        "training_seconds" and "evaluation_seconds" what the run is made of, in "lost_seconds" what was done
        again or is not known to have been saved; "goodput", the share of the former two, from 0 to 1; and,
        apart, "gap_seconds" between attempts.
    """
    if not attempts:
        return None
    spent = {kind: sum(attempt.of(kind) for attempt in attempts) for kind in KINDS}
    kept_training, kept_evaluation = min(training, spent["training"]), min(evaluation, spent["evaluation"])
    again = spent["training"] - kept_training + spent["evaluation"] - kept_evaluation
    cut_off = [_cut_off(attempt, following) for attempt, following in pairwise(attempts)]
    lost = again + sum(seconds for seconds, _ in cut_off)
    spent |= {"training": kept_training, "evaluation": kept_evaluation}
    wall = sum(spent.values()) + lost
    return {
        "attempts": len(attempts),
        "goodput": (kept_training + kept_evaluation) / wall if wall else 0.0,
        "wall_seconds": wall,
        **{f"{kind}_seconds": seconds for kind, seconds in spent.items()},
        "lost_seconds": lost,
        "gap_seconds": sum(seconds for _, seconds in cut_off),
    }


def _cut_off(attempt: Spent, following: Spent) -> tuple[float, float]:
    """Seconds from an attempt's last revision to the next one's start: those that it lost, and the gap.

    When a killed attempt died, nobody knows. It is taken to have lived until its next revision was due, or
    until the next attempt began, whichever was first.
    """
    between = max(0.0, following.began - attempt.began - attempt.seconds)
    if attempt.ended:
        return 0.0, between
    lost = between if attempt.due is None else min(between, attempt.due)
    return lost, between - lost
