"""Copy the runs of the cluster's volume here: ``fetch.py FOLDER --image IMAGE -- kubectl ...``.

A pod of its own reads the volume, so it works while Jobs run and when none is left. What is missing here, or
differs, is copied, until all SHA-256 agree: it may be interrupted, and repeated for what is new.

Standard library only, for any Python 3.9 or newer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

POD = f"fetch-{secrets.token_hex(3)}"  # two people may fetch at once
OURS = "app.kubernetes.io/component=fetch"
ENDED = "status.phase!=Pending,status.phase!=Running"
RECORD = re.compile(r"record-\d{10}\.json")
LABEL = "app.kubernetes.io/part-of"
ROUNDS = 5  # a running Job writes while we copy


class Cluster:
    """What this program asks of kubectl."""

    def __init__(self, kubectl: list[str]) -> None:
        self._kubectl = kubectl

    def ask(self, *arguments: str, given: str | None = None) -> str:
        """Run kubectl and return what it prints; its own words say why it fails."""
        command = [*self._kubectl, *arguments]
        return subprocess.run(command, check=True, input=given, stdout=subprocess.PIPE, text=True).stdout

    def get(self, *arguments: str) -> dict[str, Any] | None:
        """One object, or None."""
        text = self.ask("get", *arguments, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def in_pod(self, *command: str) -> list[str]:
        """A command line that runs a command in the pod, with its standard input."""
        return [*self._kubectl, "exec", "-i", POD, "--", *command]


def main() -> int:
    """Copy, compare, and say how it ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", required=True, help="to read with, where the cluster names none any more")
    here = sys.argv.index("--")
    arguments = parser.parse_args(sys.argv[1:here])
    cluster = Cluster(sys.argv[here + 1 :])
    try:
        try:
            start_pod(cluster, arguments.image)
            return copy(cluster, arguments.folder)
        finally:
            cluster.ask("delete", "pod", POD, "--ignore-not-found", "--wait=false")
    except subprocess.CalledProcessError as error:
        print(f"kubectl failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1


def start_pod(cluster: Cluster, image: str) -> None:
    """Start a pod that reads the volume of the Jobs, also of deleted ones, and wait until it runs."""
    claim = find_claim(cluster)
    board = cluster.get("deployment", "tensorboard")
    if board:
        image = board["spec"]["template"]["spec"]["containers"][0]["image"]
    cluster.ask("delete", "pods", "-l", OURS, "--field-selector", ENDED)  # of fetches that were killed
    cluster.ask("create", "-f", "-", given=json.dumps(pod(claim, image)))
    print(f"A pod reads the volume {claim} ...", flush=True)
    cluster.ask("wait", "--for=condition=Ready", f"pod/{POD}", "--timeout=5m")


def find_claim(cluster: Cluster) -> str:
    """The claim that TensorBoard shows, else the only one that is left."""
    board = cluster.get("deployment", "tensorboard")
    if board:
        volumes = board["spec"]["template"]["spec"]["volumes"]
        claims = [
            each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each
        ]
        if not claims:
            raise SystemExit("These runs are in a bucket: `compare gs://BUCKET/runs` reads them there.")
    else:
        found = cluster.get("persistentvolumeclaims", "-l", "app.kubernetes.io/component=storage")
        claims = [each["metadata"]["name"] for each in (found or {"items": []})["items"]]
    if len(claims) != 1:
        raise SystemExit(
            f"There must be one volume to fetch from, but there are: {', '.join(claims) or 'none'}"
        )
    return str(claims[0])


def pod(claim: str, image: str) -> dict[str, Any]:
    """A pod that reads the claim beside whichever pod holds it, for an hour at most."""
    part_of = {LABEL: "cifar-residual-job"}
    neighbour = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": part_of}}
    container = {
        "name": "read",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "3600"],
        "resources": {
            "requests": {"cpu": "50m", "memory": "64Mi", "ephemeral-storage": "64Mi"},
            "limits": {"memory": "512Mi", "ephemeral-storage": "64Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "volume", "mountPath": "/runs", "subPath": "runs", "readOnly": True}],
    }
    spec = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": 3600,
        "terminationGracePeriodSeconds": 1,
        "serviceAccountName": "default",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Its own label satisfies the rule where no other pod is left.
        "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [neighbour]}},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "volume", "persistentVolumeClaim": {"claimName": claim}}],
    }
    labels = {**part_of, "app.kubernetes.io/name": "fetch", "app.kubernetes.io/component": "fetch"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD, "labels": labels}, "spec": spec}


def copy(cluster: Cluster, folder: Path) -> int:
    """Copy what differs until nothing does; return the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(ROUNDS):
        there = checksums(cluster)
        wanted = [name for name, digest in there.items() if digest_of(folder / name) != digest]
        if not wanted:
            set_aside(there, folder)
            runs = {Path(name).parts[0] for name in there}
            print(f"{folder}: {len(there)} files of {len(runs)} runs, all SHA-256 as in the cluster")
            return 0
        print(f"copying {len(wanted)} files ...", flush=True)
        extract(cluster, wanted, folder)
    print(f"Still different after {ROUNDS} rounds: {', '.join(wanted[:5])} ...; fetch again", file=sys.stderr)
    return 1


def set_aside(there: dict[str, str], folder: Path) -> None:
    """Rename records of a run that is no more, where another of its name has taken its place with fewer."""
    newest: dict[str, str] = {}
    for name in there:
        run, _, file = name.rpartition("/")
        if RECORD.fullmatch(file):
            newest[run] = max(file, newest.get(run, ""))
    for run, last in newest.items():
        for path in (folder / run).iterdir():
            if RECORD.fullmatch(path.name) and path.name > last:
                path.rename(path.with_name(path.name + ".of-an-earlier-run"))
                print(f"{path}: of an earlier run of this name, renamed")


def checksums(cluster: Cluster) -> dict[str, str]:
    """Name -> SHA-256 of every file of the volume; one that vanishes meanwhile is left out."""
    script = "cd /runs && find . -type f -exec sha256sum --zero {} + 2>/dev/null; cd /runs"
    command = cluster.in_pod("sh", "-c", script)
    listing = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL).stdout
    entries = (os.fsdecode(entry).split("  ", 1) for entry in listing.split(b"\0") if entry)
    return {name[2:]: digest for digest, name in entries if ".." not in name.split("/")}


def extract(cluster: Cluster, names: list[str], folder: Path) -> None:
    """Copy files by tar, as `kubectl cp` does, but with hard links as files; the checksums judge the rest."""
    script = (
        "tar -C /runs --null --files-from=- --hard-dereference --ignore-failed-read -cf - 2>/dev/null || true"
    )
    command = cluster.in_pod("sh", "-c", script)
    wanted = set(names)
    with tempfile.TemporaryFile() as listing:
        listing.write(os.fsencode("\0".join(names)))
        listing.seek(0)
        with (
            subprocess.Popen(command, stdin=listing, stdout=subprocess.PIPE) as process,
            suppress(tarfile.TarError),  # a connection that broke
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile() and member.name in wanted:
                    save(archive, member, folder / member.name)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def save(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one file with its time, whole or not at all.

    Not by `extractall`, which is only safe from Python 3.11.4 on.
    """
    content = archive.extractfile(member)
    assert content is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with content, part.open("wb") as file:
        shutil.copyfileobj(content, file)
    os.utime(part, (member.mtime, member.mtime))
    part.replace(path)


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file here, or None."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
