"""TensorBoard's image shows runs over HTTP: from a mounted folder, and live from a real object store."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.container.conftest import EPOCHS, PLAINNET, TINY, Images, Trained
from tests.container.engine import STRICT, Engine
from tests.gcs_server import Gateway
from tests.records import newest_record

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

T = TypeVar("T")
ON_HOST = "--network=host"  # where the object store listens


class Board:
    """A running TensorBoard."""

    def __init__(self, engine: Engine, container: str, port: int) -> None:
        self._engine, self._container, self._port = engine, container, port

    def get(self, path: str, **query: str) -> Any:
        with urlopen(f"http://127.0.0.1:{self._port}/{path}?{urlencode(query)}", timeout=30) as answer:
            return json.load(answer)

    def runs(self) -> set[str]:
        return set(self.get("data/runs"))

    def steps(self, run: str, tag: str) -> list[int]:
        return [step for _, step, _ in self.get("data/plugin/scalars/scalars", run=run, tag=tag)]

    def values(self, run: str, tag: str) -> list[float]:
        return [value for _, _, value in self.get("data/plugin/scalars/scalars", run=run, tag=tag)]

    def wait(self, what: Callable[[], T], until: Callable[[T], bool], seconds: float = 60) -> T:
        """Ask again until the answer satisfies; fail with the last answer and the log."""
        deadline, answer = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            try:
                answer = what()
            except (URLError, ConnectionError, TimeoutError):
                answer = None
            else:
                if until(answer):
                    return answer
            time.sleep(0.3)
        log = self._engine("logs", self._container, check=False)
        raise AssertionError(f"the last answer was {answer!r}; the log:\n{log.stdout}{log.stderr}")


@contextmanager
def board(engine: Engine, image: str, *arguments: str, options: tuple[str, ...] = ()) -> Iterator[Board]:
    """Start TensorBoard in a strict container, and stop it as `docker stop` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    every_second = ("--reload_interval=1", f"--port={port}")
    container = engine.start(image, *arguments, *every_second, options=(ON_HOST, *options))
    try:
        yield Board(engine, container, port)
        started = time.monotonic()
        engine("stop", "--time", "15", container)
        assert time.monotonic() - started < 10, "TensorBoard ignores SIGTERM"
    finally:
        engine("rm", "--force", "--time", "0", container)


def test_two_runs_of_a_mounted_folder(engine: Engine, images: Images, trained: Trained) -> None:
    resnet, plainnet = trained.resnet, trained.plainnet
    expected = {name for run in (resnet, plainnet) for name in curves_of(run.folder.name).values()}
    mount = f"--volume={resnet.folder.parent}:/runs:ro"
    with board(engine, images.tensorboard, options=(mount,)) as shown:
        shown.wait(shown.runs, expected.issubset)
        for run in (resnet, plainnet):
            history = newest_record(run.folder)["history"]
            for split, name in curves_of(run.folder.name).items():
                accuracies = [entry[split]["accuracy"] for entry in history]
                values = shown.wait(
                    lambda name=name: shown.values(name, "epoch_accuracy"),  # type: ignore[misc]
                    lambda values, history=history: len(values) == len(history),  # type: ignore[misc]
                )
                assert values == pytest.approx(accuracies, rel=1e-6)
    assert len(newest_record(resnet.folder)["history"]) == EPOCHS


def test_a_bucket_is_shown_live_while_the_job_writes_to_it(
    engine: Engine, images: Images, gcs_server: Gateway
) -> None:
    """The job's image writes, TensorBoard's reads; what comes later appears without a restart."""
    bucket = gcs_server.new_bucket()
    runs = f"{bucket}/experiments/first"
    store = f"--env=STORAGE_EMULATOR_HOST={gcs_server.url}"

    def train(*command: str) -> None:
        finished = engine(
            "run", "--rm", *STRICT, ON_HOST, store, images.job, *command, "--output", runs, check=False
        )
        assert finished.returncode == 0, finished.stderr

    resnet = ("train", "--model", "resnet", *TINY)
    train(*resnet, "--epochs", "1")
    anonymous = "--env=FSSPEC_GCS_TOKEN=anon"  # the store of the tests knows no credentials
    with board(engine, images.tensorboard, f"--logdir={runs}", options=(store, anonymous)) as shown:
        (first,) = shown.wait(lambda: trains_of(shown.runs()), lambda names: len(names) == 1)
        assert first.startswith("resnet8-")
        shown.wait(lambda: shown.steps(first, "epoch_loss"), lambda steps: steps == [1])
        train(*resnet, "--epochs", "2")
        shown.wait(lambda: shown.steps(first, "epoch_loss"), lambda steps: steps == [1, 2])
        train(*PLAINNET)
        names = shown.wait(lambda: trains_of(shown.runs()), lambda names: len(names) == 2)
        (second,) = names - {first}
        assert second.startswith("plainnet8-")
        shown.wait(lambda: shown.steps(second, "epoch_loss"), lambda steps: steps == [1])


def curves_of(run: str) -> dict[str, str]:
    """The name under which TensorBoard lists each curve of a run."""
    return {"validation": run, "train": f"{run}/train"}


def trains_of(names: set[str]) -> set[str]:
    return {name for name in names if Path(name).name == "train"}
