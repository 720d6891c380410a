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
    rb"|cpu_feature_guard\.cc"
    rb"|Unable to register cu\w+ factory|TF-TRT Warning|port\.cc.*oneDNN|To enable the following instructions"
    rb"|cuda_platform\.cc.*(303|no CUDA-capable device|CUDA_ERROR_NO_DEVICE)"
)


def set_environment(*, filters: int = 8) -> None:
    """Choose what TensorFlow reads from its environment at import, where the user has not chosen.

    By default TensorFlow uses oneDNN on processors with AVX-512 VNNI or AMX only. On others, too, its
    convolutions train the small network at twice the speed and ResNet-30 at 1.5 times (measured: AMD Zen 3,
    2 cores). But where channels do not fill its vectors of 8, the gradient of a 1x1 projection came out in
    two versions, by where the memory happened to lie (measured: 4 channels, 16 of 200 times). There it
    stays off.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0" if filters % 8 else "1")


@contextmanager
def quiet() -> Iterator[None]:
    """Hold standard error back while TensorFlow is imported and looks for devices; pass on what matters."""
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
