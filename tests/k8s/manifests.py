"""The manifests as a cluster gets them: rendered, parsed, and what Kubernetes makes of them.

Everything comes from ``kubectl kustomize`` of the sources; nothing of a manifest is typed again here.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job import cli
from job.domain.errors import JobError

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
VARIANTS = ["base", *OVERLAYS]
NAMESPACE = "cifar-residual-job"
INDEX_ANNOTATION = "metadata.annotations['batch.kubernetes.io/job-completion-index']"

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """A program of this environment, else of the machine."""
    here = Path(sys.prefix, "bin", name)
    found = str(here) if here.exists() else shutil.which(name)
    assert found, f"{name} is missing: make .venv/.ready"
    return found


@functools.cache
def rendered(variant: str, root: Path = K8S) -> str:
    """What ``kubectl apply -k`` sends: the base or an overlay."""
    folder = root / variant if variant == "base" else root / "overlays" / variant
    finished = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, f"{variant}: {finished.stderr}"
    # A deprecated field would be a warning here. The other line tells of a service account's missing home.
    assert "deprecated" not in finished.stderr, finished.stderr
    return finished.stdout


def documents(text: str) -> list[Manifest]:
    """The parsed manifests of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


@functools.cache
def load(variant: str) -> Manifests:
    """The parsed base or overlay; nobody may change it."""
    return Manifests(variant, documents(rendered(variant)))


@dataclass(frozen=True)
class Pod:
    """A pod as a workload's controller would make it."""

    owner: Manifest  # Job or Deployment
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """The workload's."""
        return str(self.owner["metadata"]["name"])

    @property
    def containers(self) -> list[Manifest]:
        """Init containers first, as they run."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def workers(self) -> int:
        """Pods of an Indexed Job, else 1."""
        return int(self.owner["spec"].get("completions", 1))


@dataclass(frozen=True)
class Manifests:
    """A variant's resources."""

    variant: str
    all: list[Manifest]

    def of_kind(self, kind: str) -> list[Manifest]:
        """Every resource of a kind."""
        return [manifest for manifest in self.all if manifest["kind"] == kind]

    def get(self, kind: str, name: str) -> Manifest:
        """The one resource of that name."""
        (found,) = (manifest for manifest in self.of_kind(kind) if manifest["metadata"]["name"] == name)
        return found

    @property
    def training(self) -> list[Manifest]:
        """The Jobs that train."""
        return [job for job in self.of_kind("Job") if _name(job) != "data"]

    @property
    def training_pods(self) -> list[Pod]:
        """One of each Job that trains."""
        return [self._job_pod(job) for job in self.training]

    @property
    def data_pod(self) -> Pod:
        """The one that fetches the data."""
        return self._job_pod(self.get("Job", "data"))

    @property
    def pods(self) -> list[Pod]:
        """One of each workload."""
        deployments = (self._pod(one, {}) for one in self.of_kind("Deployment"))
        return [self.data_pod, *self.training_pods, *deployments]

    def _job_pod(self, job: Manifest) -> Pod:
        """A pod with the labels that the Job controller adds."""
        return self._pod(job, {"batch.kubernetes.io/job-name": _name(job)})

    @staticmethod
    def _pod(owner: Manifest, added: dict[str, str]) -> Pod:
        template = owner["spec"]["template"]
        return Pod(owner, template["metadata"]["labels"] | added, template["spec"])

    def environment(self, pod: Pod, container: Manifest, *, index: int = 0) -> dict[str, str]:
        """A container's variables, as the kubelet computes them for the pod of that completion index."""
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            values |= self.get("ConfigMap", source["configMapRef"]["name"])["data"]
        for entry in container.get("env", []):
            values[entry["name"]] = self._value(entry, values, index)
        if pod.owner["spec"].get("completionMode") == "Indexed":
            values.setdefault("JOB_COMPLETION_INDEX", str(index))
        return values

    def _value(self, entry: Manifest, known: dict[str, str], index: int) -> str:
        if "value" in entry:
            return expanded(entry["value"], known)
        source = entry["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == INDEX_ANNOTATION
            return str(index)
        reference = source["configMapKeyRef"]
        return str(self.get("ConfigMap", reference["name"])["data"][reference["key"]])

    def arguments(self, pod: Pod, container: Manifest, *, index: int = 0) -> list[str]:
        """A container's arguments, ``$(VARIABLE)`` replaced; its entrypoint is the image's."""
        assert "command" not in container, "the image's entrypoint shall run"
        environment = self.environment(pod, container, index=index)
        return [expanded(argument, environment) for argument in container["args"]]


def _name(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])


def expanded(text: str, environment: dict[str, str]) -> str:
    """Kubernetes replaces ``$(NAME)`` in values and arguments, and leaves unknown names as they are."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    return selector.items() <= labels.items()


def image_name(container: Manifest) -> str:
    """``registry/name:tag`` -> ``name``."""
    return str(container["image"]).rpartition("/")[2].partition(":")[0]


# --- the program


def exit_codes() -> set[int]:
    """Every code with which the program can end, but for death by a signal."""
    found, unseen = {0, 2, cli.UNEXPECTED}, [JobError]
    while unseen:
        kind = unseen.pop()
        found.add(kind.exit_code)
        unseen += kind.__subclasses__()
    return found


def read_from_environment() -> set[str]:
    """``JOB_*`` variables that the program reads without an option of that name."""
    sources = "\n".join(path.read_text() for path in (ROOT / "job").rglob("*.py"))
    return set(re.findall(r"os\.environ(?:\.get\(|\[)\"(JOB_[A-Z_]+)\"", sources))


# --- the image


@dataclass(frozen=True)
class Stage:
    """What a stage of the Dockerfile says about its containers."""

    user: str
    entrypoint: list[str]
    environment: dict[str, str]


def stage_of(image: str) -> Stage:
    """The Dockerfile's stage that makes an image: the last one, or the one named as the image ends."""
    stages = dict(_stages())
    return stages["tensorboard"] if image.endswith("-tensorboard") else list(stages.values())[-1]


def _stages() -> Iterator[tuple[str, Stage]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = text.replace("\\\n", " ")
    for part in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"\S+ AS (\S+)", part)
        user = re.findall(r"^USER (\S+)", part, re.MULTILINE)
        entrypoint = re.findall(r"^ENTRYPOINT (\[.*\])", part, re.MULTILINE)
        variables: dict[str, str] = {}
        for line in re.findall(r"^ENV (.*)", part, re.MULTILINE):
            variables |= dict(re.findall(r"(\w+)=('[^']*'|\S+)", line))
        yield (
            name[1] if name else "",
            Stage(user[-1] if user else "", yaml.safe_load(entrypoint[-1]) if entrypoint else [], variables),
        )
