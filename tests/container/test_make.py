"""What `make` asks of Docker or podman, told by doubles of the programs; and once with the real ones."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import job
from tests.container.conftest import Images, Run, only_run
from tests.container.engine import ROOT, Engine

INHERITED = {"ARGS", "DATA", "DOCKER", "DOCKER_ARGS", "EPOCHS", "IMAGE", "MODEL", "OUTPUT", "PORT", "RUNS"}
CONTAINER = [pytest.mark.container, pytest.mark.timeout(1800)]
DOUBLE = """#!/usr/bin/env python3
import json, sys
if sys.argv[1:2] == ["--version"]: print({version!r})
elif sys.argv[1:2] == ["info"]: print({security!r})
elif sys.argv[1:3] == ["image", "inspect"]: print({revision!r}); sys.exit({absent})
else:
    with open({calls!r}, "a") as file: print(json.dumps(sys.argv[1:]), file=file)
    sys.exit({code} if sys.argv[1] == "run" else 0)
"""


@dataclass
class House:
    """A user's machine: doubles of the programs that `make` finds first, in a folder of their own."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine()
        self.user(1234)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def engine(
        self,
        name: str = "docker",
        *,
        version: str = "Docker version 27.3.1, build ce12230",
        security: str = "[name=seccomp,profile=builtin name=cgroupns]",
        absent: int = 0,
        revision: str = "",
        code: int = 0,
    ) -> None:
        calls = str(self.folder / "calls")
        text = DOUBLE.format(
            version=version, security=security, absent=absent, revision=revision, calls=calls, code=code
        )
        self.program(name, text)

    def user(self, number: int) -> None:
        self.program("id", f"#!/bin/sh\necho {number}\n")

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MAKE", "MFLAGS", "GOOGLE_", "CLOUDSDK_")) and name not in INHERITED
        }
        environment = {
            **inherited,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.folder),
            **self.variables,
        }
        places = [f"RUNS={self.folder}/runs", f"DATA={self.folder}/data"]
        command = ["make", *places, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, *arguments: str, target: str = "docker-run") -> list[str]:
        """Make a target and return the arguments of the one container that it ran."""
        made = self.make(target, *arguments)
        assert made.returncode == 0, made.stderr
        (call,) = self.calls()
        assert call[0] == "run"
        return call[1:]


def values(call: list[str], option: str) -> list[str]:
    """What follows each occurrence of an option."""
    return [call[index + 1] for index, word in enumerate(call) if word == option]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_run_is_confined_and_belongs_to_the_caller(house: House) -> None:
    call = house.run("MODEL=resnet", "EPOCHS=3", "ARGS=--seed 1 --name 'my run'")
    image = call.index(f"cifar-residual-job:{job.__version__}")
    assert call[image + 1 :] == [
        "train",
        "--model",
        "resnet",
        "--epochs",
        "3",
        "--seed",
        "1",
        "--name",
        "my run",
    ]
    assert {"--rm", "--read-only"} <= set(call[:image])
    assert values(call, "--cap-drop") == ["ALL"]
    assert "no-new-privileges" in values(call, "--security-opt")
    assert values(call, "--user") == ["1234:1234"]
    assert values(call, "--volume") == [f"{house.folder}/data:/data", f"{house.folder}/runs:/runs"]
    assert (house.folder / "data").is_dir()  # or Docker would make it, for root
    assert values(call, "--env") == []
    assert "--userns" not in call
    assert "--tty" not in call


@pytest.mark.parametrize(
    ("version", "security", "user", "expected"),
    [
        ("podman version 4.3.1", "", 1234, ["1234:1234", "keep-id"]),
        ("podman version 4.3.1", "", 0, ["0:0"]),
        ("Docker version 27.3.1, build x", "[name=seccomp name=rootless]", 1234, ["1234:1234", "0:0"]),
    ],
)
def test_who_the_caller_is_to_other_engines(
    house: House, version: str, security: str, user: int, expected: list[str]
) -> None:
    house.engine("engine", version=version, security=security)
    house.user(user)
    call = house.run("MODEL=plainnet", "DOCKER=engine")
    assert values(call, "--user") + values(call, "--userns") == expected


def test_gpus_are_used_where_they_are(house: House) -> None:
    house.program("nvidia-smi", '#!/bin/sh\ntest "$1" = --list-gpus\n')
    call = house.run("MODEL=resnet")
    assert values(call, "--gpus") == ["all"]
    assert values(call, "--shm-size") == ["1g"]


def test_gpus_are_used_by_podman_where_they_are(house: House) -> None:
    house.program("nvidia-smi", "#!/bin/sh\n")
    house.engine("podman", version="podman version 5.2.0")
    call = house.run("MODEL=resnet", "DOCKER=podman")
    assert values(call, "--device") == ["nvidia.com/gpu=all"]
    assert "--gpus" not in call


def test_that_there_is_no_gpu_is_said(house: House) -> None:
    made = house.make("docker-run", "MODEL=resnet")
    assert "no NVIDIA GPU" in made.stdout
    assert "--gpus" not in house.calls()[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("sample", (["JOB_DATA=sample"], [])),
        ("gs://bucket/cifar", (["JOB_DATA=gs://bucket/cifar"], [])),
        ("{folder}/a b.TAR", (["JOB_DATA=/archive"], ["{folder}/a b.TAR:/archive:ro"])),
        ("{folder}/my data", ([], ["{folder}/my data:/data"])),
    ],
)
def test_where_the_data_comes_from(house: House, data: str, expected: tuple[list[str], list[str]]) -> None:
    (house.folder / "a b.TAR").touch()
    call = house.run("MODEL=resnet", f"DATA={data.format(folder=house.folder)}")
    environment, mounts = expected
    assert values(call, "--env") == environment
    assert values(call, "--volume")[:-1] == [mount.format(folder=house.folder) for mount in mounts]


@pytest.mark.parametrize("place", ["home", "gcloud", "variable"])
def test_a_bucket_gets_the_callers_credentials_read_only(house: House, place: str) -> None:
    key = house.folder / {"home": ".config/gcloud", "gcloud": "elsewhere", "variable": "keys"}[place]
    key /= "my key.json" if place == "variable" else "application_default_credentials.json"
    key.parent.mkdir(parents=True)
    key.write_text("{}")
    if place == "gcloud":
        house.variables["CLOUDSDK_CONFIG"] = str(key.parent)
    elif place == "variable":
        house.variables["GOOGLE_APPLICATION_CREDENTIALS"] = str(key)
    for target, bucket in (("docker-run", "JOB_OUTPUT=gs://bucket/runs"), ("docker-tensorboard", None)):
        call = house.run("MODEL=resnet", "DATA=sample", "OUTPUT=gs://bucket/runs", target=target)
        (house.folder / "calls").unlink()
        assert values(call, "--volume") == [f"{key}:/run/secrets/google.json:ro"]
        assert "GOOGLE_APPLICATION_CREDENTIALS=/run/secrets/google.json" in values(call, "--env")
        assert bucket is None or bucket in values(call, "--env")
        assert values(call, "--user") == ["1234:1234"]  # who may read the key


def test_a_bucket_without_credentials_says_where_they_were_expected(house: House) -> None:
    made = house.make("docker-run", "MODEL=resnet", "DATA=sample", "OUTPUT=gs://bucket/runs")
    assert made.returncode == 0
    assert f"{house.folder}/.config/gcloud/application_default_credentials.json" in made.stdout
    assert values(house.calls()[0], "--volume") == []


def test_credentials_stay_at_home_without_a_bucket(house: House) -> None:
    house.variables["GOOGLE_APPLICATION_CREDENTIALS"] = __file__
    call = house.run("MODEL=resnet", "DATA=sample")
    assert "google" not in " ".join(call).lower()


def test_a_missing_image_is_built_first(house: House) -> None:
    house.engine(absent=1)
    assert house.make("docker-run", "MODEL=resnet", "IMAGE=mine:2").returncode == 0
    names = [call[call.index("--tag") + 1] for call in house.calls() if call[0] == "build"]
    assert names == ["mine:2", "mine-tensorboard:2"]
    assert "mine:2" in house.calls()[-1]


def test_an_image_of_another_commit_is_used_and_named(house: House) -> None:
    command = ["git", "rev-parse", "HEAD"]
    here = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for revision, said in (("0123abc", True), (here, False)):
        house.engine(revision=revision)
        made = house.make("docker-run", "MODEL=resnet")
        assert made.returncode == 0, made.stderr
        assert ("make docker-build renews it" in made.stdout) == said
        assert (f"commit {revision};" in made.stdout) == said


def test_a_failed_run_fails_make(house: House) -> None:
    house.engine(code=75)
    made = house.make("docker-run", "MODEL=resnet")
    assert made.returncode == 2
    assert "Error 75" in made.stderr


@pytest.mark.parametrize("target", ["docker-run", "docker-push"])
def test_what_is_missing_is_asked_for_with_an_example(house: House, target: str) -> None:
    made = house.make(target)
    assert made.returncode == 2
    assert f"example: make {target} " in made.stderr
    assert house.calls() == []


def test_tensorboard_is_reached_from_this_machine_only(house: House) -> None:
    call = house.run("PORT=7007", "OUTPUT=" + str(house.folder / "my runs"), target="docker-tensorboard")
    assert values(call, "--publish") == ["127.0.0.1:7007:6006"]
    assert values(call, "--volume") == [f"{house.folder}/my runs:/runs:ro"]
    assert call[call.index(f"cifar-residual-job-tensorboard:{job.__version__}") + 1 :] == [
        "--logdir",
        "/runs",
    ]


@pytest.mark.parametrize(
    ("image", "tag"), [("r.example:5000/t/n", job.__version__), ("r.example/t/n:2.0", "2.0")]
)
def test_push_sends_both_images_under_the_given_name(house: House, image: str, tag: str) -> None:
    made = house.make("docker-push", f"IMAGE={image}")
    assert made.returncode == 0, made.stderr
    name = image.removesuffix(f":{tag}")
    both = [f"{name}:{tag}", f"{name}-tensorboard:{tag}"]
    assert [call[1] for call in house.calls() if call[0] == "push"] == both
    built = [call for call in house.calls() if call[0] == "build"]
    assert [call[call.index("--tag") + 1] for call in built] == both
    assert all(f"VERSION={job.__version__}" in call for call in built)
    assert [values(call, "--platform") for call in built] == [["linux/amd64"]] * 2  # as the cluster's nodes


def test_images_are_built_for_this_machine_unless_a_platform_is_named(house: House) -> None:
    for given, platforms in (([], []), (["PLATFORM=linux/arm64"], ["linux/arm64"])):
        (house.folder / "calls").unlink(missing_ok=True)
        made = house.make("docker-build", *given)
        assert made.returncode == 0, made.stderr
        assert [values(call, "--platform") for call in house.calls()] == [platforms] * 2


class TestForReal:
    pytestmark = CONTAINER

    def test_docker_run_trains_into_the_callers_folder(
        self, engine: Engine, images: Images, tmp_path: Path
    ) -> None:
        settings = {
            "DOCKER": "podman",
            "IMAGE": images.job,
            "MODEL": "plainnet",
            "DATA": "sample",
            "EPOCHS": "1",
            "OUTPUT": str(tmp_path / "my runs"),
            "ARGS": shlex.join(["--blocks", "1", "--filters", "4", "--name", "made"]),
        }
        made = subprocess.run(
            ["make", "docker-run", *(f"{name}={value}" for name, value in settings.items())],
            cwd=ROOT,
            env=engine.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        run: Run = only_run(tmp_path / "my runs")
        assert run.folder.name == "made"
        assert run.json("result.json")["epochs"] == 1
        assert {path.stat().st_uid for path in run.folder.rglob("*")} == {os.getuid()}
