"""The pods of the ``cpu`` overlay, run here from the rendered manifests: do they end as the cluster expects?"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import pods
from tests.k8s.manifests import Manifests, Pod, load
from tests.k8s.test_contract import decision

MODELS = ("resnet", "plainnet")


@pytest.fixture
def cpu() -> Manifests:
    return load("cpu")


def pod_of(manifests: Manifests, model: str) -> Pod:
    (found,) = (pod for pod in manifests.training_pods if pod.name == model)
    return found


def decided(pod: Pod, code: int) -> str:
    return decision(pod.owner["spec"]["podFailurePolicy"]["rules"], code)


def results(root: Path) -> list[dict[str, Any]]:
    """The results on the claim, which outlives pods."""
    return [json.loads(path.read_text()) for path in sorted((root / "claim").rglob("result.json"))]


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("JOB_EPOCHS", "many", 2),
        ("JOB_EPOCHS", "0", 2),
        ("JOB_BLOCKS", "3,x,3", 2),
        ("JOB_DATA", "/nowhere", 66),
        ("JOB_DATA", "/data", 66),  # mounted, but nobody has fetched
    ],
)
def test_a_wrong_setting_fails_the_job_at_once_and_says_why(
    cpu: Manifests, tmp_path: Path, name: str, value: str, code: int
) -> None:
    pod = pod_of(cpu, "resnet")
    ended, output = pods.run(pods.as_process, cpu, pod, tmp_path, **{name: value})
    assert (ended, decided(pod, ended)) == (code, "FailJob"), output
    assert value.removeprefix("/") in output


@pytest.mark.slow
def test_a_missing_gpu_is_counted(cpu: Manifests, tmp_path: Path) -> None:
    pod = pod_of(cpu, "resnet")
    ended, output = pods.run(
        pods.as_process, cpu, pod, tmp_path, JOB_REQUIRE_GPU="true", CUDA_VISIBLE_DEVICES=""
    )
    assert (ended, decided(pod, ended)) == (69, "count"), output
    assert "GPU" in output


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_pod_that_is_stopped_is_continued_by_the_next_one_to_the_end(
    cpu: Manifests, tmp_path: Path, model: str
) -> None:
    pod = pod_of(cpu, model)
    (init,), (train,) = pod.spec["initContainers"], pod.spec["containers"]
    assert pods.start(pods.as_process, cpu, pod, init, tmp_path).wait() == 0

    process = pods.start(pods.as_process, cpu, pod, train, tmp_path)
    assert process.stdout
    assert any(line.startswith("epoch 1/") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    stopped = time.monotonic()
    process.communicate(timeout=pod.spec["terminationGracePeriodSeconds"])
    assert (process.returncode, decided(pod, process.returncode)) == (75, "Ignore")
    assert time.monotonic() - stopped < float(cpu.environment(pod, train)["JOB_GRACE_SECONDS"])
    assert results(tmp_path) == []

    ended, output = pods.run(pods.as_process, cpu, pod, tmp_path)
    assert ended == 0, output
    assert "continuing from step" in output
    (result,) = results(tmp_path)
    assert (result["model"], result["layers"]) == (model, 20)
    assert result["epochs"] == int(cpu.environment(pod, train)["JOB_EPOCHS"])

    ended, output = pods.run(
        pods.as_process, cpu, pod, tmp_path
    )  # as after a Job was deleted and applied again
    assert ended == 0, output
    assert "already complete" in output
