"""What must happen around TensorFlow's import: its environment, and its notes that no log level silences."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from job.errors import ResourceUnavailable

# Written before the log level applies, or at the level of errors on every machine without a GPU's driver.
NOISE = re.compile(
    rb"All log messages before absl::InitializeLog|cudart_stub\.cc|computation_placer\.cc"
    rb"|cpu_feature_guard\.cc"
    rb"|Unable to register cu\w+ factory|TF-TRT Warning|port\.cc.*oneDNN|To enable the following instructions"
    rb"|cuda_platform\.cc.*(303|no CUDA-capable device|CUDA_ERROR_NO_DEVICE)"
)


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


def fills_vectors(filters: int) -> bool:
    """Whether maps of so many channels fill this processor's vectors of float32.

    Where they do not, oneDNN's gradient of a 1x1 projection leaves its memory: it came out in two versions
    (measured: 4 channels on AVX2, 16 of 200 times) or killed the process (8 channels on AVX-512, batch 1).
    """
    return filters % (16 if "avx512f" in processor_flags() else 8) == 0


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


@contextmanager
def quiet() -> Iterator[None]:
    """Hold standard error back while TensorFlow is imported and looks for devices; pass on what matters."""
    sys.stderr.flush()
    real = os.dup(2)
    with os.fdopen(os.memfd_create("stderr"), "w+b") as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held:
                if not NOISE.search(line):
                    os.write(2, line)
