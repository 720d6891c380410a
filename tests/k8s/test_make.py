"""The make targets for a cluster, with a stand-in for kubectl that logs what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from job import __version__
from tests.k8s.manifests import NAMESPACE, OVERLAYS, ROOT, documents, load, rendered, tool

DATA = "app.kubernetes.io/component=data"
DIGEST = "sha256:" + 64 * "a"
Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run make; kubectl's calls become lines of ``calls``, what is applied lands in ``applied.yaml``."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f"""#!/bin/sh
asked_before() {{ grep -q "$1" {tmp_path}/calls 2>/dev/null; }}
case "$*" in
    kustomize*) exec {tool("kubectl")} "$@" ;;
    *"get namespace"*) printf "$FOUND" ;;
    *"--dry-run=server"*) test -z "$REFUSAL" || {{ cat "$REFUSAL" >&2; code=1; }} ;;
    *"apply -f "*) cp build/k8s/rendered.yaml {tmp_path}/applied.yaml ;;
    *events*) printf '%s' "$FOUND" ;;
    *availableReplicas*) printf "$AVAILABLE" ;;
    *"get jobs -l {DATA} "*) printf "$WAITING" ;;
    *"get jobs,pods -l {DATA} "*) asked_before "get jobs,pods" && printf node-1 ;;
    *"get jobs"*) printf "$JOBS" ;;
    *"get pods"*)
        printf '%s' "$STATES"
        asked_before "get pods" && echo '{{"running":{{}}}}'
        test -z "$REFUSED" || code=1 ;;
esac
echo "$*" >> {tmp_path}/calls
exit $code
"""
    )
    kubectl.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {"AVAILABLE": "", "JOBS": "", "WAITING": "", "STATES": "", "FOUND": "", "REFUSAL": ""} | {
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
    ("arguments", "job_image", "board_image"),
    [
        (["IMAGE=cifar-residual-job"], "cifar-residual-job:OWN", "cifar-residual-job-tensorboard:OWN"),
        (["IMAGE=r.example:5000/x/job"], "r.example:5000/x/job:OWN", "r.example:5000/x/job-tensorboard:OWN"),
        (["IMAGE=r.example/job:2"], "r.example/job:2", "r.example/job-tensorboard:2"),
        (["IMAGE=r.example:5000/x/job:2"], "r.example:5000/x/job:2", "r.example:5000/x/job-tensorboard:2"),
        (
            ["IMAGE=r.example/cifar-residual-job:2"],
            "r.example/cifar-residual-job:2",
            "r.example/cifar-residual-job-tensorboard:2",
        ),
        ([f"IMAGE=r:5000/job@{DIGEST}"], f"r:5000/job@{DIGEST}", "r:5000/job-tensorboard:OWN"),
        ([f"IMAGE=r:5000/job:2@{DIGEST}"], f"r:5000/job@{DIGEST}", "r:5000/job-tensorboard:2"),
        (
            [f"IMAGE=r/job@{DIGEST}", f"BOARD_IMAGE=r/board@{DIGEST}"],
            f"r/job@{DIGEST}",
            f"r/board@{DIGEST}",
        ),
    ],
)
def test_one_image_names_both(
    make: Make, tmp_path: Path, arguments: list[str], job_image: str, board_image: str
) -> None:
    finished = make("k8s-apply", *arguments)
    assert finished.returncode == 0, finished.stderr
    applied = (tmp_path / "applied.yaml").read_text()
    assert images(applied) == {each.replace("OWN", __version__) for each in (job_image, board_image)}
    without_images = re.compile(r"image: .*")
    assert without_images.sub("", applied) == without_images.sub("", rendered("base"))
    assert make("-s", "k8s-render", *arguments).stdout == applied


def test_no_instruction_edits_a_file_by_sed() -> None:
    """`sed -i` is another program on macOS, and an edited file is no longer the one that was committed."""
    assert "sed -i" not in (ROOT / "k8s/README.md").read_text()


IMMUTABLE = """\
Error from server (Invalid): error when applying patch:
{"spec":{"template":{"spec":{"$setElementOrder/containers":[{"name":"train"}]}}}}
to:
Resource: "batch/v1, Resource=jobs", GroupVersionKind: "batch/v1, Kind=Job"
Name: "resnet", Namespace: "cifar-residual-job"
for: "rendered.yaml": error when patching "rendered.yaml": Job.batch "resnet" is invalid: \
spec.template: Invalid value: {"metadata":{"creationTimestamp":null}}: field is immutable
Error from server (Invalid): error when patching "rendered.yaml": ConfigMap "settings" is invalid: \
data: Forbidden: field is immutable when `immutable` is set
"""


def test_what_cannot_change_under_a_job_is_refused_before_anything_is_applied(
    make: Make, tmp_path: Path
) -> None:
    refusal = tmp_path / "refusal"
    refusal.write_text(IMMUTABLE)
    finished = make("k8s-apply", "OVERLAY=cpu", FOUND="namespace/cifar-residual-job", REFUSAL=str(refusal))
    assert finished.returncode != 0
    (sentence,) = [line for line in finished.stderr.splitlines() if not line.startswith("make: ***")]
    assert sentence.startswith("Nothing was applied: ")
    assert "has resnet, settings already" in sentence
    assert sentence.endswith(": make k8s-rerun OVERLAY=cpu")
    assert not (tmp_path / "applied.yaml").exists()
    assert [call.split()[0] for call in calls(tmp_path)] == ["get", "apply"]
    assert "--dry-run=server" in calls(tmp_path)[-1]


def test_any_other_refusal_is_shown_as_it_is(make: Make, tmp_path: Path) -> None:
    refusal = tmp_path / "refusal"
    refusal.write_text('Error from server (Forbidden): jobs.batch is forbidden: User "x" cannot patch\n')
    finished = make("k8s-apply", FOUND="namespace/cifar-residual-job", REFUSAL=str(refusal))
    assert finished.returncode != 0
    assert refusal.read_text() in finished.stderr
    assert "rerun" not in finished.stderr
    assert not (tmp_path / "applied.yaml").exists()


def test_the_server_is_not_asked_about_a_namespace_that_does_not_exist_yet(
    make: Make, tmp_path: Path
) -> None:
    assert make("k8s-apply").returncode == 0
    assert not any("--dry-run" in call for call in calls(tmp_path))
    assert (tmp_path / "applied.yaml").exists()


def test_a_cluster_can_be_named(make: Make, tmp_path: Path) -> None:
    for target in ("k8s-apply", "k8s-rerun", "k8s-delete", "k8s-status"):
        assert make(target, "CONTEXT=kind-x", FOUND='{"items": []}').returncode == 0
    assert all("--context kind-x" in call for call in calls(tmp_path))


def test_the_suite_for_a_cluster_never_takes_the_current_one_by_accident(make: Make) -> None:
    finished = make("test-cluster")
    assert finished.returncode == 2
    assert "CONTEXT must name a cluster" in finished.stderr


def test_an_unknown_overlay_is_refused_with_the_known_ones(make: Make, tmp_path: Path) -> None:
    for target in ("k8s-apply", "k8s-rerun"):
        finished = make(target, "OVERLAY=moon")
        assert finished.returncode == 2
        assert " ".join(OVERLAYS) in finished.stderr
        assert "moon" in finished.stderr
    assert calls(tmp_path) == []


@pytest.mark.parametrize("target", ["k8s-apply", "k8s-rerun", "k8s-render"])
def test_a_forgotten_placeholder_stops_everything_and_names_the_file(
    make: Make, tmp_path: Path, target: str
) -> None:
    finished = make(target, "OVERLAY=gcs")
    assert finished.returncode == 2
    assert "k8s/components/gcs/settings.yaml" in finished.stderr
    assert (ROOT / "k8s/components/gcs/settings.yaml").is_file()
    assert [call for call in calls(tmp_path) if not call.startswith("kustomize")] == []


@pytest.mark.parametrize("target", ["k8s-apply", "k8s-rerun"])
def test_no_training_pod_may_come_before_the_datas_pod_has_a_node(
    make: Make, tmp_path: Path, target: str
) -> None:
    """Else it would fetch the data itself, with its GPU in hand, and keep the data's pod waiting."""
    finished = make(target, WAITING="job.batch/data")
    assert finished.returncode == 0, finished.stderr
    asked = [call for call in calls(tmp_path) if DATA in call or call.startswith("apply ")]
    first, job, *placed, last = asked
    assert first == "apply -f build/k8s/rendered.yaml -l app.kubernetes.io/component!=training"
    assert job == f"get jobs -l {DATA} -o name"
    assert len(placed) == 2
    assert all(call.startswith(f"get jobs,pods -l {DATA} -o jsonpath=") for call in placed)
    assert last == "apply -f build/k8s/rendered.yaml"


def test_what_is_applied_first_is_all_but_the_training_jobs() -> None:
    for variant in ("base", *OVERLAYS):
        labels = [manifest["metadata"].get("labels", {}) for manifest in load(variant).all]
        held = [each for each in labels if each.get("app.kubernetes.io/component") == "training"]
        assert sorted(each["app.kubernetes.io/name"] for each in held) == ["plainnet", "resnet"]


def test_rerun_deletes_jobs_and_settings_before_it_applies(make: Make, tmp_path: Path) -> None:
    finished = make("k8s-rerun", "OVERLAY=seeds")
    assert finished.returncode == 0, finished.stderr
    delete, *_, apply = calls(tmp_path)
    kinds = "jobs,deployments,configmaps"  # none of whose content can change in place
    assert delete == (
        f"delete {kinds} -l app.kubernetes.io/part-of={NAMESPACE} --cascade=foreground --ignore-not-found"
    )
    assert apply == "apply -f build/k8s/rendered.yaml"
    assert documents((tmp_path / "applied.yaml").read_text()) == load("seeds").all


def test_delete_keeps_namespace_and_volume_unless_all_shall_go(make: Make, tmp_path: Path) -> None:
    assert make("k8s-delete").returncode == 0
    (kinds,) = re.findall(r"^delete (\S+) -l ", "\n".join(calls(tmp_path)), re.MULTILINE)
    applied = {manifest["kind"].lower() for manifest in load("multi-worker").all}
    deleted = {re.sub("ies$", "y", kind).removesuffix("s") for kind in kinds.split(",")}
    assert deleted == applied - {"namespace", "persistentvolumeclaim"}

    assert make("k8s-delete", "ALL=1").returncode == 0
    selected = f"-l app.kubernetes.io/part-of={NAMESPACE} --field-selector metadata.name={NAMESPACE}"
    assert calls(tmp_path)[1:] == [f"delete namespaces {selected} --ignore-not-found"]


def test_logs_are_those_of_one_network(make: Make, tmp_path: Path) -> None:
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
    finished = make("k8s-logs", "MODEL=resnet", "ARGS=--follow", STATES='{"waiting":{}}')
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("resnet does not train yet") == 1
    *asked, last = calls(tmp_path)
    assert len(asked) == 2
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


def test_status_asks_for_all_that_can_say_why_something_waits(make: Make, tmp_path: Path) -> None:
    finished = make("k8s-status", FOUND='{"items": []}')
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "Nothing is there: make k8s-apply starts everything.\n"
    assert calls(tmp_path) == ["get jobs,pods,persistentvolumeclaims,events -o json"]
