"""The make targets for a cluster, with a stand-in for kubectl that logs what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.k8s.manifests import NAMESPACE, OVERLAYS, ROOT, documents, load, rendered, tool

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run make; kubectl's calls become lines of ``calls``, what is applied lands in ``applied.yaml``."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f"""#!/bin/sh
case "$*" in
    kustomize*) exec {tool("kubectl")} "$@" ;;
    "apply -f -") cat > {tmp_path}/applied.yaml ;;
    *availableReplicas*) printf "$AVAILABLE" ;;
    *"get jobs"*) printf "$JOBS" ;;
    *"get pods"*)
        printf '%s' "$STATES"
        test ! -e {tmp_path}/started || echo '{{"running":{{}}}}'
        test -z "$REFUSED" || code=1 ;;
esac
echo "$*" >> {tmp_path}/calls
exit $code
"""
    )
    kubectl.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {"AVAILABLE": "", "JOBS": "", "STATES": ""} | {
            name: value for name, value in os.environ.items() if name in ("PATH", "HOME")
        }
        return subprocess.run(
            ["make", *arguments, f"KUBECTL={kubectl}"],
            cwd=ROOT,
            env=kept | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def calls(folder: Path) -> list[str]:
    """What kubectl was asked, without the namespace that it was asked about."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [line.removeprefix(f"--namespace {NAMESPACE} ") for line in lines]


def images(text: str) -> set[str]:
    return set(re.findall(r"image: (\S+)", text))


@pytest.mark.parametrize("overlay", ["", "cpu"])
def test_apply_sends_the_manifests_as_they_are(make: Make, tmp_path: Path, overlay: str) -> None:
    finished = make("k8s-apply", f"OVERLAY={overlay}")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "applied.yaml").read_text() == rendered(overlay or "base")


@pytest.mark.parametrize(
    ("image", "name", "tag"),
    [
        ("registry.example:5000/jobs/cifar", "registry.example:5000/jobs/cifar", None),
        ("registry.example:5000/jobs/cifar:9.9", "registry.example:5000/jobs/cifar", "9.9"),
        ("cifar-residual-job", "cifar-residual-job", None),
    ],
)
def test_one_image_names_both(make: Make, tmp_path: Path, image: str, name: str, tag: str | None) -> None:
    finished = make("k8s-apply", f"IMAGE={image}")
    assert finished.returncode == 0, finished.stderr
    applied = (tmp_path / "applied.yaml").read_text()
    own = load("base").training_pods[0].containers[0]["image"].partition(":")[2]
    assert images(applied) == {f"{name}:{tag or own}", f"{name}-tensorboard:{tag or own}"}
    without_images = re.compile(r"image: .*")
    assert without_images.sub("", applied) == without_images.sub("", rendered("base"))


def test_an_unknown_overlay_is_refused_with_the_known_ones(make: Make, tmp_path: Path) -> None:
    for target in ("k8s-apply", "k8s-rerun"):
        finished = make(target, "OVERLAY=moon")
        assert finished.returncode == 2
        assert " ".join(OVERLAYS) in finished.stderr
        assert "moon" in finished.stderr
    assert calls(tmp_path) == []


def test_rerun_deletes_jobs_and_pods_before_it_applies(make: Make, tmp_path: Path) -> None:
    finished = make("k8s-rerun", "OVERLAY=seeds")
    assert finished.returncode == 0, finished.stderr
    delete, apply = calls(tmp_path)
    assert delete == (
        f"delete jobs,pods -l app.kubernetes.io/part-of={NAMESPACE} --cascade=foreground --ignore-not-found"
    )
    assert apply == "apply -f -"
    assert documents((tmp_path / "applied.yaml").read_text()) == load("seeds").all


def test_delete_keeps_namespace_and_volume_unless_all_shall_go(make: Make, tmp_path: Path) -> None:
    assert make("k8s-delete").returncode == 0
    (kinds,) = re.findall(r"^delete (\S+) -l ", "\n".join(calls(tmp_path)), re.MULTILINE)
    applied = {manifest["kind"].lower() for manifest in load("multi-worker").all}
    deleted = {re.sub("ies$", "y", kind).removesuffix("s") for kind in kinds.split(",")}
    assert deleted == applied - {"namespace", "persistentvolumeclaim"}

    assert make("k8s-delete", "ALL=1").returncode == 0
    assert calls(tmp_path)[1:] == [f"delete namespace {NAMESPACE} --ignore-not-found"]


def test_logs_are_those_of_one_network(make: Make, tmp_path: Path) -> None:
    (tmp_path / "started").touch()
    assert make("k8s-logs", "MODEL=plainnet", "ARGS=--since=1h").returncode == 0
    (call,) = calls(tmp_path)
    assert call.startswith("logs -l app.kubernetes.io/component=training,app.kubernetes.io/name=plainnet ")
    assert call.endswith(" --since=1h")
    (pod,) = (pod for pod in load("base").training_pods if pod.name == "plainnet")
    assert pod.labels["app.kubernetes.io/component"] == "training"
    refused = make("k8s-logs")
    assert refused.returncode == 2
    assert "make k8s-logs MODEL=resnet" in refused.stderr


@pytest.mark.parametrize(
    "states", ['Failed{"waiting":{}}', 'Running{"running":{}}', 'Failed{"terminated":{}}']
)
def test_logs_are_followed_at_once_where_there_are_any(make: Make, tmp_path: Path, states: str) -> None:
    make("k8s-logs", "MODEL=resnet", "ARGS=--follow", STATES=states)
    assert [call.split()[0] for call in calls(tmp_path)] == ["get", "logs"]


def test_logs_are_not_waited_for_where_the_cluster_does_not_answer(make: Make, tmp_path: Path) -> None:
    finished = make("k8s-logs", "MODEL=resnet", "ARGS=--follow", REFUSED="1")
    assert finished.returncode != 0
    assert [call.split()[0] for call in calls(tmp_path)] == ["get"]


def test_logs_are_followed_once_the_network_trains(make: Make, tmp_path: Path) -> None:
    def start() -> None:
        (tmp_path / "started").touch()

    starting = threading.Timer(1, start)
    starting.start()
    finished = make("k8s-logs", "MODEL=resnet", "ARGS=--follow", STATES='{"waiting":{}}')
    starting.join()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("resnet does not train yet") == 1
    *asked, last = calls(tmp_path)
    assert len(asked) >= 2
    assert all(call.startswith("get pods -l ") and "app.kubernetes.io/name=resnet" in call for call in asked)
    assert last.startswith("logs -l ")
    assert last.endswith(" --follow")


FREED = 'patch deployment tensorboard --type=merge -p {"spec":{"template":{"spec":{"affinity":null}}}}'


@pytest.mark.parametrize(
    ("available", "jobs", "freed"),
    [
        ("1", "resnet=\\nplainnet=True\\n", False),
        ("1", "resnet=True\\n", False),
        ("", "resnet=\\nplainnet=True\\n", False),  # it runs, or waits for a GPU or in a queue
        ("", "resnet=True\\nplainnet=True\\n", True),
        ("", "", True),
    ],
)
def test_tensorboard_is_freed_from_the_training_pods_only_when_every_job_has_ended(
    make: Make, tmp_path: Path, available: str, jobs: str, freed: bool
) -> None:
    finished = make("k8s-tensorboard", AVAILABLE=available, JOBS=jobs)
    assert finished.returncode == 0, finished.stderr
    assert (FREED in calls(tmp_path)) == freed
    assert calls(tmp_path)[-2:] == [
        "rollout status deployment/tensorboard --timeout=5m",
        "port-forward service/tensorboard 6006:6006",
    ]


def test_status_shows_what_the_manifests_make(make: Make, tmp_path: Path) -> None:
    assert make("k8s-status").returncode == 0
    (call,) = calls(tmp_path)
    assert call.startswith("get jobs,pods,deployments,persistentvolumeclaims ")
