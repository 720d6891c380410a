"""The suite's own logic, against a stand-in for kubectl that gives a server's answers: no cluster runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cluster import suite as runner
from tests.cluster.__main__ import main
from tests.cluster.kubectl import Cluster, Unmet, check, end_of, exit_codes, phase_of
from tests.cluster.scenarios import SCENARIOS, millis_of
from tests.cluster.suite import Result, Skipped, Suite, run_all, table
from tests.cluster.variants import RENDERED, Make, Variant, write
from tests.k8s.manifests import ROOT, tool

Object = dict[str, Any]
Play = Callable[..., Cluster]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """A cluster that answers, by what its questions contain; "" to all others. It logs every question."""

    def start(**answers: Any) -> Cluster:
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        kubectl = tmp_path / "kubectl"
        kubectl.write_text(
            f"""#!{sys.executable}
import json, sys
question = " ".join(sys.argv[1:])
open({str(tmp_path / "calls")!r}, "a").write(question + "\\n")
if sys.argv[1] == "kustomize":
    print("kind: List")
for words, answer in json.load(open({str(tmp_path / "answers.json")!r})).items():
    if all(word in question for word in words.split("_")):
        print(answer if isinstance(answer, str) else json.dumps(answer))
        break
"""
        )
        kubectl.chmod(0o755)
        return Cluster("kind-x", "suite", str(kubectl))

    return start


def calls(folder: Path) -> list[str]:
    """What the server was asked; rendering asks none."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if not line.startswith("kustomize")]


# --- what answers mean


def job(*conditions: tuple[str, str, str], **status: Any) -> Object:
    keys = ("type", "status", "reason")
    found = [dict(zip(keys, each, strict=True)) for each in conditions]
    return {"metadata": {"name": "resnet"}, "status": {"conditions": found, **status}}


def pod(*codes: int | None, name: str = "resnet-abcde", phase: str = "Failed", **metadata: Any) -> Object:
    """Exit codes of its init container and of the one that trains; None while it runs."""
    states: list[Object] = [
        {"state": {"running": {}} if code is None else {"terminated": {"exitCode": code}}} for code in codes
    ]
    status = {"phase": phase, "initContainerStatuses": states[:1], "containerStatuses": states[1:]}
    created = {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z", **metadata}
    return {"metadata": created, "spec": {}, "status": status}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], None),
        ([("Suspended", "True", "JobSuspended")], None),
        ([("FailureTarget", "True", "PodFailurePolicy")], None),  # its pods are still ending
        ([("Failed", "False", "")], None),
        (
            [("FailureTarget", "True", "PodFailurePolicy"), ("Failed", "True", "PodFailurePolicy")],
            ("Failed", "PodFailurePolicy"),
        ),
        (
            [
                ("SuccessCriteriaMet", "True", "CompletionsReached"),
                ("Complete", "True", "CompletionsReached"),
            ],
            ("Complete", "CompletionsReached"),
        ),
    ],
)
def test_a_job_has_ended_when_its_pods_have(
    conditions: list[tuple[str, str, str]], expected: tuple[str, str] | None
) -> None:
    assert end_of(job(*conditions)) == expected


def test_exit_codes_are_those_of_containers_that_have_ended() -> None:
    assert exit_codes(pod(0, 75)) == [0, 75]
    assert exit_codes(pod(0, None, phase="Running")) == [0]
    assert exit_codes(pod(66)) == [66]  # the init container ended it; the other never began


def test_a_pod_that_was_asked_to_go_is_ending() -> None:
    assert phase_of(pod(0, None, phase="Running")) == "Running"
    assert phase_of(pod(0, None, phase="Running", deletionTimestamp="now")) == "Ending"
    assert phase_of(pod(0, 75, deletionTimestamp="now")) == "Failed"


def test_cpus_are_counted_in_thousandths() -> None:
    assert [millis_of(amount) for amount in ("250m", "2", "0.5", "0")] == [250, 2000, 500, 0]


# --- the runner


def test_every_question_names_the_context_and_the_namespace(play: Play, tmp_path: Path) -> None:
    cluster = play(get_job=job(("Complete", "True", "")), get_pods={"items": []})

    def scenario(suite: Suite) -> None:
        suite.apply(Variant("one"))
        suite.completes("resnet")
        suite.must("k8s-delete")

    assert run_all(cluster, None, {"one": scenario}) == 0
    assert len(calls(tmp_path)) > 5
    for call in calls(tmp_path):
        assert call.startswith("--context kind-x ")
        assert "--namespace suite" in call or "namespace suite" in call or " apply -f " in call, call


def test_a_namespace_that_is_there_already_is_left_alone(play: Play, tmp_path: Path) -> None:
    cluster = play(get_namespace={"metadata": {"name": "suite"}})
    with pytest.raises(Unmet, match="suite is there already"):
        run_all(cluster, None, {})
    assert not any("delete" in call for call in calls(tmp_path))


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_namespace_goes_whatever_happens(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: type[BaseException]
) -> None:
    def broken(*_: Any) -> Any:
        raise problem

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(problem):
        run_all(play(), None, {})
    assert calls(tmp_path)[-1].endswith("delete namespace suite --ignore-not-found")


def test_the_namespace_goes_when_the_suite_is_terminated(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(runner, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        outcome = CliRunner().invoke(main, ["--context", "kind-x", "--namespace", "suite"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outcome.exit_code == 143
    assert calls(tmp_path)[-1].endswith("delete namespace suite --ignore-not-found")


def test_one_failure_hides_no_other_verdict_and_decides_the_exit_code(
    play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unmet(_: Suite) -> None:
        check(False, "the pod ended with 143")

    def differs(_: Suite) -> None:
        raise AssertionError("other bits in conv")

    def stumbles(_: Suite) -> None:
        raise KeyError("spec")

    def skips(_: Suite) -> None:
        raise Skipped("needs two nodes")

    scenarios = {"a": unmet, "b": differs, "c": stumbles, "d": skips, "e": lambda _: None}
    assert run_all(play(), None, scenarios) == 1
    *lines, counts = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["a", "FAILS"],
        ["b", "FAILS"],
        ["c", "FAILS"],
        ["d", "skipped"],
        ["e", "holds"],
    ]
    for line, words in zip(lines, ["with 143", "bits in conv", "KeyError", "two nodes"], strict=False):
        assert words in line
    assert counts == "1 holds, 3 FAILS, 1 skipped, 0 min"
    cleared = [call for call in calls(tmp_path) if "--cascade=foreground" in call]
    assert len(cleared) == len(scenarios)


def test_the_table_has_a_line_of_bounded_width_for_each() -> None:
    text = table([Result("long", "FAILS", 61, "first\n" + "x" * 500), Result("b", "holds", 5)])
    first, second, counts = text.splitlines()
    assert first.startswith("long  FAILS      61 s  xxx")
    assert len(first) < 190
    assert second == "b     holds       5 s"
    assert counts.endswith("1 min")


def test_waiting_says_what_was_there_instead(play: Play) -> None:
    cluster = play(get_pods={"items": [pod(0, None, phase="Running")]})
    with pytest.raises(Unmet, match=r"not within 0 s: the end of it; resnet-abcde Running"):
        cluster.wait(0, "the end of it", lambda: None)


def test_a_refusal_of_the_server_is_told(tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "error: context \\"kind-x\\" does not exist" >&2\nexit 1\n')
    kubectl.chmod(0o755)
    with pytest.raises(Unmet, match="does not exist"):
        run_all(Cluster("kind-x", "suite", str(kubectl)), None, {})


def test_a_context_must_be_named() -> None:
    outcome = CliRunner().invoke(main, [])
    assert outcome.exit_code == 2
    assert "--context" in outcome.output


# --- the scenarios


def collected(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """What a scenario applies first."""
    found: list[Variant] = []

    def apply(_: Suite, variant: Variant) -> str:
        found.append(variant)
        raise Skipped

    monkeypatch.setattr(Suite, "apply", apply)
    monkeypatch.setattr(Suite, "nodes", lambda _: [{}, {}])
    with pytest.raises(Skipped):
        SCENARIOS[name](Suite(Cluster("x", "y"), Make(Cluster("x", "y")), Path("nowhere")))
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_applies_manifests_that_are_valid_and_runs_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (variant,) = collected(name, monkeypatch)
    arguments = [f"MANIFESTS={write(variant)}", "NAMESPACE=suite", f"KUBECTL={tool('kubectl')}", RENDERED]
    rendered = subprocess.run(
        ["make", "-s", "k8s-render", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"JOB_OUTPUT: /runs/{variant.name}\n" in rendered
    assert "namespace: cifar-residual-job" not in rendered
    (tmp_path / "rendered.yaml").write_text(rendered)
    subprocess.run(
        [tool("kubernetes-validate"), "--strict", "--quiet", "-k", "1.37", str(tmp_path / "rendered.yaml")],
        check=True,
    )


def test_no_scenario_finds_anothers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [collected(name, monkeypatch)[0].name for name in SCENARIOS]
    assert len(set(names)) == len(names)


FAILED = job(("Failed", "True", "PodFailurePolicy"))


@pytest.mark.parametrize(
    ("there", "pods", "verdict"),
    [
        (FAILED, [pod(0, 2)], "holds"),
        (FAILED, [pod(0, 71)], "FAILS"),
        (FAILED, [pod(0, 2), pod(0, 2)], "FAILS"),  # it was tried again
        (job(("Failed", "True", "BackoffLimitExceeded")), [pod(0, 2)], "FAILS"),
        (job(("Complete", "True", "")), [pod(0, 0, phase="Succeeded")], "FAILS"),
    ],
)
def test_a_wrong_option_holds_only_if_the_job_failed_at_once_by_its_code(
    play: Play, tmp_path: Path, there: Object, pods: list[Object], verdict: str
) -> None:
    cluster = play(get_pods={"items": pods}, get_job=there)
    (result,) = runner.run(
        Suite(cluster, Make(cluster), tmp_path), {"a wrong option": SCENARIOS["a wrong option"]}
    )
    assert result.verdict == verdict, result.why


@pytest.mark.parametrize(
    ("completed", "failed", "verdict"),
    [("0,2", "1", "holds"), ("0-2", None, "FAILS"), (None, "0-2", "FAILS")],
)
def test_seeds_hold_only_if_one_alone_failed(
    play: Play, tmp_path: Path, completed: str | None, failed: str | None, verdict: str
) -> None:
    there = job(("Failed", "True", "FailedIndexes"), completedIndexes=completed, failedIndexes=failed)
    cluster = play(get_job=there, get_pods={"items": []})
    name = "one of three seeds diverges"
    (result,) = runner.run(Suite(cluster, Make(cluster), tmp_path), {name: SCENARIOS[name]})
    assert result.verdict == verdict, result.why


def test_a_node_is_drained_only_where_there_is_another(play: Play, tmp_path: Path) -> None:
    cluster = play(get_nodes={"items": [{"spec": {}}, {"spec": {"unschedulable": True}}]})
    (result,) = runner.run(Suite(cluster, Make(cluster), tmp_path), {"drain": SCENARIOS["drain a node"]})
    assert (result.verdict, result.why) == ("skipped", "needs two nodes")
    assert not any("drain" in call for call in calls(tmp_path))
