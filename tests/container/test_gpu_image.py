"""The image with the GPU's lock, CUDA's libraries and all. It is large, so it is built on demand:

make test-container ARGS="-m gpu_image"
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container import engine as podman
from tests.container.conftest import TINY, only_run
from tests.container.engine import ROOT, Engine
from tests.container.test_image import MEGABYTE, largest_parts

pytestmark = [pytest.mark.container, pytest.mark.gpu_image, pytest.mark.timeout(1800)]

LIMIT = 7_200 * MEGABYTE
# tsl::internal::DsoLoader::TryDlopenCUDALibraries(); its absl::Status comes back through the first argument.
TRY_LIBRARIES, OK = "_ZN3tsl8internal9DsoLoader22TryDlopenCUDALibrariesEv", 1
IMAGE = "localhost/cifar-residual-job-test-gpu:1"


@pytest.fixture(scope="module")
def image(engine: Engine, figures: list[str]) -> Iterator[str]:
    built, seconds = podman.build(
        engine, ROOT, IMAGE, "--build-arg=REQUIREMENTS=requirements/gpu.lock"
    )  # the later of two values counts
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    figures.append(f"the GPU's image built in {seconds:.1f} s")
    yield IMAGE
    engine("image", "rm", IMAGE)  # 7 GB are not worth keeping


def test_size(engine: Engine, image: str, figures: list[str]) -> None:
    size = int(engine.inspect(image, "{{.Size}}"))
    with engine.mounted(image) as root:
        figures += [f"job image (GPU): {size / MEGABYTE:,.0f} MB", *largest_parts(root)]
    assert size <= LIMIT


def test_it_has_what_tensorflow_loads_and_compiles_with(engine: Engine, image: str) -> None:
    with engine.mounted(image) as root:
        (nvidia,) = root.glob("opt/venv/lib/python3*/site-packages/nvidia")
        libraries = {path.name.split(".so")[0] for path in nvidia.rglob("lib*.so*")}
        programs = {path.name for path in nvidia.glob("cuda_nvcc/bin/*")}
        assert list(nvidia.rglob("libdevice.10.bc"))
    assert {"libcudart", "libcudnn", "libnccl", "libcublas", "libcufft", "libcusolver"} <= libraries
    assert "ptxas" in programs


def test_tensorflow_finds_all_of_cuda_there(engine: Engine, image: str) -> None:
    """By its own look at the libraries: without one of them it takes no GPU. No GPU is needed to look."""
    code = (
        "import ctypes, sys\n"
        "from job.engine import startup\n"
        "if sys.argv[1] == 'with': startup.load_cusolver()\n"
        "from importlib.util import find_spec\n"
        "(folder,) = find_spec('tensorflow').submodule_search_locations\n"
        "library, status = ctypes.CDLL(f'{folder}/libtensorflow_framework.so.2'), ctypes.c_uint64()\n"
        f"library['{TRY_LIBRARIES}'](ctypes.byref(status))\n"
        f"print(status.value == {OK})"
    )
    for loads, found in (("with", "True"), ("without", "False")):
        told = engine.run(image, "-c", code, loads, options=("--entrypoint=python",))
        assert told.stdout.strip() == found, told.stderr


def test_it_trains_on_the_cpu_where_there_is_no_gpu(engine: Engine, image: str, runs: Path) -> None:
    command = ("train", "--model", "resnet", *TINY, "--epochs", "1")
    finished = engine.run(image, *command, runs=runs)
    assert finished.returncode == 0, finished.stderr
    assert only_run(runs).json("result.json")["steps"] == 8


def test_it_refuses_to_when_a_gpu_is_required(engine: Engine, image: str, runs: Path) -> None:
    finished = engine.run(image, "train", *TINY, "--require-gpu", runs=runs)
    assert finished.returncode == 69, finished.stderr
    assert "TensorFlow sees no GPU" in finished.stderr
