"""Two runs of each network, `make tensorboard` over them, and a page in a headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.records import newest_record

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"  # for a person to look at
SEEDS = ("0", "1")
MODELS = ("resnet", "plainnet")
# Small batches: after three epochs of them the curves are apart.
TINY = ["--data", "sample", "--blocks", "1,1", "--filters", "8", "--epochs", "3", "--batch-size", "20"]


@dataclass(frozen=True)
class Run:
    """A finished run and what its files say."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> Any:
        """What decides the run."""
        return self.json("config.json")["identity"]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def accuracies(self, split: str) -> list[float]:
        """Accuracy of each epoch."""
        return [entry[split]["accuracy"] for entry in newest_record(self.folder)["history"]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs of each network, in the order of their names."""
    output = tmp_path_factory.mktemp("trained") / "runs"
    commands = [["train", "--model", model, "--seed", seed] for seed in SEEDS for model in MODELS]
    # One process, because TensorFlow's import takes seconds.
    code = f"""
from job.cli import cli
for command in {commands}:
    cli.main([*command, *{TINY}, "--output", {str(output)!r}], standalone_mode=False)
"""
    # The suite's own choice is for 16 filters; the job chooses for those of TINY.
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    found = [Run(folder) for folder in sorted(output.iterdir()) if (folder / "result.json").exists()]
    assert len(found) == len(commands)
    return found


@pytest.fixture(scope="session")
def address(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `make tensorboard` tells its user to open, once the server has read everything."""
    log = tmp_path_factory.mktemp("log") / "tensorboard.log"
    arguments = [f"--old-file={sys.prefix}/.ready", f"VENV={sys.prefix}", f"RUNS={runs[0].folder.parent}"]
    command = ["make", "tensorboard", *arguments, "PORT=0", "ARGS=--host=127.0.0.1 --reload_interval=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            yield wait_until(lambda: address_in(log.read_text()) if serves(log, runs) else None, log)
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # SIGINT is ignored where a shell runs the tests behind it


def address_in(log: str) -> str | None:
    found = re.search(r"http://127\.0\.0\.1:\d+/", log)
    return found and found[0]


def serves(log: Path, runs: list[Run]) -> bool:
    """Whether the server has the last thing of every run: it reads a run's folders in any order."""
    address = address_in(log.read_text())
    if address is None:
        return False
    try:
        shown = {plugin: get(f"{address}data/plugin/{plugin}/tags") for plugin in ("scalars", "images")}
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return all(shown["images"].get(run.name) and shown["scalars"].get(f"{run.name}/train") for run in runs)


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def wait_until(look: Callable[[], str | None], log: Path, seconds: float = 180.0) -> str:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"TensorBoard did not get there in time: {log.read_text()}"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The distribution's browser: Playwright's own is never downloaded."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.fail("there is no Chromium; `make test-browser` installs it", pytrace=False)
    with sync_playwright() as playwright:
        # Root, small /dev/shm and no GPU are what containers have.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh page whose last sight is kept as a picture, also when the test fails."""
    page = browser.new_page(viewport={"width": 1920, "height": 1080}, timezone_id="UTC")
    page.set_default_timeout(60_000)  # milliseconds
    yield page
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{request.node.name.removeprefix('test_')}.png")
    page.close()
