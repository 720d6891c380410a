"""The manifests as the suite applies them: with a small network, and with each scenario's own change."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.kubectl import Cluster

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cluster"  # two levels below the root, as the paths in a kustomization say
RENDERED = "RENDERED=build/k8s-of-the-suite/rendered.yaml"  # the usual place is for whoever types make
# Trains for less than a minute on one CPU, with a commit every epoch: time enough to be disturbed.
SMALL = {
    "JOB_BLOCKS": "1,1",
    "JOB_FILTERS": "8",
    "JOB_EPOCHS": "16",
    "JOB_BATCH_SIZE": "100",
    "JOB_COMMIT_EVERY": "1epoch",
    "JOB_LOG_FORMAT": "plain",
}


@dataclass(frozen=True)
class Variant:
    """What is applied: components upon the base, settings, and patches of the Jobs."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    components: tuple[str, ...] = ("cpu",)
    jobs: tuple[str, ...] = ("resnet",)  # those that stay; with "data", the Job that fetches
    job: dict[str, Any] = field(default_factory=dict)  # of each Job's spec
    pod: dict[str, Any] = field(default_factory=dict)  # of each training pod's spec
    train: dict[str, Any] = field(default_factory=dict)  # of the container that trains
    data: dict[str, Any] = field(default_factory=dict)  # of the container of the Job data
    tensorboard: bool = False

    @property
    def output(self) -> str:
        """Where its runs are on the volume: no scenario finds another's."""
        return self.settings.get("JOB_OUTPUT", f"/runs/{self.name}")


def kustomization(variant: Variant) -> dict[str, Any]:
    """The content of the variant's ``kustomization.yaml``."""
    settings = {**SMALL, "JOB_OUTPUT": variant.output, **variant.settings}
    patches = [_patch("v1", "ConfigMap", "settings", {"data": settings})]
    for name in ("data", "resnet", "plainnet"):
        if name not in variant.jobs:
            patches.append(_removal("batch/v1", "Job", name))
            continue
        container = variant.data if name == "data" else variant.train
        containers = [{"name": "data" if name == "data" else "train", **container}] if container else []
        pod = {
            **({} if name == "data" else variant.pod),
            **({"containers": containers} if containers else {}),
        }
        spec = {**variant.job, **({"template": {"spec": pod}} if pod else {})}
        if spec:
            patches.append(_patch("batch/v1", "Job", name, {"spec": spec}))
    if not variant.tensorboard:
        patches.append(_removal("apps/v1", "Deployment", "tensorboard"))
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../../k8s/base"],
        "components": [f"../../../k8s/components/{name}" for name in variant.components],
        "patches": patches,
    }


def _patch(version: str, kind: str, name: str, content: dict[str, Any]) -> dict[str, str]:
    metadata = {"name": name, "namespace": "cifar-residual-job"}
    return {"patch": yaml.safe_dump({"apiVersion": version, "kind": kind, "metadata": metadata, **content})}


def _removal(version: str, kind: str, name: str) -> dict[str, str]:
    return _patch(version, kind, name, {"$patch": "delete"})


@dataclass(frozen=True)
class Make:
    """The project's own make targets, upon a variant."""

    cluster: Cluster
    image: str | None = None

    def __call__(
        self, target: str, variant: Variant | None = None, *more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a target to whatever end."""
        arguments = [
            f"CONTEXT={self.cluster.context}",
            f"NAMESPACE={self.cluster.namespace}",
            f"KUBECTL={self.cluster.kubectl}",
            RENDERED,
        ]
        if self.image:
            arguments.append(f"IMAGE={self.image}")
        if variant:
            arguments.append(f"MANIFESTS={write(variant)}")
        return subprocess.run(
            ["make", "--no-print-directory", target, *arguments, *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )


def write(variant: Variant) -> str:
    """Write the variant's folder; return its path below the root."""
    folder = FOLDER / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization(variant), sort_keys=False))
    return str(folder.relative_to(ROOT))
