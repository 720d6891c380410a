"""Which devices are taken, and that TensorFlow uses them. No GPU is here: its list of them is stubbed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from job.domain.errors import ResourceUnavailable, UsageError
from job.domain.settings import Settings
from job.engine import devices
from job.engine.devices import Devices, check_strategy, resolve_precision, take_devices
from job.engine.rendezvous import WorkerGroup, _resolver
from tests.support import cluster_of

A100, T4, P100 = ("A100", (8, 0)), ("T4", (7, 5)), ("P100", (6, 0))


@dataclass(frozen=True)
class StubbedGpu:
    name: str
    details: dict[str, Any]


@pytest.fixture
def stub_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let TensorFlow list GPUs that are not here, and take its settings without using them."""

    def stub(*kinds: tuple[str, tuple[int, int]]) -> None:
        gpus = [StubbedGpu(name, {"device_name": name, "compute_capability": kind}) for name, kind in kinds]
        inner = tf.config.list_physical_devices
        listed = lambda kind=None: gpus if kind == "GPU" else inner(kind)  # noqa: E731
        monkeypatch.setattr(tf.config, "list_physical_devices", listed)
        monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: None)
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda *_: None)
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: gpu.details)

    return stub


@pytest.mark.parametrize(
    ("kinds", "replicas", "precision"),
    [
        ([A100], None, "bfloat16"),
        ([A100, T4], None, "float16"),
        ([A100, T4, P100], None, "float32"),
        ([A100, T4], 1, "bfloat16"),  # the T4 is not used
    ],
)
def test_the_weakest_stubbed_gpu_that_is_used_decides_on_the_precision(
    stub_gpus: Any, kinds: Any, replicas: int | None, precision: str
) -> None:
    stub_gpus(*kinds)
    assert resolve_precision("auto", filters=16, replicas=replicas) == precision
    assert resolve_precision("float32", filters=16, replicas=replicas) == "float32"


def test_every_stubbed_gpu_is_taken_or_as_many_as_wanted(stub_gpus: Any) -> None:
    stub_gpus(A100, A100, T4)
    taken = take_devices(Settings())
    assert (taken.kind, taken.names, taken.capabilities) == ("GPU", ("A100", "A100", "T4"), ("7.5", "8.0"))
    assert taken.addresses == ("GPU:0", "GPU:1", "GPU:2")
    assert str(taken) == "3 x GPU (A100; T4, compute capability 7.5 and 8.0)"
    assert take_devices(Settings(replicas=2), workers=3).names == ("A100", "A100")
    with pytest.raises(UsageError, match="--replicas must not exceed the 3 GPUs here, not 4"):
        take_devices(Settings(replicas=4))


def test_several_cpu_devices_in_each_of_several_workers_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--replicas must be 1 where 2 workers compute on CPUs, not 2: .*one CPU"
    ):
        take_devices(Settings(replicas=2), workers=2)


def test_a_required_gpu_that_is_missing_is_named() -> None:
    with pytest.raises(ResourceUnavailable, match="--require-gpu: TensorFlow sees no GPU"):
        take_devices(Settings(require_gpu=True))


def test_a_gpu_that_the_driver_has_and_tensorflow_has_not_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where CUDA's libraries are not installed; not where somebody hides the GPUs."""
    monkeypatch.setattr(devices.log, "propagate", True)
    monkeypatch.setattr(devices, "_take_cpus", lambda replicas: Devices("CPU", ("one",)))
    for driver, visible, warned in (
        (False, "0", False),
        (True, "-1", False),
        (True, "", False),
        (True, "0", True),
    ):
        monkeypatch.setattr(devices, "DRIVER", str(tmp_path if driver else tmp_path / "none"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        caplog.clear()
        take_devices(Settings())
        assert ("TensorFlow sees no GPU, though NVIDIA's driver is here" in caplog.text) == warned


def test_the_start_refuses_a_strategy_over_other_devices_than_it_claims() -> None:
    cpus, gpus = (Devices(kind, ("one", "two")) for kind in ("CPU", "GPU"))
    strategy = cluster_of(2).strategy
    check_strategy(strategy, cpus)
    lists = r"must compute on GPU:0, GPU:1 with 2 replicas in all, but it computes on CPU:0, CPU:1 with 2;"
    with pytest.raises(ResourceUnavailable, match=lists):
        check_strategy(strategy, gpus)
    with pytest.raises(ResourceUnavailable, match=r"with 4 replicas in all, but .* with 2;"):
        check_strategy(strategy, cpus, workers=2)
    with pytest.raises(ResourceUnavailable, match=r"on CPU:0, CPU:1 .* but it computes on CPU:0 with 1"):
        check_strategy(tf.distribute.get_strategy(), cpus)
    check_strategy(tf.distribute.get_strategy(), Devices("CPU", ("one",)))


@pytest.mark.parametrize(("kind", "wanted"), [("GPU", {"GPU": 2}), ("CPU", {})])
def test_the_resolver_tells_tensorflow_how_many_stubbed_gpus_a_worker_has(
    kind: Any, wanted: dict[str, int]
) -> None:
    """Without that number TensorFlow trains on one CPU device a worker, and says nothing."""
    group = WorkerGroup(("127.0.0.1:2222", "127.0.0.1:2223"), 1)
    resolver = _resolver(group, Devices(kind, ("one", "other")))
    assert resolver._num_accelerators == wanted
