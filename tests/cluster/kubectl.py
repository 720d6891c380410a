"""What the suite asks of a cluster: always of the named context and, but for nodes, of its own namespace."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
POLL_SECONDS = 1.0


class Unmet(Exception):
    """The cluster did not do what was promised; the message says what it did instead."""


def check(condition: object, message: str) -> None:
    """Raise `Unmet` where a promise is not kept."""
    if not condition:
        raise Unmet(message)


@dataclass(frozen=True)
class Cluster:
    """A context of kubectl's configuration, and the suite's namespace there."""

    context: str
    namespace: str
    kubectl: str = "kubectl"

    @property
    def command(self) -> list[str]:
        """Begins every command line."""
        return [self.kubectl, "--context", self.context, "--namespace", self.namespace]

    def run(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl to whatever end."""
        return subprocess.run(
            [*self.command, *arguments], input=given, capture_output=True, text=True, check=False
        )

    def ask(self, *arguments: str, given: str | None = None) -> str:
        """Run kubectl and return what it prints.

        Raises:
            Unmet: it failed.
        """
        finished = self.run(*arguments, given=given)
        check(finished.returncode == 0, f"kubectl {' '.join(arguments)}: {finished.stderr.strip()[-500:]}")
        return finished.stdout

    def get(self, kind: str, name: str) -> Object | None:
        """One object, or None."""
        text = self.ask("get", kind, name, "--ignore-not-found", "-o", "json")
        found: Object | None = json.loads(text) if text.strip() else None
        return found

    def all_of(self, kind: str, selector: str = "") -> list[Object]:
        """Objects of a kind."""
        text = self.ask("get", kind, *(["-l", selector] if selector else []), "-o", "json")
        found: list[Object] = json.loads(text)["items"]
        return found

    def pods(self, job: str) -> list[Object]:
        """A Job's pods, the oldest first."""
        found = self.all_of("pods", f"batch.kubernetes.io/job-name={job}")
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def logs(self, pod: str) -> str:
        """What the container that trains has said so far; "" before it runs."""
        return self.run("logs", pod, "-c", "train").stdout

    def wait(self, seconds: float, what: str, found: Callable[[], Any]) -> Any:
        """Ask until the answer is true.

        Raises:
            Unmet: it was not within ``seconds``; says what was waited for and the state of the pods.
        """
        end = time.monotonic() + seconds
        while True:
            if answer := found():
                return answer
            check(time.monotonic() < end, f"not within {seconds:g} s: {what}; {self.summary()}")
            time.sleep(POLL_SECONDS)

    def summary(self) -> str:
        """One line of what is there."""
        pods = [f"{pod['metadata']['name']} {phase_of(pod)}" for pod in self.all_of("pods")]
        return ", ".join(pods) or "no pods"


# --- what a server's answers mean


def condition(item: Object, kind: str) -> Object | None:
    """A condition that is true."""
    for each in item.get("status", {}).get("conditions", []):
        if each["type"] == kind and each["status"] == "True":
            found: Object = each
            return found
    return None


def end_of(job: Object) -> tuple[str, str] | None:
    """How a Job has ended: "Complete" or "Failed", and the reason; None while it goes on."""
    for kind in ("Complete", "Failed"):
        if found := condition(job, kind):
            return kind, str(found.get("reason", ""))
    return None


def phase_of(pod: Object) -> str:
    """A pod's phase, "Ending" once it was asked to go."""
    if "deletionTimestamp" in pod["metadata"] and pod["status"].get("phase") == "Running":
        return "Ending"
    return str(pod["status"].get("phase", "Unknown"))


def exit_codes(pod: Object) -> list[int]:
    """Codes of the containers that have ended, init containers first."""
    status = pod["status"]
    states = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return [
        each["state"]["terminated"]["exitCode"] for each in states if "terminated" in each.get("state", {})
    ]


def is_training(pod: Object) -> bool:
    """Whether its main container runs."""
    states = pod["status"].get("containerStatuses", [])
    return any("running" in each.get("state", {}) for each in states)
