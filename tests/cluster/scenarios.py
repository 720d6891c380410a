"""What the project promises on a cluster, one function a promise.

Where nothing may be counted, Jobs have a back-off limit of 0: a single counted failure ends them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tests.cluster.kubectl import (
    Object,
    check,
    exit_codes,
    is_training,
    phase_of,
)
from tests.cluster.suite import OURS, START_SECONDS, Scenario, Skipped, Suite
from tests.cluster.variants import Variant

SCENARIOS: dict[str, Scenario] = {}
NOTHING_COUNTED: dict[str, Any] = {"backoffLimit": 0}
SIGKILL = 9


def scenario(function: Scenario) -> Scenario:
    """Add a scenario, named as the function."""
    SCENARIOS[function.__name__.replace("_", " ")] = function
    return function


# --- the ordinary way


@scenario
def undisturbed(suite: Suite) -> None:
    """One run that nobody disturbs: what the disturbed ones must equal."""
    variant = Variant("undisturbed", job=NOTHING_COUNTED)
    suite.apply(variant)
    suite.completes("resnet")
    suite.undisturbed["one"] = suite.outcome(variant)


@scenario
def both_networks_side_by_side_with_tensorboard(suite: Suite) -> None:
    """Applied twice, both train at once; TensorBoard serves both, a rerun finds both, delete keeps them."""
    variant = Variant("both", jobs=("data", "resnet", "plainnet"), tensorboard=True)
    suite.apply(variant)
    again = suite.apply(variant)
    for name in ("resnet", "plainnet", "data"):
        check(f"job.batch/{name} unchanged" in again, f"applied again, {name} is not unchanged: {again}")
    suite.cluster.wait(START_SECONDS, "both networks training at once", lambda: _both_train(suite))
    for name in ("resnet", "plainnet"):
        suite.completes(name)
    _tensorboard_shows(suite, variant)
    suite.must("k8s-rerun", variant)
    for name in ("resnet", "plainnet"):
        suite.completes(name)
        (pod,) = suite.cluster.pods(name)
        check("already complete" in suite.cluster.logs(pod["metadata"]["name"]), f"{name} trained again")
    suite.must("k8s-delete")
    check(not suite.cluster.all_of("jobs"), "k8s-delete left Jobs")
    check(suite.cluster.all_of("persistentvolumeclaims"), "k8s-delete took the volume")
    suite.must("k8s-fetch", None, f"TO={suite.folder}")
    left = sorted(each.name for each in (suite.folder / variant.name).iterdir())
    check(len(left) == 2, f"fetched with no Job left: {left}, not both runs")


def _both_train(suite: Suite) -> bool:
    return all(any(is_training(pod) for pod in suite.cluster.pods(name)) for name in ("resnet", "plainnet"))


def _tensorboard_shows(suite: Suite, variant: Variant) -> None:
    suite.cluster.ask("rollout", "status", "deployment/tensorboard", "--timeout=3m")
    with _forwarded(suite, "service/tensorboard", 6006) as port:

        def found() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=10) as answer:
                runs: list[str] = json.load(answer)
            return all(any(name in run for run in runs) for name in ("resnet", "plainnet"))

        suite.cluster.wait(60, "TensorBoard showing both networks", lambda: _quietly(found))


def _quietly(question: Any) -> Any:
    try:
        return question()
    except OSError:
        return None


@contextmanager
def _forwarded(suite: Suite, target: str, port: int) -> Iterator[int]:
    """A local port that leads to a port of the cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        local: int = free.getsockname()[1]
    command = [*suite.cluster.command, "port-forward", target, f"{local}:{port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as forwarding:
        try:
            yield local
        finally:
            forwarding.terminate()


@scenario
def training_waits_for_the_data_without_a_node(suite: Suite) -> None:
    """While the Job data runs, no training pod is on any node; then it is, without anybody's help."""
    slow = {"command": ["sh", "-c", "sleep 25"]}
    suite.apply(Variant("gate", jobs=("data", "resnet"), data=slow))
    suite.cluster.wait(START_SECONDS, "the data's pod", lambda: _data_first(suite))
    suite.cluster.wait(20, "k8s-status saying so", lambda: _status_names(suite, "waits for the Job data"))
    while _data_first(suite):
        time.sleep(1)
    suite.completes("resnet")


def _data_first(suite: Suite) -> bool:
    """Whether the data's pod runs; until it has ended, no training pod may have a node."""
    placed = [pod for pod in suite.cluster.pods("resnet") if "nodeName" in pod["spec"]]
    phases = _phases(suite, "data")  # asked last: once it has ended, the other may be placed
    check(not placed or phases == ["Succeeded"], f"resnet has a node too early: {suite.cluster.summary()}")
    return phases == ["Running"]


def _phases(suite: Suite, job: str) -> list[str]:
    return [phase_of(pod) for pod in suite.cluster.pods(job)]


# --- interruptions


def _disturbed(suite: Suite, name: str, disturb: Any, **changes: Any) -> None:
    """A run that is disturbed once in its fifth epoch completes with the undisturbed bits."""
    variant = replace(Variant(name, job=NOTHING_COUNTED), **changes)
    suite.apply(variant)
    disturb(suite, suite.pod_at_epoch("resnet", 5))
    suite.completes("resnet")
    suite.same_bits(variant, "one")


@scenario
def delete_a_pod_that_trains(suite: Suite) -> None:
    _disturbed(suite, "deleted", lambda suite, pod: suite.cluster.ask("delete", "pod", pod))


@scenario
def delete_a_pod_right_after_its_start(suite: Suite) -> None:
    """Between two containers it may have no exit code but 0, and then it is counted."""
    variant = Variant("early", job={"backoffLimit": 1})
    suite.apply(variant)

    def running() -> Object | None:
        return next((pod for pod in suite.cluster.pods("resnet") if _has_started(pod)), None)

    pod = suite.cluster.wait(START_SECONDS, "the start of a pod", running)
    suite.cluster.ask("delete", "pod", pod["metadata"]["name"])
    suite.completes("resnet")
    names = [each["metadata"]["name"] for each in suite.cluster.pods("resnet")]
    check(pod["metadata"]["name"] not in names, "the deleted pod is still there")
    suite.same_bits(variant, "one", attempts=1)


def _has_started(pod: Object) -> bool:
    """Whether its first container runs, or has ended already: it is done within a second."""
    states = pod["status"].get("initContainerStatuses", [])
    return any("waiting" not in each.get("state", {"waiting": {}}) for each in states)


@scenario
def delete_a_pod_that_fetches(suite: Suite) -> None:
    """The source refuses every connection, so the Job data is at work until it is stopped."""
    nowhere = {
        "args": ["data", "fetch", "--from", "author", "--to", "/data"],
        "env": [{"name": "JOB_ARCHIVE_URL", "value": "http://127.0.0.1:1/cifar-10-binary.tar.gz"}],
    }
    suite.apply(Variant("fetching", jobs=("data",), data=nowhere, job=NOTHING_COUNTED))
    suite.cluster.wait(START_SECONDS, "the data's pod", lambda: _phases(suite, "data") == ["Running"])
    time.sleep(4)  # its imports are done, and its libraries' threads are there
    (pod,) = suite.cluster.pods("data")
    suite.cluster.ask("delete", "pod", pod["metadata"]["name"])

    def another() -> bool:
        there = suite.cluster.get("job", "data") or {}
        check(not there.get("status", {}).get("failed"), "the stopped fetch was counted as a failure")
        names = [each["metadata"]["name"] for each in suite.cluster.pods("data")]
        return bool(names) and pod["metadata"]["name"] not in names

    suite.cluster.wait(60, "another pod that fetches", another)


@scenario
def evict_a_pod(suite: Suite) -> None:
    _disturbed(suite, "evicted", _evict)


def _evict(suite: Suite, pod: str) -> None:
    metadata = {"name": pod, "namespace": suite.cluster.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{suite.cluster.namespace}/pods/{pod}/eviction"
    suite.cluster.ask("create", "--raw", path, "-f", "-", given=json.dumps(eviction))


@scenario
def drain_a_node(suite: Suite) -> None:
    """Only this suite's pods leave; the node takes pods again at once."""
    if len(suite.nodes()) < 2:
        raise Skipped("needs two nodes")
    _disturbed(suite, "drained", _drain)


def _drain(suite: Suite, pod: str) -> None:
    found = suite.cluster.get("pod", pod)
    check(found, f"{pod} is gone")
    node = (found or {})["spec"]["nodeName"]
    try:
        options = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")
        suite.cluster.ask("drain", node, f"--pod-selector={OURS}", *options)
    finally:
        suite.cluster.ask("uncordon", node)


@scenario
def preempt_a_pod(suite: Suite) -> None:
    """A pod of a higher class asks for what is free and for the training pod's share."""
    _disturbed(suite, "preempted", _preempt)


def _preempt(suite: Suite, pod: str) -> None:
    found = suite.cluster.get("pod", pod)
    check(found, f"{pod} is gone")
    node = (found or {})["spec"]["nodeName"]
    name = f"{suite.cluster.namespace}-urgent"
    urgent = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}}
    suite.cluster.ask("create", "-f", "-", given=json.dumps({**urgent, "value": 1}))
    try:
        millis = _free_cpu(suite, node) + _cpu_of(found or {}) - 10
        suite.cluster.ask("create", "-f", "-", given=json.dumps(_urgent_pod(found or {}, name, node, millis)))
        suite.cluster.wait(120, "the urgent pod on the node", lambda: _is_placed(suite, "urgent"))
    finally:
        suite.cluster.ask("delete", "pod", "urgent", "--ignore-not-found")
        suite.cluster.ask("delete", "priorityclass", name, "--ignore-not-found")


def _is_placed(suite: Suite, name: str) -> bool:
    pod = suite.cluster.get("pod", name) or {"spec": {}}
    return "nodeName" in pod["spec"]


def _urgent_pod(like: Object, priority: str, node: str, millis: int) -> Object:
    container = {
        "name": "urgent",
        "image": like["spec"]["containers"][0]["image"],
        "command": ["sleep", "600"],
        "securityContext": like["spec"]["containers"][0]["securityContext"],
        "resources": {"requests": {"cpu": f"{millis}m"}},
    }
    spec = {
        "priorityClassName": priority,
        "nodeSelector": {"kubernetes.io/hostname": node},
        "terminationGracePeriodSeconds": 1,
        "securityContext": like["spec"]["securityContext"],
        "containers": [container],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "urgent"}, "spec": spec}


def _free_cpu(suite: Suite, node: str) -> int:
    """Thousandths of a CPU of a node that no pod requests."""
    found = suite.cluster.get("node", node) or {}
    text = suite.cluster.ask("get", "pods", "-A", f"--field-selector=spec.nodeName={node}", "-o", "json")
    active = [pod for pod in json.loads(text)["items"] if phase_of(pod) not in ("Succeeded", "Failed")]
    return millis_of(found["status"]["allocatable"]["cpu"]) - sum(map(_cpu_of, active))


def _cpu_of(pod: Object) -> int:
    """Thousandths of a CPU that a pod requests."""

    def requested(containers: list[Object]) -> list[int]:
        return [
            millis_of(each.get("resources", {}).get("requests", {}).get("cpu", "0")) for each in containers
        ]

    spec = pod["spec"]
    return max([sum(requested(spec["containers"])), *requested(spec.get("initContainers", []))])


def millis_of(amount: str) -> int:
    """Thousandths of a CPU in Kubernetes' notation."""
    return int(amount[:-1]) if amount.endswith("m") else int(1000 * float(amount))


# --- failures


def _kill(suite: Suite, pod: str) -> None:
    """SIGKILL the job's process; pods that share their processes let another one do so."""
    program = (
        "import os, pathlib\n"
        "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    if path.read_bytes().split(b'\\0')[1:4] == [b'-m', b'job', b'train']:\n"
        f"        os.kill(int(path.parent.name), {SIGKILL})\n"
    )
    suite.cluster.ask("exec", pod, "-c", "train", "--", "python", "-c", program)


@scenario
def kill_the_process(suite: Suite) -> None:
    """SIGKILL is a failure that is counted, and the next pod continues."""
    shared = {"shareProcessNamespace": True}
    _disturbed(suite, "killed", _kill, pod=shared, job={"backoffLimit": 1})
    ends = [exit_codes(pod)[-1] for pod in suite.cluster.pods("resnet")]
    check(ends == [137, 0], f"the pods ended with {ends}, not with 137 and 0")


def _fails(suite: Suite, variant: Variant, code: int, reason: str) -> None:
    suite.apply(variant)
    ended = suite.end("resnet")
    check(ended == ("Failed", reason), f"ended as {ended}, not as Failed, {reason}")
    if code:
        pods = suite.cluster.pods("resnet")
        check(len(pods) == 1, f"{len(pods)} pods tried it, not one")
        check(exit_codes(pods[0])[-1] == code, f"ended with {exit_codes(pods[0])}, not with {code}")


@scenario
def run_out_of_memory(suite: Suite) -> None:
    little = {"resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "150Mi"}}}
    _fails(suite, Variant("oom", train=little, job=NOTHING_COUNTED), 137, "BackoffLimitExceeded")


@scenario
def pass_the_deadline(suite: Suite) -> None:
    late = {"activeDeadlineSeconds": 30, "backoffLimit": 0}
    endless = {"JOB_EPOCHS": "100000"}
    _fails(suite, Variant("deadline", endless, job=late), 0, "DeadlineExceeded")


@scenario
def a_wrong_option(suite: Suite) -> None:
    _fails(suite, Variant("wrong", {"JOB_EPOCHS": "0"}), 2, "PodFailurePolicy")


@scenario
def missing_data(suite: Suite) -> None:
    _fails(suite, Variant("missing", {"JOB_DATA": "/nowhere"}), 66, "PodFailurePolicy")


@scenario
def a_required_gpu_that_is_missing(suite: Suite) -> None:
    settings = {"JOB_REQUIRE_GPU": "true"}
    _fails(suite, Variant("gpu", settings, job=NOTHING_COUNTED), 69, "BackoffLimitExceeded")


@scenario
def a_run_of_another_identity(suite: Suite) -> None:
    settings = {"JOB_RUN_NAME": "one", "JOB_EPOCHS": "2", "JOB_OUTPUT": "/runs/identity"}
    suite.apply(Variant("identity", settings))
    suite.completes("resnet")
    suite.clear()
    _fails(suite, Variant("identity", {**settings, "JOB_SEED": "1"}), 73, "PodFailurePolicy")


# --- several pods of one Job


@scenario
def one_of_three_seeds_diverges(suite: Suite) -> None:
    """The others complete; the Job fails for that one alone."""
    diverging = (
        'if [ "$JOB_COMPLETION_INDEX" = 1 ]; then export JOB_LEARNING_RATE=1e30; fi; exec python -m job "$@"'
    )
    command = {"command": ["sh", "-c", diverging, "sh"]}
    variant = Variant("seeds", {"JOB_EPOCHS": "5"}, components=("cpu", "seeds"), train=command)
    suite.apply(variant)
    suite.end("resnet")
    status = (suite.cluster.get("job", "resnet") or {})["status"]
    seeds = (status.get("completedIndexes"), status.get("failedIndexes"))
    check(seeds == ("0,2", "1"), f"completed and failed seeds are {seeds}")


WORKERS = Variant(
    "workers",
    components=("cpu", "multi-worker"),
    pod={"shareProcessNamespace": True},
    job={"backoffLimit": 6},
)


@scenario
def undisturbed_workers(suite: Suite) -> None:
    suite.apply(WORKERS)
    suite.completes("resnet")
    suite.undisturbed["workers"] = suite.outcome(WORKERS)


@scenario
def kill_a_worker(suite: Suite) -> None:
    _kill_one(suite, "worker-killed", 1)


@scenario
def kill_the_chief(suite: Suite) -> None:
    _kill_one(suite, "chief-killed", 0)


def _kill_one(suite: Suite, name: str, index: int) -> None:
    variant = replace(WORKERS, name=name)
    suite.apply(variant)
    suite.pod_at_epoch("resnet", 5, index=0)  # the chief tells
    (pod,) = [each for each in suite.cluster.pods("resnet") if _index(each) == index]
    _kill(suite, pod["metadata"]["name"])
    suite.completes("resnet")
    suite.same_bits(variant, "workers")
    lost = [exit_codes(each) for each in suite.cluster.pods("resnet") if _index(each) != index]
    check(any(codes[-1:] == [69] for codes in lost), f"the other worker ended with {lost}, never with 69")


def _index(pod: Object) -> int:
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


# --- changes under a running Job


@scenario
def settings_changed_while_running(suite: Suite) -> None:
    """Refused by make and by the cluster; the run stays what it was, also in the pod after an eviction."""
    variant = Variant("changed", job=NOTHING_COUNTED)
    suite.apply(variant)
    pod = suite.pod_at_epoch("resnet", 5)
    other = replace(variant, settings={"JOB_SEED": "7", "JOB_OUTPUT": variant.output})
    refused = suite.make("k8s-apply", other)
    check(refused.returncode != 0, "make k8s-apply took other settings")
    check("make k8s-rerun" in refused.stderr, f"it does not say what to do: {refused.stderr[-300:]}")
    rendered = suite.must("k8s-render", other)
    raw = suite.cluster.run("apply", "-f", "-", given=rendered)
    check(raw.returncode != 0, "kubectl apply took other settings")
    _evict(suite, pod)
    suite.completes("resnet")
    suite.same_bits(variant, "one")


@scenario
def a_new_tag(suite: Suite) -> None:
    """Refused under a running Job; a rerun takes it, and the status says that it cannot be pulled."""
    variant = Variant("tag", {"JOB_EPOCHS": "100000"})
    suite.apply(variant)
    suite.pod_at_epoch("resnet", 1)
    image = "IMAGE=registry.invalid/cifar-residual-job:new"
    check(suite.make("k8s-apply", variant, image).returncode != 0, "make k8s-apply took another image")
    suite.must("k8s-rerun", variant, image)
    job = suite.cluster.get("job", "resnet") or {}
    found = job["spec"]["template"]["spec"]["containers"][0]["image"]
    check(found == image.removeprefix("IMAGE="), f"the Job's image is {found}")
    suite.cluster.wait(120, "k8s-status naming the image", lambda: _status_names(suite, "registry.invalid"))


@scenario
def apply_again_what_a_queue_started(suite: Suite) -> None:
    """Kueue suspends a Job when it is made, and starts it; applied again, it goes on."""
    variant = Variant("queued", {"JOB_EPOCHS": "100000"}, components=("cpu", "kueue"))
    suite.apply(variant)
    if suite.cluster.ask("api-resources", "--api-group=kueue.x-k8s.io", "-o", "name").strip():
        raise Skipped("Kueue is here, and would wait for a queue that this namespace lacks")
    for suspended in (True, False):  # as Kueue does
        suite.cluster.ask("patch", "job", "resnet", "-p", json.dumps({"spec": {"suspend": suspended}}))
    pod = suite.pod_at_epoch("resnet", 1)
    suite.apply(variant)
    check(not (suite.cluster.get("job", "resnet") or {})["spec"]["suspend"], "applied again, it is suspended")
    check(is_training(suite.cluster.get("pod", pod) or {"status": {}}), "applied again, its pod has ended")


def _status_names(suite: Suite, words: str) -> bool:
    return words in suite.must("k8s-status")
