"""What the tests of GPUs decide before there is one. A GPU is stubbed in TensorFlow's list of devices."""

from __future__ import annotations

import operator
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import tensorflow as tf
from _pytest.mark.expression import Expression

from job.domain.settings import Settings
from job.engine.devices import take_devices
from tests.durability.jobs import ROOT
from tests.gpu import carved
from tests.gpu.conftest import gpu_or_reason
from tests.gpu.scenarios import Device, difference, gpu_in

H100 = Device("GPU", "NVIDIA H100", (9, 0))


def test_without_a_gpu_the_lock_to_install_is_named() -> None:
    with pytest.raises(pytest.skip.Exception, match="skipped: no GPU") as skipped:
        gpu_or_reason(None, driver_lists_one=False)
    lock = str(skipped.value).partition(" -r ")[2].partition(";")[0]
    assert (ROOT / lock).is_file()


def test_a_gpu_that_only_tensorflow_does_not_find_is_a_failure() -> None:
    with pytest.raises(pytest.fail.Exception, match="nvidia-smi lists a GPU, but TensorFlow finds none"):
        gpu_or_reason(None, driver_lists_one=True)
    assert gpu_or_reason(H100, driver_lists_one=True) is H100


def test_the_first_gpu_of_the_answer_is_taken() -> None:
    assert gpu_in('a note of the driver\n[["NVIDIA H100", [9, 0]]]\n') == H100
    assert gpu_in("[]\n") is None


@pytest.mark.parametrize(
    ("capability", "precision", "computed"),
    [((7, 5), "bfloat16", False), ((8, 0), "bfloat16", True), ((7, 0), "float16", True)],
)
def test_older_gpus_have_no_bfloat16(capability: tuple[int, int], precision: str, computed: bool) -> None:
    assert Device("GPU", "a GPU", capability).computes(precision) is computed


def test_losses_differ_by_their_first_steps_alone() -> None:
    assert difference([2.0, 1.0, 1.0, 1.0, 1.0, 9.0], [2.0, 1.0, 0.8, 1.0, 1.0, 1.0]) == pytest.approx(0.25)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A list of one stubbed GPU; what TensorFlow is told about it."""
    told: list[Any] = []
    record: Callable[[str], Any] = lambda what: lambda *arguments: told.append((what, *arguments))  # noqa: E731
    for name in ("set_visible_devices", "set_logical_device_configuration"):
        monkeypatch.setattr(tf.config, name, record(name))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["the GPU"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", record("set_memory_growth"))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"device_name": "H100"})
    yield told
    tf.config.experimental.enable_tensor_float_32_execution(True)


def test_the_job_takes_a_stubbed_gpu_that_is_carved_into_two(configured: list[Any]) -> None:
    carved.carve("GPU", 2, 1024)
    taken = take_devices(Settings(require_gpu=True))
    assert taken.names == ("H100", "H100")
    assert configured[0] == ("set_visible_devices", ["the GPU"], "GPU")
    for what, gpu, logical in configured[1:]:
        assert (what, gpu) == ("set_logical_device_configuration", "the GPU")
        assert [one.memory_limit for one in logical] == [1024, 1024]
    assert len(configured) == 3
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


@pytest.mark.parametrize("target", ["test", "test-slow", "test-all"])
def test_other_targets_leave_the_tests_of_gpus_out(target: str) -> None:
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    runs = re.findall(r"-m pytest(.*)", planned.stdout)
    assert runs
    for options in runs:
        (selection,) = re.findall(r'-m ("[^"]+"|\w+)', options)
        for marks in ({"gpu"}, {"gpu", "slow"}, {"gpu", "alone"}):
            expression = Expression.compile(selection.strip('"'))
            assert not expression.evaluate(partial(operator.contains, marks))


def test_no_ci_needs_a_gpu() -> None:
    for path in (ROOT / ".ci" / "run", *(ROOT / ".github" / "workflows").glob("*.yml")):
        assert "test-gpu" not in path.read_text()
