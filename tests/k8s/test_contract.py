"""What the manifests promise the program and the program promises the cluster: neither changes alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click
import pytest
from click.core import ParameterSource

import job
from job import cli
from job.cli.options import variable_of
from job.domain.settings import Settings
from tests.k8s.manifests import (
    K8S,
    NAMESPACE,
    ROOT,
    VARIANTS,
    Manifest,
    Manifests,
    Pod,
    documents,
    exit_codes,
    image_name,
    load,
    read_from_environment,
    rendered,
    selects,
    stage_of,
)

# What the cluster does about each way to end (DESIGN: exit codes); "count" leaves it to the back-off limit.
DECISIONS = {
    2: "FailJob",
    65: "FailJob",
    66: "FailJob",
    69: "count",
    70: "FailJob",
    71: "count",
    73: "FailJob",
    74: "count",
    75: "Ignore",
    77: "FailJob",
    79: "count",
}
KILLED = 137  # by the kernel, out of memory, or by the kubelet after the grace period
SPOT_SECONDS = 15  # from the notice to the end on a GKE spot node
# Set by Kubernetes itself in the pods of an Indexed Job.
FROM_KUBERNETES = {"JOB_COMPLETION_INDEX"}

variants = pytest.mark.parametrize("variant", VARIANTS)


def job_containers(manifests: Manifests) -> Iterator[tuple[Pod, Manifest]]:
    """Containers that run the program."""
    for pod in [manifests.data_pod, *manifests.training_pods]:
        for container in pod.containers:
            assert image_name(container) == "cifar-residual-job"
            yield pod, container


def parse(arguments: list[str]) -> click.Context:
    """The context of the command that these arguments run, its values converted; nothing is run."""
    context = cli.cli.make_context("job", list(arguments))
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, context._protected_args + context.args)
        assert name
        assert command
        context = command.make_context(name, rest, parent=context)
    return context


def variables_of(context: click.Context) -> dict[str, str]:
    """Environment variable -> parameter, of the command's own."""
    return {name: str(param.name) for param in context.command.params if (name := variable_of(param))}


@pytest.fixture
def as_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse a container's arguments in its environment."""

    def enter(manifests: Manifests, pod: Pod, container: Manifest, index: int = 0) -> click.Context:
        for name, value in manifests.environment(pod, container, index=index).items():
            monkeypatch.setenv(name, value)
        context = parse(manifests.arguments(pod, container, index=index))
        for name in manifests.environment(pod, container, index=index):
            monkeypatch.delenv(name)
        return context

    return enter


# --- settings


@variants
def test_every_setting_is_read_and_valid(variant: str, as_in: Any) -> None:
    manifests = load(variant)
    for pod, container in job_containers(manifests):
        context = as_in(manifests, pod, container)  # raises where a value is not of its option's type
        known = variables_of(context)
        elsewhere = (read_from_environment() | FROM_KUBERNETES) - known.keys()
        environment = manifests.environment(pod, container).keys() - elsewhere
        if context.command.name != "train":  # the ConfigMap is for `train`; others read their part of it
            environment &= known.keys() | {entry["name"] for entry in container.get("env", [])}
            assert "JOB_DATA" in environment
        assert environment <= known.keys(), f"{context.command.name} reads no {environment - known.keys()}"
        for name in environment:
            assert context.get_parameter_source(known[name]) is ParameterSource.ENVIRONMENT, name


@variants
def test_the_settings_make_sense_together_and_reach_the_program(variant: str, as_in: Any) -> None:
    manifests = load(variant)
    for pod in manifests.training_pods:
        (container,) = pod.spec["containers"]
        for index in range(pod.workers):
            environment = manifests.environment(pod, container, index=index)
            settings = Settings.of(dict(as_in(manifests, pod, container, index).params))
            assert isinstance(settings, Settings)
            assert settings.network.model == pod.name
            assert settings.data == environment["JOB_DATA"]
            assert settings.output == environment["JOB_OUTPUT"]
            assert settings.epochs == int(environment["JOB_EPOCHS"])
            assert settings.require_gpu == ("nvidia.com/gpu" in container["resources"]["limits"])


@variants
def test_every_pod_trains_a_run_of_its_own_or_the_jobs_one_run_together(variant: str, as_in: Any) -> None:
    manifests = load(variant)
    seeds = {
        pod.name: [
            as_in(manifests, pod, pod.spec["containers"][0], index).params["seed"]
            for index in range(pod.workers)
        ]
        for pod in manifests.training_pods
    }
    expected = [0, 1, 2] if variant == "seeds" else [0] * load(variant).training_pods[0].workers
    assert seeds == {"resnet": expected, "plainnet": expected}


@variants
def test_the_data_job_and_the_init_containers_bring_and_verify_what_train_reads(
    variant: str, as_in: Any
) -> None:
    manifests = load(variant)
    data_pod = manifests.data_pod
    for pod in manifests.training_pods:
        (init,), (train,) = pod.spec["initContainers"], pod.spec["containers"]
        source = as_in(manifests, pod, train).params["data"]
        for where, container in [(pod, init), (data_pod, data_pod.containers[0])]:
            command = as_in(manifests, where, container)
            assert command.parent.command.name == "data"
            assert command.command.name == ("verify" if source == "sample" else "fetch")
            assert command.params["source" if source == "sample" else "to"] == source


@variants
def test_no_gpu_is_held_while_the_data_are_fetched(variant: str) -> None:
    """The scheduler keeps the training pods off every node while a pod of the Job data runs on any."""
    manifests = load(variant)
    data_pod = manifests.data_pod
    assert "suspend" not in data_pod.owner["spec"]
    for container in data_pod.containers:
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
    for pod in manifests.training_pods:
        rules = pod.spec["affinity"]["podAntiAffinity"]
        (rule,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/os"  # the same on all nodes, so: on any node
        assert selects(rule["labelSelector"]["matchLabels"], data_pod.labels)
        assert not any(
            selects(rule["labelSelector"]["matchLabels"], other.labels)
            for other in manifests.pods
            if other != data_pod
        )
        # Else the scheduler would evict the data's pod to make room.
        assert pod.spec.get("priorityClassName") == data_pod.spec.get("priorityClassName")


@variants
def test_one_job_means_one_run_so_its_settings_cannot_change(variant: str) -> None:
    (settings,) = load(variant).of_kind("ConfigMap")
    assert settings["immutable"] is True


@variants
def test_every_container_logs_json(variant: str) -> None:
    manifests = load(variant)
    for pod, container in job_containers(manifests):
        assert manifests.environment(pod, container)["JOB_LOG_FORMAT"] == "json"


def test_both_networks_fit_on_two_cpus_beside_the_clusters_own_pods() -> None:
    """kind's own pods request 950 m of a node (API server 250, controllers 200, the rest 100 each)."""
    requests = [
        max(
            sum(_millis(each) for each in pod.spec["containers"]),
            max((_millis(each) for each in pod.spec.get("initContainers", [])), default=0),
        )
        for pod in load("cpu").pods
        if pod.name != "data"  # they wait for it
    ]
    assert len(requests) == 3
    assert sum(requests) <= 2000 - 950


def _millis(container: Manifest) -> int:
    """Requested thousandths of a CPU."""
    amount: str = container["resources"]["requests"]["cpu"]
    return int(amount[:-1]) if amount.endswith("m") else 1000 * int(amount)


def test_the_networks_settings_are_the_same_in_both_jobs() -> None:
    for variant in VARIANTS:
        manifests = load(variant)
        resnet, plainnet = (
            manifests.environment(pod, pod.spec["containers"][0])
            for pod in (
                manifests._pod(manifests.get("Job", "resnet"), {}),
                manifests._pod(manifests.get("Job", "plainnet"), {}),
            )
        )
        hosts = {name: env.pop("JOB_WORKER_HOSTS", "") for name, env in [("r", resnet), ("p", plainnet)]}
        assert resnet == plainnet
        assert hosts["r"].replace("resnet", "plainnet") == hosts["p"]


# --- exit codes


def decision(rules: list[Manifest], code: int, *, disrupted: bool = False, container: str = "train") -> str:
    """What the Job controller does about a failed pod: the first rule that fits decides."""
    for rule in rules:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and codes.get("containerName", container) == container:
            listed = code in codes["values"]
            if listed == (codes["operator"] == "In") and code:
                return str(rule["action"])
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            return str(rule["action"])
    return "count"


@variants
@pytest.mark.parametrize("container", ["data", "train"])
def test_every_exit_code_gets_the_decision_that_the_design_gives_it(variant: str, container: str) -> None:
    for workload in load(variant).of_kind("Job"):
        rules = workload["spec"]["podFailurePolicy"]["rules"]
        diverged = variant == "seeds" and workload["metadata"]["name"] != "data"
        expected = DECISIONS | ({70: "FailIndex"} if diverged else {})
        assert {code: decision(rules, code, container=container) for code in DECISIONS} == expected
        assert decision(rules, KILLED, container=container) == "count"
        for code in [*DECISIONS, KILLED]:
            assert decision(rules, code, disrupted=True, container=container) == "Ignore"


def test_the_program_ends_with_no_other_codes() -> None:
    assert exit_codes() == {0, *DECISIONS}


@variants
def test_the_policy_is_one_that_the_server_accepts_and_leaves_unchanged(variant: str) -> None:
    for workload in load(variant).of_kind("Job"):
        spec = workload["spec"]
        rules = spec["podFailurePolicy"]["rules"]
        assert rules[0] == {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        }
        for rule in rules[1:]:
            values = rule["onExitCodes"]["values"]
            assert values == sorted(set(values))
            assert 0 not in values
        indexed = spec.get("completionMode") == "Indexed"
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        assert spec["podReplacementPolicy"] == "Failed"
        assert indexed or "backoffLimitPerIndex" not in spec
        assert ("backoffLimit" in spec) != ("backoffLimitPerIndex" in spec)
        lasting = any(rule["action"] == "FailIndex" for rule in rules)
        # Where a pod can do without the others its failure is its own, else the first to fail ends the Job.
        assert lasting == ("backoffLimitPerIndex" in spec and "maxFailedIndexes" not in spec)
        assert spec.get("maxFailedIndexes", 0) == 0
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["ttlSecondsAfterFinished"] > 0


def test_the_readmes_table_of_exit_codes_is_the_policy() -> None:
    readme = (K8S / "README.md").read_text()
    table = {
        int(code): decided
        for codes, decided in re.findall(
            r"^\| ([\d, ]+) \|.*\| (FailJob|Ignore|count)\S* ", readme, re.MULTILINE
        )
        for code in codes.split(",")
    }
    assert table == DECISIONS | {KILLED: "count"}


@variants
def test_the_job_ends_itself_before_it_is_killed(variant: str, as_in: Any) -> None:
    manifests = load(variant)
    for pod in manifests.training_pods:
        grace = as_in(manifests, pod, pod.spec["containers"][0]).params["grace_seconds"]
        assert grace + 2 <= pod.spec["terminationGracePeriodSeconds"] <= SPOT_SECONDS


# --- image, user, files


@variants
def test_images_are_those_of_this_version(variant: str) -> None:
    for pod in load(variant).pods:
        for container in pod.containers:
            assert container["image"] == f"{image_name(container)}:{job.__version__}"
            assert container["imagePullPolicy"] == "IfNotPresent"


@variants
def test_pods_run_as_the_images_user_who_may_write_to_the_volume(variant: str) -> None:
    for pod in load(variant).pods:
        security = pod.spec["securityContext"]
        for container in pod.containers:
            assert stage_of(image_name(container)).user == f"{security['runAsUser']}:{security['runAsGroup']}"
        assert security["fsGroup"] == security["runAsGroup"]


def test_the_readme_builds_the_images_that_the_manifests_name() -> None:
    readme = (K8S / "README.md").read_text()
    named = set(re.findall(r"(?<!/)\bcifar-residual-job[a-z-]*:[\w.]+", readme))
    assert named == {container["image"] for pod in load("cpu").pods for container in pod.containers}


def test_the_images_entrypoints_are_what_the_arguments_are_for() -> None:
    assert stage_of("cifar-residual-job").entrypoint == ["python", "-m", "job"]
    assert stage_of("cifar-residual-job-tensorboard").entrypoint[0] == "tensorboard"


def mounted(container: Manifest, path: str) -> Manifest | None:
    """The mount that holds a path: the deepest one."""
    holders = [
        mount for mount in container["volumeMounts"] if PurePosixPath(path).is_relative_to(mount["mountPath"])
    ]
    return max(holders, key=lambda mount: len(mount["mountPath"]), default=None)


def written_by(manifests: Manifests, pod: Pod, container: Manifest) -> set[str]:
    """Folders that a container writes to, by its image's variables and its own."""
    environment = stage_of(image_name(container)).environment | manifests.environment(pod, container)
    paths = {"/tmp"}  # Python's default for temporary files
    paths |= {value for name, value in environment.items() if name.endswith(("_CACHE", "_SPOOL", "_HOME"))}
    paths |= {value for name, value in environment.items() if name.endswith("_CACHE_PATH")}
    if container["name"] == "data" and "fetch" in container["args"]:
        paths.add(environment["JOB_DATA"])
    if container["name"] == "train":
        paths |= {environment["JOB_OUTPUT"], "/dev/shm"}
    return {path for path in paths if path.startswith("/")}


@variants
def test_what_is_written_is_writable_and_what_is_read_is_mounted(variant: str) -> None:
    manifests = load(variant)
    for pod in manifests.pods:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        used = set()
        for container in pod.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            for path in written_by(manifests, pod, container):
                mount = mounted(container, path)
                assert mount, f"{variant}: {pod.name}/{container['name']} cannot write to {path}"
                assert not mount.get("readOnly"), path
            environment = manifests.environment(pod, container)
            for path in (environment["JOB_OUTPUT"], environment.get("JOB_DATA", "sample")):
                wanted = path.startswith("/") and (container["name"], path) != ("data", "/runs")
                assert not wanted or mounted(container, path), path
            used |= {mount["name"] for mount in container["volumeMounts"]}
        assert used == volumes.keys()


@variants
def test_nothing_temporary_can_fill_a_node(variant: str) -> None:
    for pod in load(variant).pods:
        for volume in pod.spec["volumes"]:
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), volume
        for container in pod.containers:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.keys() == {"cpu", "memory", "ephemeral-storage"}
            assert {"memory", "ephemeral-storage"} <= limits.keys()
            # Else the pod would be evicted before its spool is as full as it may be.
            assert _gibi(limits["ephemeral-storage"]) > _gibi(_on_disk(pod))
            # The server stores strings: a number would make every `kubectl apply` report a change.
            for amounts in container["resources"].values():
                assert all(isinstance(amount, str) for amount in amounts.values())
    for pod in load(variant).training_pods:
        (shared,) = (
            volume
            for volume in pod.spec["volumes"]
            if volume["name"] == mounted(pod.spec["containers"][0], "/dev/shm")["name"]  # type: ignore[index]
        )
        assert shared["emptyDir"]["medium"] == "Memory"


def _gibi(amount: str) -> int:
    assert amount.endswith("Gi")
    return int(amount[:-2])


def _on_disk(pod: Pod) -> str:
    """The limit of the pod's one temporary folder that is not memory."""
    folders = [volume.get("emptyDir", {"medium": "none"}) for volume in pod.spec["volumes"]]
    (limit,) = (folder["sizeLimit"] for folder in folders if "medium" not in folder)
    return str(limit)


@variants
def test_tensorboard_shows_the_folder_that_the_jobs_write_to(variant: str) -> None:
    manifests = load(variant)
    (pod,) = (pod for pod in manifests.pods if pod.name == "tensorboard")
    (container,) = pod.containers
    output = manifests.get("ConfigMap", "settings")["data"]["JOB_OUTPUT"]
    assert f"--logdir={output}" in manifests.arguments(pod, container)
    mounts = [mounted(each, output) for each in (container, *_train_containers(manifests))]
    if output.startswith("gs://"):
        assert mounts == [None] * len(mounts)
    else:
        assert {(mount["name"], mount["subPath"]) for mount in mounts if mount} == {("volume", "runs")}
        assert None not in mounts
        assert mounted(container, output)["readOnly"] is True  # type: ignore[index]


def _train_containers(manifests: Manifests) -> list[Manifest]:
    return [pod.spec["containers"][0] for pod in manifests.training_pods]


# --- Pod Security "restricted"


@variants
def test_pods_meet_the_restricted_standard_which_is_enforced(variant: str) -> None:
    manifests = load(variant)
    (namespace,) = manifests.of_kind("Namespace")
    for mode in ("enforce", "warn", "audit"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"
    for pod in manifests.pods:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in pod.spec["volumes"]:
            assert volume.keys() - {"name"} <= {"emptyDir", "persistentVolumeClaim", "configMap"}
        for container in pod.containers:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in container.get("ports", []))


@variants
def test_no_pod_gets_a_token_and_every_one_says_why_it_ended(variant: str) -> None:
    manifests = load(variant)
    for pod in manifests.pods:
        account = manifests.get("ServiceAccount", pod.spec["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False
        assert pod.spec["automountServiceAccountToken"] is False
        for container in pod.containers:
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


# --- names that refer to each other


@variants
def test_claims_that_are_used_exist_and_no_others(variant: str) -> None:
    manifests = load(variant)
    claims = {claim["metadata"]["name"] for claim in manifests.of_kind("PersistentVolumeClaim")}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in manifests.pods
        for volume in pod.spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


@variants
def test_selectors_select_what_they_are_for(variant: str) -> None:
    manifests = load(variant)
    deployment = manifests.get("Deployment", "tensorboard")
    found = {
        service["metadata"]["name"]: [
            pod.name for pod in manifests.pods if selects(service["spec"]["selector"], pod.labels)
        ]
        for service in manifests.of_kind("Service")
    }
    expected = {"tensorboard": ["tensorboard"]}
    if "multi-worker" in variant:
        expected |= {"resnet-workers": ["resnet"], "plainnet-workers": ["plainnet"]}
    assert found == expected
    assert selects(
        deployment["spec"]["selector"]["matchLabels"], deployment["spec"]["template"]["metadata"]["labels"]
    )


def reachable(manifests: Manifests) -> dict[str, set[tuple[str, int]]]:
    """Pod -> (whose pods, port) that may connect to it, by the NetworkPolicies."""
    allowed: dict[str, set[tuple[str, int]]] = {}
    for policy in manifests.of_kind("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for pod in manifests.pods:
            if selects(policy["spec"]["podSelector"].get("matchLabels", {}), pod.labels):
                allowed.setdefault(pod.name, set())
                for rule in policy["spec"].get("ingress", []):
                    allowed[pod.name] |= set(_openings(manifests, pod, rule))
    return allowed


def _openings(manifests: Manifests, pod: Pod, rule: Manifest) -> Iterator[tuple[str, int]]:
    ports = {port["name"]: port["containerPort"] for each in pod.containers for port in each.get("ports", [])}
    sources = [source["podSelector"].get("matchLabels", {}) for source in rule["from"]]
    peers = [peer.name for peer in manifests.pods for source in sources if selects(source, peer.labels)]
    for port in rule["ports"]:
        assert port["protocol"] == "TCP"
        yield from ((peer, ports[port["port"]]) for peer in peers)


@variants
def test_nothing_connects_but_to_tensorboard_and_workers_of_one_job(variant: str) -> None:
    expected: dict[str, set[tuple[str, int]]] = {
        "tensorboard": {(name, 6006) for name in ("data", "resnet", "plainnet", "tensorboard")},
        "resnet": set(),
        "plainnet": set(),
        "data": set(),
    }
    if "multi-worker" in variant:
        expected |= {"resnet": {("resnet", 2222)}, "plainnet": {("plainnet", 2222)}}
    assert reachable(load(variant)) == expected


# --- nodes


def required_neighbours(pod: Pod) -> dict[str, str] | None:
    """Labels of the pods beside which a pod must run, if any."""
    affinity = pod.spec.get("affinity") or {}
    if "podAffinity" not in affinity:
        return None
    (term,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    labels: dict[str, str] = term["labelSelector"]["matchLabels"]
    return labels


@variants
def test_pods_of_a_volume_of_one_node_stay_together_and_all_others_are_free(variant: str) -> None:
    manifests = load(variant)
    claims = manifests.of_kind("PersistentVolumeClaim")
    one_node = [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteOnce"]]
    for pod in manifests.pods:
        neighbours = required_neighbours(pod)
        assert (neighbours is not None) == one_node
        if neighbours:
            holders = {other.name for other in manifests.pods if selects(neighbours, other.labels)}
            # A training pod's own label lets the first one start; TensorBoard must wait for it.
            expected = {"resnet", "plainnet"} | (
                set() if pod.name == "tensorboard" else {"tensorboard", "data"}
            )
            assert holders == expected
    deployment = manifests.get("Deployment", "tensorboard")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}  # else the old pod keeps the volume


@variants
def test_whoever_must_get_onto_a_gpu_node_tolerates_its_taint(variant: str) -> None:
    for pod in load(variant).pods:
        gpus = [each["resources"]["limits"].get("nvidia.com/gpu") for each in pod.spec["containers"]]
        follows = pod.name == "tensorboard" and required_neighbours(pod) is not None
        follows |= pod.name == "data" and variant != "cpu"  # where all nodes have GPUs
        tolerates = {"key": "nvidia.com/gpu", "operator": "Exists"} in pod.spec.get("tolerations", [])
        assert tolerates == (any(gpus) or follows)


# --- several pods of one Job


@variants
def test_indexed_jobs_start_all_their_pods_at_once(variant: str) -> None:
    for workload in load(variant).training:
        spec = workload["spec"]
        indexed = variant == "seeds" or "multi-worker" in variant
        assert (spec.get("completionMode") == "Indexed") == indexed
        assert (
            spec.get("completions", 1)
            == spec.get("parallelism", 1)
            == (1 if not indexed else spec["completions"])
        )


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "multi-worker" in name])
def test_workers_find_each_other(variant: str) -> None:
    manifests = load(variant)
    for pod in manifests.training_pods:
        (container,) = pod.spec["containers"]
        environment = manifests.environment(pod, container)
        service = manifests.get("Service", pod.spec["subdomain"])
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        (port,) = service["spec"]["ports"]
        assert [port["port"]] == [each["containerPort"] for each in container["ports"]]
        # Kubernetes names the pods of an Indexed Job <job>-<index>.<subdomain>.
        names = [f"{pod.name}-{index}.{pod.spec['subdomain']}:{port['port']}" for index in range(pod.workers)]
        pattern = environment["JOB_WORKER_HOSTS"]
        assert [pattern.format(index=index) for index in range(pod.workers)] == names
        assert int(environment["JOB_WORKERS"]) == pod.workers > 1


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "kueue" in name])
def test_queued_jobs_are_labelled_for_a_queue_that_the_readme_makes(variant: str) -> None:
    """Kueue suspends what is labelled; said here too, it would stop running Jobs that are applied again."""
    readme = (K8S / "README.md").read_text()
    for workload in load(variant).training:
        assert "suspend" not in workload["spec"]
        queue = workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert re.search(rf"kind: LocalQueue\nmetadata:\n  name: {queue}\n", readme)
        # Kueue never admits a Job that asks for a resource which the queue does not cover.
        (resources,) = re.findall(r"coveredResources: \[(.*)\]", readme)
        covered = set(resources.split(", "))
        assert set(re.findall(r"- name: (\S+)\n +nominalQuota", readme)) == covered
        for container in workload["spec"]["template"]["spec"]["containers"]:
            assert {*container["resources"]["requests"], *container["resources"]["limits"]} <= covered


def test_the_number_of_workers_stands_in_one_place(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    settings = tmp_path / "k8s/components/multi-worker/settings.yaml"
    settings.write_text(settings.read_text().replace('JOB_WORKERS: "2"', 'JOB_WORKERS: "5"'))
    for variant in ("multi-worker", "gcs-multi-worker"):
        changed = Manifests(variant, documents(rendered(variant, tmp_path / "k8s")))
        for pod in changed.training_pods:
            assert pod.owner["spec"]["completions"] == pod.owner["spec"]["parallelism"] == 5
            assert changed.environment(pod, pod.spec["containers"][0])["JOB_WORKERS"] == "5"


def test_placeholders_of_the_bucket_are_refused_at_once(as_in: Any) -> None:
    """Whoever forgets to name the bucket gets exit code 2, not hours of retries."""
    from job.domain.errors import UsageError
    from job.store.location import open_store

    location = load("gcs").get("ConfigMap", "settings")["data"]["JOB_OUTPUT"]
    assert "BUCKET" in location
    with pytest.raises(UsageError, match=r"BUCKET.*k8s/components/gcs/settings\.yaml"):
        open_store(location)


def test_the_readme_shows_the_true_names() -> None:
    """Commands of the README name the namespace, the account and the placeholders as the manifests do."""
    readme = (K8S / "README.md").read_text()
    roles = {"job": "objectUser", "tensorboard": "objectViewer"}
    for account in load("gcs").of_kind("ServiceAccount"):
        name = account["metadata"]["name"]
        identity = account["metadata"]["annotations"]["iam.gke.io/gcp-service-account"]
        assert f"grant {identity.partition('@')[0]} roles/storage.{roles.pop(name)} {name}\n" in readme
    assert not roles
    assert f".svc.id.goog[{NAMESPACE}/$3]" in readme
    assert (ROOT / "k8s/components/gcs/settings.yaml").is_file()
    assert "k8s/components/gcs/settings.yaml" in readme
