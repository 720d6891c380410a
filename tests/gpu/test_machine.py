"""All that one GPU can show of this job; the same on the CPU shows that the tests themselves work.

Losses are compared with a CPU's over the first steps, in float32 without TF32. On CPUs, other arithmetic
(XLA, replicas) made a difference of 1e-6 to them, bfloat16 of 1e-4 and float16 of 2e-3.
"""

from __future__ import annotations

import json
import math
import signal

import pytest

from tests.durability.outcome import check_same_outcome, outcome
from tests.gpu.report import Report
from tests.gpu.scenarios import NO_GPU, Machine, Run, difference

pytestmark = pytest.mark.timeout(1500)

# The largest relative difference of a loss. Half a batch, or statistics of half, make 1e-2 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}
MODELS = ("resnet", "plainnet")
FLOAT32 = ("--precision", "float32")
DETERMINISTIC = (*FLOAT32, "--deterministic", "--commit-every", "3steps")
ARTICLE = ("--blocks", "2,5,5,2", "--filters", "64", "--batch-size", "128", "--epochs", "5")


@pytest.fixture(scope="module")
def of_cpu(machine: Machine) -> dict[str, Run]:
    """Each network, trained on one CPU device."""
    return {
        model: machine.train(f"{model}-of-cpu", "--model", model, *FLOAT32, on_cpu=True) for model in MODELS
    }


def check(
    run: Run, machine: Machine, report: Report, what: str, reference: Run, *, replicas: int = 1
) -> None:
    """It trained on the device, to the losses of the reference."""
    result = run.result
    assert result["devices"] == [machine.device.name] * (replicas // result["workers"])
    assert result["replicas"] == replicas
    assert all(map(math.isfinite, run.losses))
    off = difference(run.losses, reference.losses)
    report.note(what, run, difference_from_cpu=off)
    assert off <= TOLERANCE[result["precision"]]
    assert run.images_on == [machine.device.kind]  # or each step would copy all of them there
    assert machine.device.kind == "CPU" or min(run.peak_memory_bytes) > 0


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("model", MODELS)
def test_a_network_trains_in_each_precision(
    machine: Machine, report: Report, of_cpu: dict[str, Run], model: str, precision: str
) -> None:
    if not machine.device.computes(precision):
        pytest.skip(f"{machine.device.name} has no {precision}: compute capability 8.0 or AVX-512 has it")
    run = machine.train(f"{model}-{precision}", "--model", model, "--precision", precision)
    assert run.result["precision"] == precision
    check(run, machine, report, f"{model}, {precision}", of_cpu[model])


@pytest.mark.parametrize("xla", ["on", "off"])
def test_xla_changes_rounding_only(
    machine: Machine, report: Report, of_cpu: dict[str, Run], xla: str
) -> None:
    run = machine.train(f"xla-{xla}", "--model", "resnet", *FLOAT32, "--xla", xla)
    check(run, machine, report, f"XLA {xla}", of_cpu["resnet"])


def test_a_trained_network_predicts_what_it_does_on_the_cpu(machine: Machine, of_cpu: dict[str, Run]) -> None:
    for run in of_cpu.values():
        mine, reference = machine.evaluate(run), run.result["validation"]
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert mine["accuracy"] == pytest.approx(reference["accuracy"], abs=1 / 500)  # an image


def test_two_logical_devices_train_as_one(machine: Machine, report: Report, of_cpu: dict[str, Run]) -> None:
    run = machine.train("two-devices", "--model", "resnet", *FLOAT32, devices=2)
    assert len(run.peak_memory_bytes) == 2
    check(run, machine, report, "two logical devices", of_cpu["resnet"], replicas=2)


def test_two_logical_devices_train_with_statistics_of_their_own_under_xla(
    machine: Machine, report: Report
) -> None:
    options = ("--model", "resnet", *FLOAT32, "--no-sync-batch-norm", "--xla", "on")
    run = machine.train("unsynchronized", *options, devices=2)
    assert all(map(math.isfinite, run.losses))
    report.note("two logical devices, XLA on, batch norm not synchronized", run)


@pytest.mark.parametrize("devices", [1, 2])
def test_two_workers_share_the_device(
    machine: Machine, report: Report, of_cpu: dict[str, Run], devices: int
) -> None:
    workers = machine.start_workers(f"workers-of-{devices}", "--model", "resnet", *FLOAT32, devices=devices)
    codes = [worker.job.wait() for worker in workers]
    assert codes == [0, 0], "\n".join(worker.job.text for worker in workers)
    assert workers[0].result["workers"] == 2
    assert workers[0].losses == workers[1].losses
    what = f"two workers, {devices} logical devices each"
    check(workers[0], machine, report, what, of_cpu["resnet"], replicas=2 * devices)


def test_a_deterministic_run_has_the_same_bits_twice_and_after_a_kill(machine: Machine) -> None:
    first, again = (machine.train(name, *DETERMINISTIC) for name in ("first", "again"))
    assert first.losses == again.losses
    reference = outcome(first.store)
    check_same_outcome(again.store, reference)

    killed = machine.start("killed", *DETERMINISTIC, driver={"point": "append", "count": 3})
    killed.job.wait_until_stopped()
    killed.job.send(signal.SIGKILL)
    assert killed.job.wait() == -signal.SIGKILL
    resumed = machine.train("killed", *DETERMINISTIC)
    assert "continuing from step 3" in resumed.job.text
    check_same_outcome(resumed.store, reference)


def test_a_required_gpu_that_is_hidden_is_missed(machine: Machine) -> None:
    run = machine.start("hidden", "--require-gpu", environment=NO_GPU)
    assert run.job.wait() == 69, run.job.text
    assert "--require-gpu: TensorFlow sees no GPU on this machine" in run.job.text


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_speed_and_memory_are_measured(machine: Machine, report: Report, precision: str) -> None:
    network = ARTICLE if machine.device.kind == "GPU" else ("--epochs", "2")
    run = machine.train(f"speed-{precision}", *network, "--precision", precision)
    name = f"ResNet-{run.result['layers']}, --precision {precision}"
    report.note(name, run)
    written = json.loads(report.path.read_text())
    assert written["device"]["name"] == machine.device.name
    assert written["measured"][name]["images_per_second"] > 0
    assert len(written["measured"][name]["peak_memory_bytes"]) == 1
