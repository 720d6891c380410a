"""The front page: its length, its order, the demo, the code that predicts, the recipe of one's own."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from job.data import grid, records, sources
from job.domain.network import CLASSES
from job.domain.settings import Settings
from tests.docs.pages import README, block, chapter, links
from tests.test_cli import command_of
from tests.test_house import ROOT

USE = block(README, "use")


def test_it_is_a_front_page() -> None:
    assert len(README.splitlines()) <= 200


def test_it_says_what_why_how_and_what_to_expect_in_this_order() -> None:
    parts = (
        "CIFAR-10 only",
        "**Why.**",
        "make demo",
        "make test",
        "The finding",
        ".png)",
        "What you should see",
    )
    positions = [README.find(part) for part in parts]
    assert all(left < right for left, right in pairwise([0, *positions]))
    titles = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert titles == [
        "On a laptop", "In a container", "On a cluster", "Use the trained model", "Change it", "Read on",
    ]  # fmt: skip
    assert len(links(chapter(README, "Read on"))) == 4 + len(("LICENSE", "NOTICE"))


def test_the_demo_shows_what_make_demo_runs() -> None:
    """The names that it prints hold the digest of all that decides a run."""
    match = re.search(r"^DEMO_ARGS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match
    shown = block(README, "demo")
    for model in ("resnet", "plainnet"):
        arguments = ["--model", model, "--data", "sample", *shlex.split(match[1])]
        settings = Settings.of(dict(command_of(("train",)).make_context("train", arguments).params))
        identity = settings.identity(precision="bfloat16", data_sha256=records.fingerprint(records.SAMPLE))
        assert f"\ndemo/{identity.default_name}: attempt 1 on " in f"\n{shown}"
        assert f"\n{identity.default_name} " in shown  # in the table
        assert f"epoch {settings.epochs}/{settings.epochs}: " in shown
    assert "One pair proves nothing." in shown


def test_the_code_that_predicts_has_six_lines_and_the_data_sets_classes() -> None:
    tree = ast.parse(USE)
    statements = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(statements) <= 6
    (names,) = re.findall(r'CLASSES = "(.+)"\.split\(\)', USE)
    assert tuple(names.split()) == CLASSES


@pytest.mark.slow
@pytest.mark.timeout(900)  # seconds; two processes that import TensorFlow, on a busy machine
def test_the_code_that_predicts_and_exports_runs_on_a_trained_model(tmp_path: Path) -> None:
    """As it stands in the README, but for the run's name; then the SavedModel gives the same answers."""
    options = "--data sample --blocks 1 --filters 16 --epochs 1 --name NAME --output runs"
    run = [sys.executable, "-m", "job", "train", *shlex.split(options)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True)
    grid.save_grid(tmp_path / "photo.png", sources.load("sample").train)

    same = """
import tensorflow as tf
image = tf.constant(pixels[np.newaxis], tf.float32)
exported = tf.saved_model.load("exported")
np.save("both", [model.predict(image), exported.serve(image)])
"""
    code = [sys.executable, "-c", USE + same]
    done = subprocess.run(code, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & set(CLASSES)
    assert "TensorSpec" not in done.stdout, "what Keras tells of the export hides the class"
    kept, exported = np.load(tmp_path / "both.npy")  # [1, 10] each
    assert kept.shape == (1, len(CLASSES))
    assert kept.sum() == pytest.approx(1, abs=0.01)
    assert exported == pytest.approx(kept, abs=0.01)


def test_a_recipe_of_ones_own_is_a_table_in_a_file(tmp_path: Path) -> None:
    """The README's table is a recipe that the program takes."""
    (tmp_path / "mine.toml").write_text(block(README, "recipe"))
    context = command_of(("train",)).make_context("train", ["--config", str(tmp_path / "mine.toml")])
    recipe = context.params["recipe"]
    assert recipe.name == "mine"
    assert recipe.rate(0, 100) < recipe.rate(19, 100) <= recipe.learning_rate
