"""Podman, the two images as `make docker-build` makes them, and the figures of a run of these tests."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.container import engine as podman
from tests.container.engine import ROOT, USER, Engine
from tests.records import newest_record

NAME = "localhost/cifar-residual-job-test"
TINY = ("--data", "sample", "--blocks", "1,1,1", "--filters", "8")
EPOCHS, STEPS_PER_EPOCH = 16, 8  # 1,000 images in batches of 128
RESNET = ("train", "--model", "resnet", *TINY, "--epochs", str(EPOCHS))
PLAINNET = ("train", "--model", "plainnet", *TINY, "--epochs", "1")
FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gpu_image: builds the image with CUDA's libraries (7 GB), on demand: -m gpu_image"
    )
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[FIGURES]:
        terminalreporter.section("container images")
        for line in config.stash[FIGURES]:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines for the summary: sizes and times."""
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Podman; a machine that cannot run it fails the tests, which nobody has asked for by accident."""
    with podman.exclusive():
        try:
            engine = podman.prepare()
        except podman.Unsuitable as problem:
            pytest.fail(str(problem), pytrace=False)
        engine.clean()
        yield engine
        engine.clean()


@dataclass(frozen=True)
class Images:
    """The names of the images under test."""

    job: str
    tensorboard: str
    revision: str  # of the source, when they were built


@pytest.fixture(scope="session")
def images(engine: Engine, figures: list[str]) -> Images:
    """Both images, built as a user builds them, for the CPU."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    images = Images(f"{NAME}:1", f"{NAME}-tensorboard:1", revision=head.stdout.strip())
    arguments = ["DOCKER=podman", f"IMAGE={images.job}", f"BUILD_ARGS={shlex.join(podman.build_arguments())}"]
    environment = {name: value for name, value in engine.environment.items() if not name.startswith("MAKE")}
    started = time.monotonic()
    with podman.replacing(engine, images.job, images.tensorboard):
        built = subprocess.run(
            ["make", "docker-build", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if built.returncode:
        pytest.fail(f"make docker-build failed:\n{built.stdout[-6000:]}{built.stderr[-6000:]}", pytrace=False)
    cached = built.stdout.count("Using cache")
    figures.append(f"both images built in {time.monotonic() - started:.1f} s, {cached} steps from the cache")
    return images


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder that the images' user may write to, to mount as /runs."""
    return owned(tmp_path / "runs")


def owned(folder: Path, user: int = USER) -> Path:
    """Make a folder that belongs to ``user``."""
    folder.mkdir()
    os.chown(folder, user, user)
    return folder


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def outcome(self) -> dict[str, Any]:
        """All numbers of the result and the history that do not measure time or memory."""
        result, history = self.json("result.json"), newest_record(self.folder)["history"]
        kept = {key: result[key] for key in ("train", "validation", "test", "confusion", "steps", "epochs")}
        scalars = [
            (
                entry["step"],
                *(entry[split][key] for split in ("train", "validation") for key in ("loss", "accuracy")),
            )
            for entry in history
        ]
        return {**kept, "history": scalars}


def only_run(runs: Path, model: str = "") -> Run:
    """The one run in a folder, or the one of a model."""
    (folder,) = (
        path for path in runs.iterdir() if not path.name.startswith(".") and path.name.startswith(model)
    )
    return Run(folder)


@dataclass(frozen=True)
class Trained:
    """Two runs in one folder that nothing disturbed."""

    resnet: Run
    plainnet: Run
    log: str  # of the ResNet's container


@pytest.fixture(scope="session")
def trained(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A ResNet and a PlainNet, each trained by a strictly confined container of its own."""
    runs = owned(tmp_path_factory.mktemp("trained") / "runs")
    finished = [engine.run(images.job, *command, runs=runs) for command in (RESNET, PLAINNET)]
    assert [each.returncode for each in finished] == [0, 0], [each.stderr for each in finished]
    return Trained(only_run(runs, "resnet"), only_run(runs, "plainnet"), finished[0].stderr)
