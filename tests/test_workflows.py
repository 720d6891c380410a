"""What the workflows promise; they run on GitHub alone, so their text is tested here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(job.get("steps", []))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_and_told_its_version(path: Path) -> None:
    lines = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert lines
    for name, comment in lines:
        if not name.startswith("./"):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_may_write_but_what_must(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert not workflow["permissions"] or workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        allowed = {("release", "images"): {"id-token"}, ("release", "notes"): {"contents"}}
        written = {scope for scope, right in job.get("permissions", {}).items() if right == "write"}
        assert written == allowed.get((path.stem, name), set())


def test_an_image_is_tested_scanned_and_signed_before_it_has_a_name() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["images"]["needs"] == "test"
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    text = [str(step) for step in steps_of(jobs["images"])]
    order = ["build-push-action", "trivy-action", "cosign sign", "imagetools create --tag"]
    places = [next(index for index, step in enumerate(text) if word in step) for word in order]
    assert places == sorted(places)
    (build,) = [step["with"] for step in steps_of(jobs["images"]) if step.get("id") == "build"]
    assert "push-by-digest=true" in build["outputs"]
    assert (build["sbom"], build["provenance"]) == (True, "mode=max")
    assert "exit-code': 1" in text[places[1]]


def test_the_release_builds_what_the_dockerfile_has() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    for image in jobs["images"]["strategy"]["matrix"]["include"]:
        assert re.search(rf"^FROM .* AS {image['target']}$", dockerfile, re.MULTILINE)
        assert re.search(rf"^ARG {image['base']}=\S+:\S+$", dockerfile, re.MULTILINE)
    (build,) = [step["with"] for step in steps_of(jobs["images"]) if step.get("id") == "build"]
    for name in re.findall(r"^([A-Z]+)=", build["build-args"], re.MULTILINE):
        assert dockerfile.count(f"ARG {name}=unknown") == 2
        assert dockerfile.count(f'"${{{name}}}"') == 2
