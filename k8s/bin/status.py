"""Print one table of what runs, what waits and why: ``kubectl get jobs,pods,pvc,events -o json | status.py``.

Standard library only, for any Python 3.9: whoever looks after a cluster need not install the job.
"""

from __future__ import annotations

import json
import sys
import textwrap
from datetime import datetime, timezone
from typing import Any

MEANINGS = {
    2: "a wrong option",
    65: "data that are not as they must be",
    66: "a missing bucket, folder or file",
    69: "a missing GPU or a lost peer",
    70: "diverged",
    71: "unexpected",
    73: "a run of that name has another identity",
    74: "storage failed",
    75: "stopped by a signal; the last commit is intact",
    77: "permission denied",
    79: "superseded by a newer attempt",
    137: "killed: out of memory, or longer than its grace",
}
WIDTH = 110
Row = tuple[str, str, str, str, str]


def job_row(job: dict[str, Any]) -> Row:
    """A Job's line: how many of its pods have succeeded, and the message of its last condition."""
    spec, status = job["spec"], job.get("status", {})
    done = f"{status.get('succeeded', 0)} of {spec.get('completions', 1)} done"
    if failed := status.get("failed", 0):
        done += f", {failed} failed"
    ends = [each for each in status.get("conditions", []) if each["status"] == "True"]
    for end in ends:
        if end["type"] in ("Complete", "Failed", "Suspended"):
            message = (
                "" if end["type"] == "Complete" else f"{end.get('reason', '')}: {end.get('message', '')}"
            )
            return _row("job", job, end["type"], message)
    return _row("job", job, done, "")


def pod_row(pod: dict[str, Any], events: list[dict[str, Any]], data_runs: bool) -> Row:
    """A pod's line: its phase, and why it waits or how it ended."""
    status = pod.get("status", {})
    phase = "Ending" if "deletionTimestamp" in pod["metadata"] else status.get("phase", "Unknown")
    return _row("pod", pod, phase, _why(pod, status, events, data_runs))


def claim_row(claim: dict[str, Any], events: list[dict[str, Any]]) -> Row:
    """A volume claim's line."""
    phase = claim.get("status", {}).get("phase", "Unknown")
    return _row(
        "volume", claim, phase, "" if phase == "Bound" else _last_event(claim, events, warnings=False)
    )


def _why(pod: dict[str, Any], status: dict[str, Any], events: list[dict[str, Any]], data_runs: bool) -> str:
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = str(condition.get("message", ""))
            waits = data_runs and "anti-affinity" in message
            return f"waits for the Job data to end ({message})" if waits else message
    disruption = _disruption(status)
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in containers:
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            return f"{container['name']}: {waiting['reason']}: {waiting.get('message', '')}"
        ended = container.get("state", {}).get("terminated", {})
        if ended.get("exitCode"):
            ending = f"{container['name']}: {_ending(ended, disrupted=bool(disruption))}"
            return f"{disruption}; {ending}" if disruption else ending
    if disruption:
        return disruption
    if _in_init(status):
        return "fetches or verifies the data"
    return _last_event(pod, events, warnings=True) if status.get("phase") == "Pending" else ""


def _disruption(status: dict[str, Any]) -> str:
    """Why the cluster ended a pod, as by an eviction or a preemption: its own message, or its condition's."""
    if message := status.get("message"):
        return f"{status.get('reason', '')}: {message}"
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return ""


def _ending(ended: dict[str, Any], *, disrupted: bool) -> str:
    code = ended["exitCode"]
    words = [f"exit code {code}"]
    if ended.get("reason") not in (None, "Error"):
        words.append(str(ended["reason"]))
    elif code in MEANINGS and not disrupted:  # who ended it says why
        words.append(MEANINGS[code])
    if lines := str(ended.get("message", "")).strip().splitlines():
        words.append(_plain(lines[-1]))
    return ": ".join(words)


def _plain(line: str) -> str:
    """The message of a line of JSON, or the line itself."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return line


def _in_init(status: dict[str, Any]) -> bool:
    return any("running" in each.get("state", {}) for each in status.get("initContainerStatuses", []))


def _last_event(about: dict[str, Any], events: list[dict[str, Any]], *, warnings: bool) -> str:
    """The newest event about a pod (only warnings: a volume, a network) or a claim."""
    uid = about["metadata"].get("uid")
    found = [
        each
        for each in events
        if each["involvedObject"].get("uid") == uid and (each.get("type") == "Warning" or not warnings)
    ]
    found.sort(key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or ""))
    return f"{found[-1].get('reason', '')}: {found[-1].get('message', '')}" if found else ""


def _row(kind: str, about: dict[str, Any], state: str, why: str) -> Row:
    metadata = about["metadata"]
    return kind, metadata["name"], state, _age(metadata.get("creationTimestamp")), " ".join(why.split())


def _age(created: str | None) -> str:
    if created is None:
        return ""
    moment = datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)  # noqa: UP017
    minutes = int((datetime.now(timezone.utc) - moment).total_seconds() // 60)  # noqa: UP017
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"


def rows(items: list[dict[str, Any]]) -> list[Row]:
    """Jobs, then pods, then volumes."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        by_kind.setdefault(item["kind"], []).append(item)
    events, pods = by_kind.get("Event", []), by_kind.get("Pod", [])
    data_runs = any(
        pod["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "data"
        and pod.get("status", {}).get("phase") in ("Pending", "Running")
        for pod in pods
    )
    return [
        *map(job_row, by_kind.get("Job", [])),
        *(pod_row(pod, events, data_runs) for pod in pods),
        *(claim_row(claim, events) for claim in by_kind.get("PersistentVolumeClaim", [])),
    ]


def table(found: list[Row]) -> str:
    """Columns as wide as they must be; what is too long goes on below its line."""
    if not found:
        return "Nothing is there: make k8s-apply starts everything."
    lines = [("KIND", "NAME", "STATE", "AGE", "WHY"), *found]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    indent = " " * (sum(widths) + 8)
    text = []
    for line in lines:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(line, widths))  # noqa: B905
        why = textwrap.wrap(line[4], max(40, WIDTH - len(indent))) or [""]
        text += [(start + why[0]).rstrip(), *(indent + more for more in why[1:])]
    return "\n".join(text)


if __name__ == "__main__":
    answer = sys.stdin.read()
    if not answer:
        sys.exit(1)  # kubectl has failed, and said why
    print(table(rows(json.loads(answer)["items"])))
