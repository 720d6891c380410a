"""Where oneDNN, and with it bfloat16, may be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job import cluster, startup
from job.errors import ResourceUnavailable

AVX2 = {"avx2", "fma"}
AVX512 = {*AVX2, "avx512f"}
BFLOAT16 = {*AVX512, "avx512_bf16"}


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


def test_keras_computes_by_tensorflow_whatever_else_the_user_does_with_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "environ", {"KERAS_BACKEND": "jax"})
    startup.set_environment(filters=64)
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


def test_the_users_keras_settings_do_not_reach_the_networks(tmp_path: Path) -> None:
    settings = {"backend": "jax", "image_data_format": "channels_first", "floatx": "float64"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    code = (
        "from job import startup; startup.set_environment(filters=8)\n"
        "from job import networks; from job.config import Network\n"
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
    ("flags", "filters", "precision"),
    [
        (AVX512, 16, "float32"),
        (BFLOAT16, 16, "bfloat16"),
        (BFLOAT16, 24, "float32"),
        (BFLOAT16, 8, "float32"),
    ],
)
def test_bfloat16_is_chosen_where_onednn_computes_it(
    flags: Any, filters: Any, precision: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(startup, "processor_flags", lambda: flags)
    assert cluster.resolve_precision("auto", filters=filters) == precision
    assert cluster.resolve_precision("float16", filters=filters) == "float16"
