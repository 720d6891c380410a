"""The pods of the ``cpu`` overlay, run here from the rendered manifests, end as the cluster expects."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.container.conftest import Images
from tests.container.engine import Engine
from tests.k8s import pods
from tests.k8s.manifests import Manifests, Pod, load
from tests.k8s.test_contract import decision

BUILD_SECONDS = 1800  # of the first test in a container, on a machine that has built nothing before


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


def check_result(manifests: Manifests, pod: Pod, root: Path) -> None:
    """The run that the pod's settings ask for is complete."""
    settings = manifests.environment(pod, pod.spec["containers"][0])
    (result,) = results(root)
    assert result["model"] == pod.name
    assert result["epochs"] == int(settings["JOB_EPOCHS"])
    assert result["blocks"] == [int(count) for count in settings["JOB_BLOCKS"].split(",")]


@pytest.fixture(
    params=[
        "process",
        pytest.param("container", marks=[pytest.mark.container, pytest.mark.timeout(BUILD_SECONDS)]),
    ]
)
def how(request: pytest.FixtureRequest) -> pods.Start:
    """How to start a container of a pod here."""
    if request.param == "process":
        return pods.as_process
    return pods.in_container(request.getfixturevalue("engine"), request.getfixturevalue("images").job)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("JOB_EPOCHS", "many", 2),
        ("JOB_EPOCHS", "0", 2),
        ("JOB_BLOCKS", "3,x,3", 2),
        ("JOB_DATA", "/nowhere", 66),
    ],
)
def test_a_wrong_setting_fails_the_job_at_once_and_says_why(
    cpu: Manifests, tmp_path: Path, how: pods.Start, name: str, value: str, code: int
) -> None:
    pod = pod_of(cpu, "resnet")
    ended, output = pods.run(how, cpu, pod, tmp_path, **{name: value})
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


def run_to_completion(how: pods.Start, manifests: Manifests, model: str, root: Path) -> None:
    """Run a pod, and once more as if its Job had been deleted and applied again."""
    pod = pod_of(manifests, model)
    ended, output = pods.run(how, manifests, pod, root)
    assert ended == 0, output
    check_result(manifests, pod, root)
    ended, output = pods.run(how, manifests, pod, root)
    assert ended == 0, output
    assert "already complete" in output


@pytest.mark.slow
def test_a_pod_runs_to_completion(cpu: Manifests, tmp_path: Path) -> None:
    run_to_completion(pods.as_process, cpu, "plainnet", tmp_path)


@pytest.mark.container
@pytest.mark.timeout(BUILD_SECONDS)
@pytest.mark.parametrize("model", ["resnet", "plainnet"])
def test_a_pod_runs_to_completion_as_containers(
    cpu: Manifests, tmp_path: Path, model: str, engine: Engine, images: Images
) -> None:
    run_to_completion(pods.in_container(engine, images.job), cpu, model, tmp_path)


@pytest.mark.container
@pytest.mark.timeout(BUILD_SECONDS)
def test_a_volume_that_the_user_may_not_write_to_fails_the_job(
    cpu: Manifests, tmp_path: Path, engine: Engine, images: Images
) -> None:
    """What the manifests' ``fsGroup`` prevents."""
    pod = pod_of(cpu, "resnet")
    how = pods.in_container(engine, images.job, fs_group=False)
    (tmp_path / "pod-resnet/spool").mkdir(parents=True)
    (tmp_path / "pod-resnet/spool").chmod(0o777)  # an emptyDir is for everyone
    ended, output = pods.run(how, cpu, pod, tmp_path)
    assert (ended, decided(pod, ended)) == (77, "FailJob"), output
    assert "fsGroup" in output


@pytest.mark.slow
def test_a_pod_that_is_stopped_ends_in_its_grace_and_the_next_one_continues(
    cpu: Manifests, tmp_path: Path
) -> None:
    pod = pod_of(cpu, "resnet")
    (init,), (train,) = pod.spec["initContainers"], pod.spec["containers"]
    with pods.start(pods.as_process, cpu, pod, init, tmp_path) as process:
        process.communicate()
    assert process.returncode == 0

    with pods.start(pods.as_process, cpu, pod, train, tmp_path) as process:
        assert process.stdout
        assert any("epoch 1/" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=float(cpu.environment(pod, train)["JOB_GRACE_SECONDS"]))
    assert (process.returncode, decided(pod, process.returncode)) == (75, "Ignore")
    assert results(tmp_path) == []

    ended, output = pods.run(pods.as_process, cpu, pod, tmp_path)
    assert ended == 0, output
    assert "continuing from step" in output
    check_result(cpu, pod, tmp_path)
