"""Run a pod of the manifests here: its own arguments, variables and mounts, as processes or as containers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.container.engine import OFFLINE, Engine
from tests.k8s.manifests import ROOT, Manifest, Manifests, Pod, image_name, stage_of

Environment = dict[str, str]
# What starts a container: of a pod, with these variables, its volumes below this folder.
Start = Callable[[Pod, Manifest, list[str], Environment, Path], "subprocess.Popen[str]"]


def folders(pod: Pod, container: Manifest, root: Path) -> dict[str, tuple[Path, bool]]:
    """Mount path -> folder here, and whether the mount is read-only. Only a claim outlives the pod."""
    found = {}
    for mount in container.get("volumeMounts", []):
        (volume,) = (volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])
        kept = "claim" if "persistentVolumeClaim" in volume else f"pod-{pod.name}"
        folder = root / kept / mount["name"] / mount.get("subPath", "")
        folder.mkdir(parents=True, exist_ok=True)
        found[mount["mountPath"]] = (folder, bool(mount.get("readOnly")))
    return found


def start(
    how: Start,
    manifests: Manifests,
    pod: Pod,
    container: Manifest,
    root: Path,
    **changes: str,
) -> subprocess.Popen[str]:
    """Start one container of a pod, ``changes`` in place of its settings."""
    environment = manifests.environment(pod, container) | changes
    arguments = manifests.arguments(pod, container)
    return how(pod, container, arguments, environment, root)


def run(how: Start, manifests: Manifests, pod: Pod, root: Path, **changes: str) -> tuple[int, str]:
    """Run a pod's containers in turn, to the first failure; return the last one's exit code and output."""
    for container in pod.containers:
        process = start(how, manifests, pod, container, root, **changes)
        output = process.communicate()[0]
        if process.returncode:
            break
    return process.returncode, output


def as_process(
    pod: Pod, container: Manifest, arguments: list[str], environment: Environment, root: Path
) -> subprocess.Popen[str]:
    """The image's entrypoint with this Python; paths below a mount become the folder's."""
    stage = stage_of(image_name(container))
    assert stage.entrypoint[0] == "python"
    places = folders(pod, container, root)
    image = {name: value for name, value in stage.environment.items() if value.startswith(tuple(places))}
    variables = {name: _moved(value, places) for name, value in (image | environment).items()}
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, *stage.entrypoint[1:], *arguments],
        cwd=root,
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _moved(value: str, places: dict[str, tuple[Path, bool]]) -> str:
    mounts = "|".join(map(re.escape, places))
    return re.sub(rf"^({mounts})(?=/|$)", lambda match: str(places[match[1]][0]), value)


def in_container(engine: Engine, image: str, *, fs_group: bool = True) -> Start:
    """Containers as the kubelet would start them: user, mounts, limits and restrictions of the manifest."""

    def start(
        pod: Pod, container: Manifest, arguments: list[str], environment: Environment, root: Path
    ) -> subprocess.Popen[str]:
        mounts = []
        for path, (folder, read_only) in folders(pod, container, root).items():
            if fs_group:
                _let_group_write(folder, pod.spec["securityContext"]["fsGroup"])
            mounts.append(f"--volume={folder}:{path}:{'ro' if read_only else 'rw'}")
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        command = ["podman", "run", "--rm", OFFLINE, *_restrictions(pod, container), *mounts, *variables]
        return subprocess.Popen(
            [*command, image, *arguments],
            env=dict(engine.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def _let_group_write(folder: Path, group: int) -> None:
    """What the kubelet does to a volume for ``fsGroup``: its owner stays, its group may write."""
    os.chown(folder, -1, group)
    folder.chmod(0o2775)


def _restrictions(pod: Pod, container: Manifest) -> list[str]:
    """The pod's and the container's security context and limits, in podman's words."""
    user, own = pod.spec["securityContext"], container["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert not own["allowPrivilegeEscalation"]
    return [
        f"--user={user['runAsUser']}:{user['runAsGroup']}",
        "--passwd=false",  # Kubernetes adds no entry for the user
        "--read-only",
        "--read-only-tmpfs=false",
        "--security-opt=no-new-privileges",
        *(f"--cap-drop={capability}" for capability in own["capabilities"]["drop"]),
        f"--memory={container['resources']['limits']['memory'].removesuffix('i')}",
    ]
