"""The paired difference between the networks, seed by seed, with its confidence interval.

Two single runs cannot say whether a ResNet beats its twin without skip connections. Runs of equal settings
and seed see the same images in the same order. Their initial weights are equal only up to ResNet's first
projection, which shifts the stream of seeds for all that is made after it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from job.report.summaries import NAMES, RunSummary, distinction, size_of, without_copies

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Differences in percentage points, one a seed: ResNet minus PlainNet, or how that changes with depth."""

    title: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]  # in the order of the seeds
    unpaired: tuple[str, ...] = ()  # names of finished runs without a twin
    layers: int = 0
    family: Any = None  # what pairings that differ in depth alone share

    def of_seed(self, seed: int) -> float:
        """The difference of one pair."""
        return self.differences[self.seeds.index(seed)]

    @property
    def mean(self) -> float:
        """Mean difference; NaN without pairs."""
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t, which takes the differences as normal.

        None where nothing shows how much they scatter: for fewer than two pairs, or when all are equal.
        """
        if len(self.differences) < 2 or max(self.differences) - min(self.differences) < 1e-9:
            return None
        from scipy import stats

        interval = stats.ttest_1samp(self.differences, popmean=0).confidence_interval(CONFIDENCE)
        return float(interval.low), float(interval.high)

    def __str__(self) -> str:
        without = f" Without a twin: {', '.join(self.unpaired)}." if self.unpaired else ""
        return f"{self.title}: {self._finding}{without}"

    @property
    def _finding(self) -> str:
        if not self.differences:
            return "no pairs: no seed was finished by both networks."
        if len(self.seeds) == 1:
            return f"{self.mean:+.2f} points from one pair (seed {self.seeds[0]}). One pair proves nothing."
        pairs = f"n = {len(self.seeds)} pairs (seeds {', '.join(map(str, self.seeds))})"
        if self.interval is None:
            return f"{self.mean:+.2f} points in every pair, {pairs}. Equal differences give no interval."
        low, high = self.interval
        verdict = "includes" if low <= 0 <= high else "excludes"
        return (
            f"{self.mean:+.2f} points, 95 % confidence interval {low:+.2f} to {high:+.2f}, {pairs}. "
            f"The interval {verdict} zero."
        )


Accuracy = Callable[[RunSummary], float | None]


def final_accuracy(run: RunSummary) -> float | None:
    """On the test set after the last epoch, as training left the network."""
    return run.final_accuracy


def recalibrated_accuracy(run: RunSummary) -> float | None:
    """The same with batch statistics taken anew over training images."""
    return run.recalibrated_accuracy


def pairings(runs: Iterable[RunSummary], accuracy: Accuracy = final_accuracy) -> list[Pairing]:
    """Pair finished runs of equal settings and seed, ResNet and PlainNet; one entry per depth and setting.

    Runs that lack this accuracy are left out.
    """
    groups: dict[Any, list[RunSummary]] = defaultdict(list)
    for run in without_copies(run for run in runs if run.complete and accuracy(run) is not None):
        groups[run.shape, run.conditions].append(run)
    return [_pairing(_title(group[0], groups.values()), group, accuracy) for group in groups.values()]


def depth_changes(found: Iterable[Pairing]) -> list[Pairing]:
    """By how much the difference changes from the shallowest to the deepest network, seed by seed.

    The article's guess: "the difference should be bigger on deeper networks".
    """
    families: dict[Any, list[Pairing]] = defaultdict(list)
    for pairing in found:
        if pairing.seeds:
            families[pairing.family].append(pairing)
    changes = []
    for members in families.values():
        shallow, deep = (choose(members, key=lambda pairing: pairing.layers) for choose in (min, max))
        seeds = [seed for seed in deep.seeds if seed in shallow.seeds]
        # Other blocks may make the same depth: then there is no saying from which of them, or to which.
        extremes = [pairing for pairing in members if pairing.layers in (shallow.layers, deep.layers)]
        if extremes in ([shallow, deep], [deep, shallow]) and seeds:
            title = f"change of the difference from {shallow.layers} layers to {deep.title}"
            gains = tuple(deep.of_seed(seed) - shallow.of_seed(seed) for seed in seeds)
            changes.append(Pairing(title=title, seeds=tuple(seeds), differences=gains))
    return changes


def _pairing(title: str, runs: Sequence[RunSummary], accuracy: Accuracy) -> Pairing:
    resnets, plainnets = (
        {run.identity.seed: accuracy(run) or 0.0 for run in runs if run.model == model} for model in NAMES
    )
    seeds = sorted(resnets.keys() & plainnets.keys())
    gains = [resnets[seed] - plainnets[seed] for seed in seeds]
    return Pairing(
        title=title,
        seeds=tuple(seeds),
        differences=tuple(100 * gain for gain in gains),
        unpaired=tuple(run.name for run in runs if run.identity.seed not in seeds),
        layers=runs[0].layers,
        family=(runs[0].shape[1], runs[0].conditions),
    )


def _title(run: RunSummary, groups: Iterable[Sequence[RunSummary]]) -> str:
    """Size, and the conditions in which groups of this very shape differ."""
    firsts = [group[0] for group in groups]
    alternatives = [first.conditions for first in firsts if first.shape == run.shape]
    return ", ".join([size_of(run, firsts), *distinction(run, alternatives)])
