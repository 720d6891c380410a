"""The runner: scenarios one after the other in a namespace of their own, and one table at the end."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from job.run.reader import read_record
from job.store.location import open_store
from tests.cluster.kubectl import Cluster, Object, Unmet, check, end_of, is_training
from tests.cluster.variants import Make, Variant
from tests.durability.outcome import Outcome, check_same_outcome, outcome

MANAGED = "jobs,deployments,configmaps,services,networkpolicies"
OURS = "app.kubernetes.io/part-of=cifar-residual-job"
START_SECONDS = 300.0  # to schedule a pod, pull the image and import TensorFlow on a busy node
RUN_SECONDS = 600.0  # for one small run, also after a failure's pause


class Skipped(Exception):
    """This cluster lacks what a scenario needs; the message says what."""


@dataclass
class Suite:
    """The cluster, and what the scenarios share: steps, and the runs that nobody disturbed."""

    cluster: Cluster
    make: Make
    folder: Path  # runs fetched from the cluster
    undisturbed: dict[str, Outcome] = field(default_factory=dict)

    def apply(self, variant: Variant) -> str:
        """Start a variant by ``make k8s-apply``; return what it says."""
        return self.must("k8s-apply", variant)

    def must(self, target: str, variant: Variant | None = None, *more: str) -> str:
        """Run a make target that must not fail; return what it prints."""
        finished = self.make(target, variant, *more)
        check(finished.returncode == 0, f"make {target} failed: {finished.stderr.strip()[-500:]}")
        return finished.stdout

    def clear(self) -> None:
        """Remove what a scenario has started; the volume stays."""
        self.cluster.ask("delete", MANAGED, "-l", OURS, "--cascade=foreground", "--ignore-not-found")

    def pod_at_epoch(self, job: str, epoch: int, index: int | None = None) -> str:
        """Wait until a pod of a Job says that it has trained so many epochs; return its name."""

        def found() -> str | None:
            for pod in self.cluster.pods(job):
                labels, name = pod["metadata"]["labels"], str(pod["metadata"]["name"])
                mine = index is None or labels.get("batch.kubernetes.io/job-completion-index") == str(index)
                if mine and is_training(pod) and f"epoch {epoch}/" in self.cluster.logs(name):
                    return name
            return None

        name: str = self.cluster.wait(START_SECONDS, f"epoch {epoch} of {job}", found)
        return name

    def end(self, job: str, seconds: float = RUN_SECONDS) -> tuple[str, str]:
        """Wait until a Job has ended; return how, and the reason."""

        def found() -> tuple[str, str] | None:
            there = self.cluster.get("job", job)
            check(there, f"the Job {job} is gone")
            return end_of(there or {})

        ended: tuple[str, str] = self.cluster.wait(seconds, f"the end of {job}", found)
        return ended

    def completes(self, job: str) -> None:
        """Wait until a Job is complete."""
        kind, reason = self.end(job)
        check(kind == "Complete", f"{job} {kind}: {reason}; {self.cluster.summary()}")

    def outcome(self, variant: Variant) -> Outcome:
        """Fetch the runs and read the variant's one run, which must be complete and sound."""
        return outcome(open_store(str(self._run(variant))))

    def same_bits(self, variant: Variant, reference: str, attempts: int = 2) -> None:
        """The run took so many attempts or more, and ended as the undisturbed one did, bit for bit."""
        store = open_store(str(self._run(variant)))
        taken = read_record(store).attempt
        check(taken >= attempts, f"{taken} attempts, not {attempts}: what was to disturb it came too late")
        check(reference in self.undisturbed, f"the undisturbed run that it must equal failed: {reference}")
        check_same_outcome(store, self.undisturbed[reference])

    def _run(self, variant: Variant) -> Path:
        self.must("k8s-fetch", None, f"TO={self.folder}")
        runs = sorted(each for each in (self.folder / variant.output.removeprefix("/runs/")).iterdir())
        check(len(runs) == 1, f"one run was asked for, and there are {len(runs)}")
        return runs[0]

    def nodes(self) -> list[Object]:
        """Nodes that take pods."""
        return [node for node in self.cluster.all_of("nodes") if not node["spec"].get("unschedulable")]


Scenario = Callable[[Suite], None]


@dataclass(frozen=True)
class Result:
    """How a scenario ended."""

    name: str
    verdict: str  # "holds", "FAILS", "skipped"
    seconds: float
    why: str = ""


def run(suite: Suite, scenarios: dict[str, Scenario]) -> list[Result]:
    """Run each scenario, whatever became of the others."""
    return [_run_one(suite, name, scenario) for name, scenario in scenarios.items()]


def _run_one(suite: Suite, name: str, scenario: Scenario) -> Result:
    started = time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    verdict, why = "holds", ""
    try:
        scenario(suite)
    except Skipped as reason:
        verdict, why = "skipped", str(reason)
    except (Unmet, AssertionError) as problem:
        verdict, why = "FAILS", str(problem)
    except Exception:  # the table must come, whatever a scenario stumbles over
        verdict, why = "FAILS", traceback.format_exc()
    try:
        suite.clear()
    except Unmet as problem:
        verdict, why = "FAILS", f"{why} {problem}".strip()
    result = Result(name, verdict, time.monotonic() - started, why)
    print(f"{name}: {result.verdict} {result.why}".rstrip(), file=sys.stderr, flush=True)
    return result


def table(results: list[Result]) -> str:
    """One line a scenario, and the counts."""
    width = max(len(result.name) for result in results)
    lines = [
        f"{result.name:<{width}}  {result.verdict:<7}  {result.seconds:4.0f} s  {_short(result.why)}".rstrip()
        for result in results
    ]
    counts = {verdict: sum(each.verdict == verdict for each in results) for verdict in VERDICTS}
    minutes = sum(result.seconds for result in results) / 60
    return "\n".join([*lines, f"{', '.join(f'{n} {v}' for v, n in counts.items())}, {minutes:.0f} min"])


VERDICTS = ("holds", "FAILS", "skipped")


def _short(why: str) -> str:
    last = why.strip().splitlines()[-1] if why.strip() else ""
    return last if len(last) <= 160 else f"{last[:157]}..."


@contextmanager
def namespace(cluster: Cluster) -> Iterator[None]:
    """The suite's namespace: refused where it exists already, removed at the end, also after an interruption.

    Raises:
        Unmet: the namespace is there, and may hold somebody's runs.
    """
    check(
        cluster.get("namespace", cluster.namespace) is None,
        f"the namespace {cluster.namespace} is there already; delete it, or name another: --namespace",
    )
    try:
        yield
    finally:
        cluster.run("delete", "namespace", cluster.namespace, "--ignore-not-found")


def run_all(cluster: Cluster, image: str | None, scenarios: dict[str, Scenario]) -> int:
    """Run the scenarios, print the table, and return the exit code: 0 if nothing failed."""
    with namespace(cluster), tempfile.TemporaryDirectory() as folder:
        results = run(Suite(cluster, Make(cluster, image), Path(folder)), scenarios)
    print(table(results))
    return int(any(result.verdict == "FAILS" for result in results))
