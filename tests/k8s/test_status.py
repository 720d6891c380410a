"""The table of ``make k8s-status``, from what a server answered in each situation."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.k8s.manifests import ROOT
from tests.k8s.test_contract import DECISIONS, KILLED

Object = dict[str, Any]
PROGRAM = ROOT / "k8s/bin/status.py"


def status(*items: Object) -> list[str]:
    """The table's lines, without its head."""
    finished = subprocess.run(
        [sys.executable, str(PROGRAM)],
        input=json.dumps({"kind": "List", "items": items}),
        capture_output=True,
        text=True,
        check=True,
    )
    head, *lines = finished.stdout.splitlines()
    assert head.split() == ["KIND", "NAME", "STATE", "AGE", "WHY"]
    return lines


def text_of(*items: Object) -> str:
    """The table as one line, whatever is wrapped in it."""
    return " ".join(" ".join(status(*items)).split())


def pod(name: str = "resnet-x7k2p", component: str = "training", **fields: Any) -> Object:
    labels = {"app.kubernetes.io/component": component}
    metadata = {
        "name": name,
        "uid": f"uid-{name}",
        "labels": labels,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return {"kind": "Pod", "metadata": metadata, "status": {"phase": "Pending", **fields}}


def unscheduled(message: str) -> Object:
    return {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}


def waiting(reason: str, message: str) -> Object:
    return {"name": "train", "state": {"waiting": {"reason": reason, "message": message}}}


def ended(code: int, **fields: str) -> Object:
    return {"name": "train", "state": {"terminated": {"exitCode": code, "reason": "Error", **fields}}}


def event(about: Object, reason: str, message: str, kind: str = "Warning", at: str = "T01") -> Object:
    return {
        "kind": "Event",
        "metadata": {"name": reason},
        "type": kind,
        "reason": reason,
        "message": message,
        "lastTimestamp": at,
        "involvedObject": {"uid": about["metadata"]["uid"]},
    }


def test_a_pod_that_no_node_can_take_says_what_is_missing() -> None:
    message = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    assert message in text_of(pod(conditions=[unscheduled(message)]))


def test_a_pod_that_waits_for_the_data_says_so_while_they_are_fetched() -> None:
    message = "0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules."
    training = pod(conditions=[unscheduled(message)])
    data = pod("data-abcde", "data", phase="Running")
    assert "waits for the Job data to end" in text_of(training, data)
    assert "waits for the Job data" not in text_of(training, pod("data-abcde", "data", phase="Succeeded"))


def test_an_image_that_cannot_be_pulled_is_named() -> None:
    message = 'Back-off pulling image "registry.example/job:2"'
    text = text_of(pod(containerStatuses=[waiting("ImagePullBackOff", message)]))
    assert f"train: ImagePullBackOff: {message}" in text


def test_a_volume_that_cannot_be_attached_is_told_by_its_newest_warning() -> None:
    stuck = pod(containerStatuses=[waiting("ContainerCreating", "")])
    text = text_of(
        stuck,
        event(stuck, "Scheduled", "assigned to node-1", kind="Normal", at="T03"),
        event(stuck, "FailedMount", "an older one", at="T01"),
        event(stuck, "FailedAttachVolume", "Multi-Attach error for volume pvc-1", at="T02"),
        event(pod("other"), "FailedMount", "another pod's", at="T04"),
    )
    assert "FailedAttachVolume: Multi-Attach error for volume pvc-1" in text
    assert "older" not in text
    assert "another" not in text


def test_a_claim_that_is_not_bound_says_why() -> None:
    claim: Object = {
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "volume", "uid": "c"},
        "status": {"phase": "Pending"},
    }
    text = text_of(claim, event(claim, "WaitForFirstConsumer", "waiting for a pod", kind="Normal"))
    assert "volume volume Pending" in text
    assert "WaitForFirstConsumer: waiting for a pod" in text


@pytest.mark.parametrize("code", [*DECISIONS, KILLED])
def test_every_way_to_end_is_told_in_words_with_the_last_line_of_the_log(code: int) -> None:
    line = json.dumps({"severity": "ERROR", "message": "UsageError: --epochs must be above 0"})
    text = text_of(pod(phase="Failed", containerStatuses=[ended(code, message=f"first\n{line}\n")]))
    assert f"train: exit code {code}: " in text
    assert text.endswith(": UsageError: --epochs must be above 0")
    assert len(text.split(f"exit code {code}: ")[1].split(": UsageError")[0]) > 5


def test_a_lack_of_memory_is_named() -> None:
    text = text_of(pod(phase="Failed", containerStatuses=[ended(137, reason="OOMKilled")]))
    assert "exit code 137: OOMKilled" in text


def test_an_evicted_pod_says_what_was_full() -> None:
    message = 'Usage of EmptyDir volume "spool" exceeds the limit "4Gi".'
    assert f"Evicted: {message}" in text_of(pod(phase="Failed", reason="Evicted", message=message))


def test_an_eviction_is_not_hidden_by_the_container_that_it_ended() -> None:
    """Kubelets keep the container's end, and some write the message into a condition alone."""
    message = 'Usage of EmptyDir volume "spool" exceeds the limit "4Gi".'
    dead = [ended(137)]
    text = text_of(pod(phase="Failed", reason="Evicted", message=message, containerStatuses=dead))
    assert f"Evicted: {message}; train: exit code 137" in text
    assert "out of memory" not in text
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "m",
    }
    text = text_of(pod(phase="Failed", conditions=[condition], containerStatuses=[ended(75)]))
    assert "PreemptionByScheduler: m; train: exit code 75" in text


def test_a_pod_that_fetches_says_so_whatever_kept_it_waiting_before() -> None:
    running = {"name": "data", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    fetching = pod(initContainerStatuses=[running], containerStatuses=[waiting("PodInitializing", "")])
    text = text_of(fetching, event(fetching, "FailedScheduling", "an older one"))
    assert "fetches or verifies the data" in text
    assert "older" not in text


def test_an_event_without_a_message_is_no_obstacle() -> None:
    stuck = pod(containerStatuses=[waiting("ContainerCreating", "")])
    told = event(stuck, "FailedMount", "")
    del told["message"]
    assert "FailedMount:" in text_of(stuck, told)


def test_where_kubectl_has_failed_nothing_is_added_to_its_words() -> None:
    finished = subprocess.run(
        [sys.executable, str(PROGRAM)], input="", capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", "")


def test_a_job_counts_and_says_how_it_ended() -> None:
    job: Object = {"kind": "Job", "metadata": {"name": "resnet"}, "spec": {"completions": 3}, "status": {}}
    assert "job resnet 0 of 3 done" in text_of(job)
    job["status"] = {"succeeded": 1, "failed": 2}
    assert "1 of 3 done, 2 failed" in text_of(job)
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 2"}
    job["status"]["conditions"] = [{"type": "FailureTarget", "status": "True"}, failed]
    assert "job resnet Failed PodFailurePolicy: exit code 2" in text_of(job)


def test_long_reasons_go_on_below_and_no_line_is_wider_than_a_terminal() -> None:
    lines = status(pod(conditions=[unscheduled("word " * 60)]), pod("b", phase="Running"))
    assert all(len(line) <= 110 for line in lines)
    assert "\n".join(lines).count("word") == 60
