"""Where oneDNN, and with it bfloat16, may be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.domain.errors import ResourceUnavailable
from job.engine import devices, startup
from tests.durability.jobs import ROOT

AVX2 = {"avx2", "fma"}
AVX512 = {*AVX2, "avx512f"}
BFLOAT16 = {*AVX512, "avx512_bf16"}
AMX = {*BFLOAT16, "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "filters", "onednn"),
    [(AVX2, 4, "0"), (AVX2, 8, "1"), (AVX2, 64, "1"), (AVX512, 8, "0"), (AVX512, 24, "0"), (AVX512, 16, "1")],
)
def test_onednn_is_used_where_channels_fill_its_vectors(
    flags: Any, filters: Any, onednn: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(startup, "processor_flags", lambda: flags)
    monkeypatch.setattr(os, "environ", {})
    startup.set_environment(filters=filters)
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == onednn


def test_a_processor_that_tensorflow_cannot_use_is_refused_before_its_import(monkeypatch: Any) -> None:
    for flags in (AVX2 | {"avx"}, set()):  # where Linux lists no flags, nothing is known
        monkeypatch.setattr(startup, "processor_flags", lambda flags=flags: flags)
        startup.check_processor()
    monkeypatch.setattr(startup, "processor_flags", lambda: {"sse4_2"})
    with pytest.raises(ResourceUnavailable, match="needs a processor with AVX"):
        startup.check_processor()


def test_cusolver_is_loaded_from_beside_tensorflow_which_then_finds_it_by_its_name(tmp_path: Path) -> None:
    """Any library stands for it; one that cannot be loaded does no harm, and none is needed."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from job.engine import startup; startup.load_cusolver()\n"
        "print('libcusolver.so.11' in open('/proc/self/maps').read(), 'tensorflow' in sys.modules)"
    )
    library = tmp_path / "nvidia/cusolver/lib/libcusolver.so.11"
    library.parent.mkdir(parents=True)
    for content, loaded in (
        (None, False),
        (b"no library", False),
        (Path(np.random._pcg64.__file__).read_bytes(), True),
    ):
        if content is not None:
            library.write_bytes(content)
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert told.stdout.split() == [str(loaded), "False"], told.stderr


def test_keras_computes_by_tensorflow_whatever_else_the_user_does_with_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "environ", {"KERAS_BACKEND": "jax"})
    startup.set_environment(filters=64)
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


def test_the_users_keras_settings_do_not_reach_the_networks(tmp_path: Path) -> None:
    settings = {"backend": "jax", "image_data_format": "channels_first", "floatx": "float64"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    code = (
        "from job.engine import startup; startup.set_environment(filters=8)\n"
        "from job.model import networks; from job.domain.network import Network\n"
        "model = networks.build(Network(blocks=(1,), filters=8))\n"
        "print(model.input_shape, model.weights[0].dtype)"
    )
    environment = {**os.environ, "KERAS_HOME": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.splitlines()[-1] == "(None, 32, 32, 3) float32"


def test_the_users_own_choice_stays(monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "environ", {"TF_ENABLE_ONEDNN_OPTS": "0"})
    startup.set_environment(filters=64)
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"


@pytest.mark.parametrize(
    ("vendor", "flags", "filters", "precision"),
    [
        ("AuthenticAMD", AVX512, 16, "float32"),
        ("AuthenticAMD", BFLOAT16, 16, "bfloat16"),
        ("AuthenticAMD", BFLOAT16, 24, "float32"),
        ("AuthenticAMD", BFLOAT16, 8, "float32"),
        ("GenuineIntel", BFLOAT16, 16, "float32"),
        ("GenuineIntel", AMX, 16, "bfloat16"),
        ("GenuineIntel", AMX, 8, "float32"),
        ("", BFLOAT16, 16, "float32"),
    ],
)
def test_bfloat16_is_chosen_where_onednn_computes_it_faster(
    vendor: str, flags: Any, filters: Any, precision: Any, monkeypatch: Any
) -> None:
    lines = {"vendor_id": vendor, "flags": " ".join(flags)}
    monkeypatch.setattr(startup, "processor_line", lambda name: lines[name])
    assert devices.resolve_precision("auto", filters=filters) == precision
    assert devices.resolve_precision("float16", filters=filters) == "float16"


@pytest.mark.parametrize(("flags", "warnings"), [(AVX512, 0), ({"avx2"}, 1)], ids=["AVX-512", "AVX2"])
def test_bfloat16_that_adds_up_in_bfloat16_is_warned_of(
    flags: Any, warnings: int, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(startup, "processor_line", lambda name: " ".join(flags))
    assert devices.resolve_precision("bfloat16", filters=16) == "bfloat16"
    assert caplog.text.count("adds up in bfloat16: float32 is faster and more accurate") == warnings
    assert devices.resolve_precision("float32", filters=16) == "float32"
    assert len(caplog.records) == warnings


def test_without_onednn_bfloat16_is_not_chosen(monkeypatch: Any) -> None:
    lines = {"vendor_id": "AuthenticAMD", "flags": " ".join(BFLOAT16)}
    monkeypatch.setattr(startup, "processor_line", lambda name: lines[name])
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert devices.resolve_precision("auto", filters=16) == "float32"


DESCRIBE = "exec {python} -m job describe --blocks 1 --filters 8 {redirections}"


def describe(redirections: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Start the job from a shell, which can close descriptors."""
    command = DESCRIBE.format(python=sys.executable, redirections=redirections)
    return subprocess.run(
        ["sh", "-c", command], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_last_words_of_native_code_are_shown() -> None:
    """TensorFlow ends the process by itself, while it is imported."""
    finished = describe(TF_XLA_FLAGS="--x")
    assert finished.returncode not in (0, 71)
    assert "Unknown flag in TF_XLA_FLAGS: --x" in finished.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_no_error(closed: str) -> None:
    finished = describe(closed)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert ("Parameters" in finished.stdout or "parameters" in finished.stdout) == (
        ">&-" not in closed.split()
    )


IN_QUIET = """
import os, resource, sys
from job.engine import startup
{before}
with startup.quiet():
    os.write(2, b"cpu_feature_guard.cc is noise\\nthis matters\\n")
    {within}
os.write(2, b"and this comes after\\n")
"""


def in_quiet(within: str = "pass", before: str = "pass") -> subprocess.CompletedProcess[str]:
    code = IN_QUIET.format(within=within, before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_what_matters_is_passed_on_in_order() -> None:
    assert in_quiet().stderr == "this matters\nand this comes after\n"


@pytest.mark.parametrize("death", ["os.abort()", "os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_what_was_written_before_a_sudden_end_is_shown(death: str) -> None:
    finished = in_quiet(death)
    assert finished.returncode != 0
    assert finished.stderr == "this matters\n"


def test_a_crash_in_native_code_tells_where_it_was_called() -> None:
    finished = in_quiet("os.abort()", before="startup.open_standard_streams()")
    assert "this matters" in finished.stderr
    assert "Fatal Python error: Aborted" in finished.stderr


@pytest.mark.parametrize(
    "refused",
    [
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); os.open(os.devnull, os.O_RDONLY)",
        "sys.executable = '/nowhere/python'",
    ],
    ids=["no descriptor", "no process"],
)
def test_where_no_filter_can_be_started_nothing_is_filtered(refused: str) -> None:
    finished = in_quiet(before=refused)
    assert finished.stderr == "cpu_feature_guard.cc is noise\nthis matters\nand this comes after\n"
    assert finished.returncode == 0


def test_a_package_is_hidden_for_a_while_and_no_longer(monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with startup.hidden("this"), pytest.raises(ImportError):
        import this  # noqa: F401
    assert "this" not in sys.modules


def test_a_package_that_is_there_already_is_not_hidden() -> None:
    with startup.hidden("json", "this"):
        assert sys.modules["json"] is json
    assert sys.modules["json"] is json


@pytest.mark.slow
def test_training_does_without_matplotlib_and_scipy() -> None:
    code = (
        "import sys; from job.cli import commands; commands.import_run(); "
        "print({'matplotlib', 'scipy'} & {*sys.modules} or 'neither')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "neither"
