"""What must happen around TensorFlow's import: its environment, and its notes that no log level silences."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Written before the log level applies, or at the level of errors on every machine without a GPU's driver.
NOISE = re.compile(
    rb"All log messages before absl::InitializeLog|cudart_stub\.cc|computation_placer\.cc"
    rb"|Unable to register cu\w+ factory|TF-TRT Warning|port\.cc.*oneDNN|cpu_feature_guard\.cc"
    rb"|To enable the following instructions|cuda_platform\.cc.*(303|no CUDA-capable device|CUDA_ERROR_NO_DEVICE)"
)


def set_environment() -> None:
    """Choose what TensorFlow reads from its environment at import, where the user has not chosen."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # By default TensorFlow uses oneDNN on processors with AVX-512 VNNI or AMX only. On others its convolutions
    # train the small network at twice the speed and ResNet-30 at 1.5 times (measured: AMD Zen 3, 2 cores).
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


@contextmanager
def quiet_start() -> Iterator[None]:
    """Hold standard error back while TensorFlow is imported and looks for devices, then pass on all but noise."""
    set_environment()
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
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
