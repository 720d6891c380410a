"""``make k8s-fetch``, with a stand-in for kubectl that runs the pod's commands here, on a folder.

The commands are the real ones: find, sha256sum and tar. The stand-in breaks what a network may break.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job import __version__
from tests.k8s.manifests import ROOT, load

Fetch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Two runs on the cluster's volume; one model is a hard link to its checkpoint."""
    for run in ("resnet20", "plain net"):
        folder = tmp_path / "volume" / run
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "step-1.keras").write_bytes(os.urandom(300_000))
        (folder / "record.json").write_text("{}")
        os.link(folder / "checkpoints/step-1.keras", folder / "model.keras")
    return tmp_path / "volume"


@pytest.fixture
def fetch(tmp_path: Path, volume: Path) -> Fetch:
    """Run the target; ``state`` is what the cluster holds, ``before_tar`` a shell command."""

    def run(state: dict[str, Any], *, before_tar: str = "", after_tar: str = "", ready: str = "") -> Any:
        for name, found in state.items():
            (tmp_path / name).write_text(json.dumps(found))
        kubectl = tmp_path / "kubectl"
        kubectl.write_text(
            f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
shift 2  # --namespace NAME
case "$*" in
    "get deployment"*) cat {tmp_path}/deployment 2>/dev/null || true ;;
    "get persistentvolumeclaims"*) cat {tmp_path}/claims 2>/dev/null || true ;;
    create*) cat > {tmp_path}/pod ;;
    wait*) {ready or ":"} ;;
    exec*)
        for script; do :; done
        script="$(printf '%s' "$script" | sed 's#/runs#{volume}#g')"
        case "$script" in
            tar*) {before_tar or ":"}; sh -c "$script"{after_tar} ;;
            *) exec sh -c "$script" ;;
        esac ;;
esac
"""
        )
        kubectl.chmod(0o755)
        return subprocess.run(
            [
                "make",
                "-s",
                "k8s-fetch",
                f"TO={tmp_path / 'here'}",
                f"KUBECTL={kubectl}",
                f"PYTHON={sys.executable}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


DEPLOYMENT = load("base").get("Deployment", "tensorboard")
CLAIM = load("base").get("PersistentVolumeClaim", "volume")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_runs_arrive_whole_hard_links_too(fetch: Fetch, tmp_path: Path, volume: Path) -> None:
    finished = fetch({"deployment": DEPLOYMENT})
    assert finished.returncode == 0, finished.stderr
    assert files(tmp_path / "here") == files(volume)
    assert "6 files of 2 runs, all SHA-256 as in the cluster" in finished.stdout


def test_the_pod_reads_the_volume_where_it_is_and_goes(fetch: Fetch, tmp_path: Path) -> None:
    fetch({"deployment": DEPLOYMENT})
    pod = json.loads((tmp_path / "pod").read_text())
    (container,) = pod["spec"]["containers"]
    assert container["image"] == DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]["image"]
    assert container["volumeMounts"][0]["readOnly"] is True
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "volume"}
    # Beside the pods of a volume of one node, by the rule that they follow themselves.
    training = load("base").training_pods[0].spec["affinity"]["podAffinity"]
    neighbours = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert neighbours == training["requiredDuringSchedulingIgnoredDuringExecution"]
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert f"delete pod {pod['metadata']['name']} " in last


def test_two_people_fetch_at_once_and_a_pod_that_never_runs_goes(fetch: Fetch, tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        fetch({"deployment": DEPLOYMENT})
        names.add(json.loads((tmp_path / "pod").read_text())["metadata"]["name"])
    assert len(names) == 2
    finished = fetch({"deployment": DEPLOYMENT}, ready="exit 1")
    assert finished.returncode != 0
    name = json.loads((tmp_path / "pod").read_text())["metadata"]["name"]
    assert f"delete pod {name} " in (tmp_path / "calls").read_text().splitlines()[-1]


def test_a_run_that_was_begun_anew_replaces_the_earlier_one(
    fetch: Fetch, tmp_path: Path, volume: Path
) -> None:
    """Its records are fewer; the earlier run's would be the newest here."""
    (volume / "resnet20/record-0000000050.json").write_text("the earlier")
    fetch({"deployment": DEPLOYMENT})
    (volume / "resnet20/record-0000000050.json").rename(volume / "resnet20/record-0000000012.json")
    finished = fetch({"deployment": DEPLOYMENT})
    assert finished.returncode == 0, finished.stderr
    here = tmp_path / "here/resnet20"
    assert [path.name for path in here.glob("record-*.json")] == ["record-0000000012.json"]
    assert (here / "record-0000000050.json.of-an-earlier-run").read_text() == "the earlier"


def test_names_that_are_no_text_arrive_too(fetch: Fetch, tmp_path: Path, volume: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \n.txt")
    (volume / odd).write_text("here")
    finished = fetch({"deployment": DEPLOYMENT})
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "here" / odd).read_text() == "here"


def test_the_pod_meets_the_restricted_standard(fetch: Fetch, tmp_path: Path) -> None:
    fetch({"deployment": DEPLOYMENT})
    spec = json.loads((tmp_path / "pod").read_text())["spec"]
    theirs = load("base").training_pods[0].spec
    assert spec["securityContext"] == theirs["securityContext"]
    assert spec["containers"][0]["securityContext"] == theirs["containers"][0]["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["activeDeadlineSeconds"] > 0


def test_a_second_fetch_copies_what_is_new_alone(fetch: Fetch, tmp_path: Path, volume: Path) -> None:
    fetch({"deployment": DEPLOYMENT})
    (volume / "resnet20/record.json").write_text('{"epoch": 2}')
    finished = fetch({"deployment": DEPLOYMENT})
    assert "copying 1 files" in finished.stdout
    assert files(tmp_path / "here") == files(volume)


def test_a_job_that_writes_meanwhile_is_waited_for(fetch: Fetch, tmp_path: Path, volume: Path) -> None:
    """The record changes and a checkpoint is pruned between the list and the copy."""
    mark = tmp_path / "once"
    change = (
        f"test -e {mark} || {{ touch {mark}; echo new > '{volume}/resnet20/record.json'; "
        f"rm '{volume}/resnet20/checkpoints/step-1.keras'; }}"
    )
    finished = fetch({"deployment": DEPLOYMENT}, before_tar=change)
    assert finished.returncode == 0, finished.stderr
    assert files(tmp_path / "here") == files(volume)


def test_bytes_that_are_lost_on_the_way_are_noticed(fetch: Fetch, volume: Path) -> None:
    finished = fetch({"deployment": DEPLOYMENT}, after_tar=" | head -c 100000")
    assert finished.returncode != 0
    assert "Still different" in finished.stderr


def test_a_connection_that_breaks_once_costs_a_round(fetch: Fetch, tmp_path: Path, volume: Path) -> None:
    mark = tmp_path / "once"
    cut = f" | if test -e {mark}; then cat; else touch {mark}; head -c 100000; fi"
    finished = fetch({"deployment": DEPLOYMENT}, after_tar=cut)
    assert finished.returncode == 0, finished.stderr
    assert files(tmp_path / "here") == files(volume)


def test_after_a_delete_the_volume_that_is_left_is_read(fetch: Fetch, tmp_path: Path, volume: Path) -> None:
    finished = fetch({"claims": {"items": [CLAIM]}})
    assert finished.returncode == 0, finished.stderr
    assert files(tmp_path / "here") == files(volume)
    pod = json.loads((tmp_path / "pod").read_text())
    assert pod["spec"]["containers"][0]["image"] == f"cifar-residual-job-tensorboard:{__version__}"


def test_runs_in_a_bucket_need_no_fetch(fetch: Fetch) -> None:
    finished = fetch({"deployment": load("gcs").get("Deployment", "tensorboard")})
    assert finished.returncode != 0
    assert "gs://" in finished.stderr


def test_two_volumes_are_not_guessed_between(fetch: Fetch) -> None:
    other = load("multi-worker").get("PersistentVolumeClaim", "shared-volume")
    finished = fetch({"claims": {"items": [CLAIM, other]}})
    assert finished.returncode != 0
    assert "volume, shared-volume" in finished.stderr
