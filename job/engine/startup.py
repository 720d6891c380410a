"""What must happen around TensorFlow's import: its environment, and the notes that no log level silences."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from job.domain.errors import ResourceUnavailable

# Notes that are written before the log level applies, or as errors on every machine without a GPU's driver.
NOISE = (
    r"All log messages before absl::InitializeLog|cudart_stub\.cc|computation_placer\.cc"
    r"|cpu_feature_guard\.cc"
    r"|Unable to register cu\w+ factory|TF-TRT Warning|port\.cc.*oneDNN|To enable the following instructions"
    r"|cuda_platform\.cc.*(303|no CUDA-capable device|CUDA_ERROR_NO_DEVICE)"
)
# Passes on every other line of its input as it comes, also when the process that wrote it has died.
FILTER = """
import os, re, sys
noise = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not noise.search(line):
        os.write(2, line)
"""
AMD = "AuthenticAMD"  # as the processor calls its maker
FILTER_SECONDS = 5.0  # it ends within milliseconds, unless a process that TensorFlow started keeps the pipe


def check_processor() -> None:
    """Refuse a processor for which TensorFlow would end the process, without a word that gets through.

    Raises:
        ResourceUnavailable: it has no AVX, as in virtual machines of a very general processor model.
    """
    flags = processor_flags()
    if flags and "avx" not in flags:
        raise ResourceUnavailable(
            "TensorFlow needs a processor with AVX, and this one has none; in a virtual machine, pass the "
            "host's processor model through (QEMU: -cpu host)"
        )


def set_environment(*, filters: int) -> None:
    """Choose what TensorFlow reads from its environment at import, where the user has not chosen.

    By default TensorFlow uses oneDNN on processors with AVX-512 VNNI or AMX only. On others, too, its
    convolutions train the small network at twice the speed and ResNet-30 at 1.5 times (measured: AMD Zen 3,
    2 cores). It stays off where channels do not fill its vectors.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"  # what else the user may use Keras with
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1" if fills_vectors(filters) else "0")


def load_cusolver() -> None:
    """Load the one library of CUDA that TensorFlow 2.21 does not find where pip has put it, if it is there.

    TensorFlow loads CUDA's libraries by their names and looks in the packages beside its own, but not in
    that of cuSOLVER (RUNPATH of ``libtensorflow_framework.so.2``), and one that is missing hides every GPU
    (``TryDlopenCUDALibraries``). A name that is loaded is found.
    """
    spec = importlib.util.find_spec("tensorflow")
    for packages in spec.submodule_search_locations or [] if spec else []:
        for library in Path(packages).parent.glob("nvidia/cusolver/lib/libcusolver.so.*"):
            with suppress(OSError):  # without what it needs itself; the devices say that there is no GPU
                ctypes.CDLL(str(library))


def fills_vectors(filters: int) -> bool:
    """Whether maps of so many channels fill this processor's vectors of float32.

    Where they do not, oneDNN's gradient of a 1x1 projection leaves its memory: it came out in two versions
    (measured: 4 channels on AVX2, 16 of 200 times) or killed the process (8 channels on AVX-512, batch 1).
    """
    return filters % (16 if "avx512f" in processor_flags() else 8) == 0


def computes_bfloat16() -> bool:
    """Whether oneDNN's convolutions are faster in bfloat16 than in float32 on this processor.

    AVX512-BF16 makes them so on AMD (training ResNet-30 took 0.6 of the time, measured: Zen 4) but not on
    Intel (1.7 times the time of float32, measured: a Xeon), where AMX does (not measured). Where the user has
    switched oneDNN off, nothing does.
    """
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0":
        return False
    flags = processor_flags()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and processor_line("vendor_id") == AMD)


def adds_bfloat16_in_float32() -> bool:
    """Whether TensorFlow's convolutions add what is bfloat16 in float32 here, and round the sum once.

    Without AVX-512, which oneDNN needs for bfloat16, they add in bfloat16: the gradients by the weights are
    off by 1.2 to 2.0 % (RMS), and by 0.3 % where the sum is rounded once (measured: AMD Zen 3).
    """
    return "avx512f" in processor_flags()


def processor_flags() -> set[str]:
    """What the processor can do, as Linux names it."""
    return set(processor_line("flags").split())


def processor_line(name: str) -> str:
    """A line of Linux's description of the first processor; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def open_standard_streams() -> None:
    """Give descriptors 0 to 2 and Python's streams something to be where the caller closed them.

    Else the next file that is opened becomes standard error, and whatever is written there ends up in it.
    Where native code crashes, Python's stack is told there from now on, past :func:`quiet`.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    faulthandler.enable(os.dup(2))


@contextmanager
def quiet() -> Iterator[None]:
    """Pass standard error through a filter while TensorFlow is imported and looks for devices.

    The filter is a process: what native code writes before it aborts or exits is still shown. In a container
    whose first process dies, the filter dies, too, but had time for the last lines (18 of 18 deaths, one
    core). Where no process can be started, nothing is filtered.
    """
    try:
        command = [sys.executable, "-I", "-S", "-c", FILTER, NOISE]
        filter_process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError:
        yield
        return
    assert filter_process.stdin is not None
    try:
        with _standard_error_to(filter_process.stdin.fileno()):
            filter_process.stdin.close()
            yield
    finally:
        with suppress(subprocess.TimeoutExpired):
            filter_process.wait(FILTER_SECONDS)


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Let what is imported meanwhile not find packages that it can do without.

    Keras imports Matplotlib and TensorFlow SciPy where they are installed, for what nobody here asks for: a
    tenth and a twentieth of the time that importing both takes.
    """
    unseen = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(unseen))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in unseen:
            del sys.modules[package]


@contextmanager
def silence() -> Iterator[None]:
    """Drop what is written to standard error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with _standard_error_to(nowhere):
            yield
    finally:
        os.close(nowhere)


@contextmanager
def _standard_error_to(descriptor: int) -> Iterator[None]:
    _flush()
    real = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(real, 2)
        os.close(real)


def _flush() -> None:
    with suppress(OSError, ValueError):  # a full disk, a reader that is gone
        sys.stderr.flush()
