from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from PIL import Image

from job import __version__, cli
from job.cli import commands
from job.cli.options import variable_of
from job.console import Reporter
from job.data import records
from job.domain import errors
from job.domain.network import Network
from job.domain.recipe import RECIPES, Recipe
from job.domain.settings import Cadence, Settings
from job.report import finding
from job.store.location import open_store
from tests.report.test_comparison import write_run
from tests.test_house import ROOT

# What `--help`, a wrong option or an absent run must not wait for.
SLOW_IMPORTS = {"tensorflow", "keras", "numpy", "scipy", "matplotlib", "google", "PIL"}
COMMANDS: tuple[tuple[str, ...], ...] = (
    (),
    ("train",),
    ("evaluate",),
    ("compare",),
    ("describe",),
    ("data",),
    ("data", "fetch"),
    ("data", "verify"),
    ("data", "grid"),
)


@dataclass(frozen=True)
class Outcome:
    """How a command line ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, to the exit code that it would leave with."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else Click names pytest
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Outcome(int(caught.value.code or 0), *capsys.readouterr())

    monkeypatch.setattr(cli, "leave", leave)
    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which `train` would have trained, had it not been stopped there."""
    settings: list[Settings] = []
    run = SimpleNamespace(attempt=SimpleNamespace(train=lambda chosen, *_: settings.append(chosen)))
    monkeypatch.setattr(commands, "import_run", lambda *_: run)
    return settings


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def command_of(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli.cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


# --- help


def test_these_are_all_commands() -> None:
    def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, name))

    assert set(walk(cli.cli)) == set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(("job", *path)))
def test_help_names_every_option_and_its_variable(run: Run, path: tuple[str, ...]) -> None:
    outcome = run(*path, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    shown = " ".join(outcome.out.split()).replace("- ", "-")  # Click breaks lines after hyphens, too
    for parameter in command_of(path).params:
        if isinstance(parameter, click.Option):
            assert all(name in shown for name in (*parameter.opts, *parameter.secondary_opts))
            variable = variable_of(parameter)
            assert not variable or f"env var: {variable}" in shown


def test_help_answers_in_half_a_second() -> None:
    """Of the processor's time, and the best of five: others may use this machine, too."""
    seconds = []
    for _ in range(5):
        before = processor_seconds()
        finished = python("-m", "job", "--help")
        seconds.append(processor_seconds() - before)
        assert finished.returncode == 0
        assert "Train ResNet and PlainNet" in finished.stdout
        if len(seconds) >= 3 and min(seconds) < 0.5:
            break
    assert min(seconds) < 0.5


def processor_seconds() -> float:
    """What the processes that have been started here, and have ended, have computed so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--epochs", "0"], 2),
        (["train", "--blocks", "1,1,1,1,1,1,1"], 2),
        (["evaluate", "runs/nowhere"], 66),
    ],
    ids=str,
)
def test_what_needs_no_tensorflow_imports_none(arguments: list[str], code: int) -> None:
    finished = python("-X", "importtime", "-m", "job", *arguments)
    assert finished.returncode == code
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in finished.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "click" in imported
    assert not imported & SLOW_IMPORTS


def test_without_arguments_the_commands_are_listed(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert all(name in outcome.err for name in ("train", "evaluate", "compare", "describe", "data"))


def test_a_shell_completes_what_is_typed() -> None:
    typed = {"COMP_WORDS": "cifar-job train --lea", "COMP_CWORD": "2"}
    environment = {**os.environ, **typed, "_CIFAR_JOB_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv[0] = 'cifar-job'; from job.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert done.stdout.decode().split() == ["plain,--learning-rate"]


def test_the_version_is_told_by_the_name_that_was_typed() -> None:
    assert python("-m", "job", "--version").stdout == f"python -m job, version {__version__}\n"


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"job, version {__version__}\n", "")


# --- values that cannot be

NAME_RULE = "must start with a letter or digit and hold letters, digits, '.', '_' and '-' only (128 at most)"
INTEGER, NUMBER, RANGE = "is not a valid integer range", "is not a valid float range", "is not in the range"
STAGES = "at most 6 stages keep it at one pixel or more"
# option, value, rule, example
WRONG: list[tuple[str, str, str, str]] = [
    ("--model", "vgg", "is not one of", "'resnet', 'plainnet'"),
    ("--blocks", "2,x", "whole numbers between commas", "example: 2,5,5,2"),
    ("--blocks", "2.5", "whole numbers between commas", "example: 2,5,5,2"),
    ("--blocks", "2,0,2", "every stage needs at least 1 block", "example: --blocks 3,3,3"),
    ("--blocks", "-1", "every stage needs at least 1 block", "example: --blocks 3,3,3"),
    ("--blocks", "1,1,1,1,1,1,1", STAGES, "example: --blocks 2,5,5,2"),
    ("--filters", "0", RANGE, "x>=1"),
    ("--filters", "many", INTEGER, ""),
    ("--name", "a/b", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "..", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "-x", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "n" * 129, NAME_RULE, "example: --name resnet-first-try"),
    ("--recipe", "sgd", "is not one of", "'article', 'fast', 'he'"),
    ("--epochs", "0", RANGE, "x>=1"),
    ("--epochs", "1.5", INTEGER, ""),
    ("--batch-size", "0", RANGE, "x>=1"),
    ("--batch-size", "-128", RANGE, "x>=1"),
    ("--learning-rate", "0", RANGE, "x>0"),
    ("--learning-rate", "-0.1", RANGE, "x>0"),
    ("--learning-rate", "nan", "must be a finite number above 0", "example: --learning-rate 0.001"),
    ("--learning-rate", "inf", "must be a finite number above 0", "example: --learning-rate 0.001"),
    ("--learning-rate", "small", NUMBER, ""),
    ("--seed", "-1", RANGE, "0<=x<=4294967295"),
    ("--seed", "4294967296", RANGE, "0<=x<=4294967295"),
    ("--holdout", "7", "must be divisible by 10", "example: --holdout 5000"),
    ("--holdout", "-10", RANGE, "x>=0"),
    ("--precision", "float64", "is not one of", "'auto', 'float32', 'bfloat16', 'float16'"),
    ("--xla", "yes", "is not one of", "'auto', 'on', 'off'"),
    ("--replicas", "0", RANGE, "x>=1"),
    ("--replicas", "two", INTEGER, ""),
    ("--workers", "0", RANGE, "x>=1"),
    ("--commit-every", "0epoch", "whole number of epochs, steps, h, min or s", "example: 500steps"),
    ("--commit-every", "500", "whole number of epochs, steps, h, min or s", "example: 500steps"),
    ("--commit-every", "1.5min", "whole number of epochs, steps, h, min or s", "example: 500steps"),
    ("--keep", "0", RANGE, "x>=1"),
    ("--grace-seconds", "0", RANGE, "0<x<=3600"),
    ("--grace-seconds", "-3", RANGE, "0<x<=3600"),
    ("--grace-seconds", "nan", "must be above 0 and at most 3600", "example: 12"),
    ("--output", "runs\r", "must hold no control characters", "example: /home/me/runs"),
    ("--output", '"/abs/runs"', "must not be in quotes", "example: /home/me/runs"),
    ("--output", "~/runs", "must not begin with ~", "example: /home/me/runs"),
    ("--output", "runs ", "must not begin or end with a blank", "example: /home/me/runs"),
    ("--output", "gs:/b/x", "must be a path or gs://bucket/prefix", "example: /home/me/runs"),
    ("--data", "sample\n", "must hold no control characters", "example: /home/me/runs"),
    ("--data", "'sample'", "must not be in quotes", "example: /home/me/runs"),
    ("--worker-hosts", " a:1,b:1", "must not begin or end with a blank", "example: /home/me/runs"),
    ("--like", "~/runs/x", "must not begin with ~", "example: /home/me/runs"),
    ("--config", "gs:x", "must be a path", "example: /home/me/runs"),
    ("--log-format", "xml", "is not one of", "'auto', 'plain', 'json'"),
]


@pytest.mark.parametrize(("option", "value", "rule", "example"), WRONG)
def test_a_wrong_value_is_refused_with_rule_value_and_example(
    run: Run, trained: list[Settings], option: str, value: str, rule: str, example: str
) -> None:
    outcome = run("train", f"{option}={value}")
    assert outcome.code == 2
    assert outcome.out == ""
    message = " ".join(outcome.err.split())
    assert "Error: " in message
    assert option.lstrip("-") in message
    assert rule in message
    assert value in message or repr(value) in message
    assert example in message
    assert not trained


# An empty variable counts as none, as it does for Click.
@pytest.mark.parametrize(("option", "value", "rule", "example"), [case for case in WRONG if case[1]])
def test_a_wrong_value_in_a_variable_is_refused_alike(
    run: Run,
    trained: list[Settings],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    rule: str,
    example: str,
) -> None:
    parameter = next(item for item in command_of(("train",)).params if option in item.opts)
    monkeypatch.setenv(str(variable_of(parameter)), value)
    outcome = run("train")
    assert outcome.code == 2
    message = " ".join(outcome.err.split())
    assert rule in message
    assert example in message
    assert not trained


def test_a_failure_is_json_too(run: Run, trained: list[Settings]) -> None:
    outcome = run("train", "--log-format", "json", "--epochs", "0")
    assert outcome.code == 2
    said = json.loads(outcome.err)
    assert said["severity"] == "ERROR"
    assert said["message"].startswith("Error: Invalid value for '--epochs'")


def test_every_option_that_takes_a_value_has_a_wrong_one_above() -> None:
    valued = {
        parameter.opts[0]
        for parameter in command_of(("train",)).params
        if isinstance(parameter, click.Option) and not parameter.is_flag
    }
    assert {option for option, *_ in WRONG} == valued


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--colour"], ["No such option", "--colour"]),
        (["train", "resnet"], ["unexpected extra argument", "resnet"]),
        (["trane"], ["No such command", "trane"]),
        (["compare"], ["Missing argument", "RUNS"]),
        (["evaluate"], ["Missing argument", "RUN"]),
        (["data", "fetch", "--from", "kaggle"], ["is not one of", "kaggle", "'npm'"]),
        (["data", "grid", "grid.jpg", "--data", "sample"], ["must end in .png", "grid.jpg", "try grid.png"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused(run: Run, arguments: list[str], parts: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    message = " ".join(outcome.err.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--lr", "0.1"], "--learning-rate"),
        (["train", "--gpus=2"], "--replicas"),
        (["train", "resnet"], "Did you mean --model resnet?"),
        (["train", "--epoch", "2"], "--epochs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_was_probably_meant_is_said(run: Run, arguments: list[str], hint: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert hint in outcome.err
    assert "--filters" not in outcome.err


@pytest.mark.parametrize("command", [["train"], ["data", "grid", "x.png"]], ids=" ".join)
def test_a_mistyped_sample_is_missed_before_tensorflow_is_imported(command: list[str]) -> None:
    finished = python("-X", "importtime", "-m", "job", *command, "--data", "smaple")
    assert finished.returncode == 66
    assert "smaple does not exist; did you mean 'sample'" in finished.stderr
    assert "tensorflow" not in finished.stderr


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        (["data", "fetch"], "JOB_DATA"),
        (["data", "verify"], "JOB_DATA"),
        (["data", "grid", "x.png"], "JOB_DATA"),
        (["evaluate", "runs/x"], "JOB_DATA"),
        (["compare", "runs\r"], None),
        (["evaluate", "~/runs/x"], None),
        (["describe", "--diagram", "'x.png'"], None),
    ],
    ids=str,
)
def test_a_text_that_was_surely_meant_otherwise_is_refused_everywhere(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str], variable: str | None, tmp_path: Path
) -> None:
    if variable:
        monkeypatch.setenv(variable, "data\r")
    outcome = run(*command)
    assert outcome.code == 2
    assert "must " in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_for_temporary_files_no_traceback_is_shown() -> None:
    code = "import tempfile; tempfile._get_default_tempdir = lambda *_: fail(); import job.cli as c; c.main()"
    fail = "def fail(): raise FileNotFoundError(2, 'No usable temporary directory found in [...]')\n"
    finished = python("-c", fail + code, "describe")
    assert finished.returncode == 77
    assert "make one writable, or set TMPDIR" in finished.stderr
    assert "Traceback" not in finished.stderr


# --- settings from a file and from a run

OWN = """
model = "plainnet"
blocks = [3, 3, 3]
filters = 16
epochs = 4
batch-size = 64
sync-batch-norm = false
commit_every = "10min"

[recipe]
name = "mine"
optimizer = "sgd"
learning_rate = 1
momentum = 0.9
nesterov = true
"""


def test_a_file_sets_options_and_a_recipe_and_what_is_typed_wins(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.toml").write_text(OWN)
    assert run("train", "--config", "own.toml", "--epochs", "7").code == 0
    monkeypatch.setenv("JOB_EPOCHS", "8")
    monkeypatch.setenv("JOB_CONFIG", "own.toml")
    assert run("train", "--learning-rate", "0.5", "--sync-batch-norm").code == 0
    assert run("train", "--recipe", "he").code == 0
    first, second, third = trained
    recipe = Recipe(name="mine", optimizer="sgd", learning_rate=1.0, momentum=0.9, nesterov=True)
    assert first == Settings(
        network=Network(model="plainnet", blocks=(3, 3, 3), filters=16),
        recipe=recipe,
        epochs=7,
        batch_size=64,
        sync_batch_norm=False,
        commit_every=Cadence(count=600, unit="seconds"),
    )
    assert second == replace(first, epochs=8, sync_batch_norm=True, recipe=replace(recipe, learning_rate=0.5))
    assert third == replace(first, epochs=8, recipe=RECIPES["he"])
    identities = {
        settings.identity(precision="float32", data_sha256="5" * 64).default_name for settings in trained
    }
    assert len(identities) == 3
    assert all("-mine-" in name or "-he-" in name for name in identities)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("epochs = 2.5", "'2.5' is not a valid integer range"),
        ("epochs = true", "'True' is not a valid integer range"),
        ("epochs = 0", "x>=1"),
        ("epohcs = 2", "epohcs is no option; did you mean epochs?"),
        ("lr = 2", "lr is no option"),
        ("blocks = [3, 2.5]", "whole numbers between commas, not '3,2.5'"),
        ('output = "~/runs"', "must not begin with ~"),
        ("name = 1979-05-27", "must be a number, a text, true or false"),
        ("epochs", "must be a TOML file"),
        ("[recipe]", "a recipe needs optimizer and learning_rate"),
        ('[recipe]\noptimizer = "sgd"', "there is no learning_rate"),
        ('[recipe]\noptimizer = "lamb"\nlearning_rate = 1', "must be one of adam, sgd, muon, not 'lamb'"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = "1"', "must be a float, not '1'"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = true', "must be a float, not True"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = 1\nflip = 1', "must be a bool, not 1"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = nan', "must be a finite number above 0"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = 1\nmomentum = 1', "momentum must be at least 0"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = 1\nnesterov = true', "needs a momentum above 0"),
        ('[recipe]\noptimizer = "adam"\nlearning_rate = 1\nmomentum = 0.9', "neither momentum"),
        ('[recipe]\noptimizer = "sgd"\nlearning_rate = 1\nwarmup = 1', "but no warmup"),
        ('[recipe]\nname = "he"\noptimizer = "sgd"\nlearning_rate = 1', "none of article, he, fast"),
        ('[recipe]\nname = "a/b"\noptimizer = "sgd"\nlearning_rate = 1', "lower-case letters"),
    ],
)
def test_a_wrong_file_is_refused(run: Run, trained: list[Settings], text: str, rule: str) -> None:
    Path("own.toml").write_text(text)
    outcome = run("train", "--config", "own.toml")
    assert outcome.code == 2
    assert rule in " ".join(outcome.err.split())
    assert trained == []


def test_a_file_that_does_not_exist_is_missed(run: Run, trained: list[Settings]) -> None:
    assert run("train", "--config", "nowhere.toml").code == 66
    assert run("train", "--like", "runs/nowhere").code == 66
    Path("runs/empty").mkdir(parents=True)
    assert run("train", "--like", "runs/empty").code == 66
    assert trained == []


@pytest.mark.parametrize("data", ["official", "sample"])
def test_a_run_can_be_like_another(run: Run, trained: list[Settings], data: str) -> None:
    own = Recipe(name="mine", optimizer="sgd", learning_rate=0.3, momentum=0.5)
    files = records.SAMPLE if data == "sample" else records.OFFICIAL
    first = Settings(
        network=Network(model="plainnet", blocks=(2, 2), filters=8),
        recipe=own,
        output="gs://bucket/runs",
        data="a-folder-of-another-machine",
        name="first",
        epochs=3,
        batch_size=32,
        seed=5,
        holdout=50,
        sync_batch_norm=False,
        commit_every=Cadence(count=5, unit="steps"),
        keep=4,
        workers=2,
        take_over=True,
    )
    identity = first.identity(precision="bfloat16", data_sha256=records.fingerprint(files))
    config = {"format": 1, "identity": identity.to_json(), "settings": asdict(first)}
    Path("first").mkdir()
    Path("first/config.json").write_text(json.dumps(config))
    Path("own.toml").write_text("seed = 6\nkeep = 5")
    assert run("train", "--like", "first").code == 0
    assert run("train", "--config", "own.toml", "--like", "first", "--keep", "6").code == 0
    lasting = replace(
        first,
        precision="bfloat16",
        data="sample" if data == "sample" else None,
        output="runs",
        name=None,
        workers=1,
        take_over=False,
    )
    assert trained == [lasting, replace(lasting, seed=6, keep=6)]
    assert trained[0].identity(precision="bfloat16", data_sha256=identity.data_sha256) == identity


# --- settings


def test_without_options_the_settings_are_the_defaults(run: Run, trained: list[Settings]) -> None:
    assert run("train") == Outcome(0, "", "")
    assert trained == [Settings()]


# option -> text on the command line and in the variable, field, value
CHOSEN: dict[str, tuple[str, str, Any]] = {
    "--output": ("gs://bucket/runs", "output", "gs://bucket/runs"),
    "--name": ("first-try", "name", "first-try"),
    "--epochs": ("3", "epochs", 3),
    "--batch-size": ("64", "batch_size", 64),
    "--seed": ("4294967295", "seed", 4294967295),
    "--holdout": ("5000", "holdout", 5000),
    "--precision": ("bfloat16", "precision", "bfloat16"),
    "--xla": ("off", "xla", "off"),
    "--sync-batch-norm": ("0", "sync_batch_norm", False),
    "--deterministic": ("1", "deterministic", True),
    "--require-gpu": ("true", "require_gpu", True),
    "--replicas": ("2", "replicas", 2),
    "--workers": ("3", "workers", 3),
    "--worker-hosts": ("a:2222,b:2222", "worker_hosts", "a:2222,b:2222"),
    "--commit-every": ("10min", "commit_every", Cadence(count=600, unit="seconds")),
    "--keep": ("3", "keep", 3),
    "--take-over": ("1", "take_over", True),
    "--grace-seconds": ("7.5", "grace_seconds", 7.5),
    "--log-format": ("json", "log_format", "json"),
}
# Those that decide the network and the recipe, which are values of their own, and --data: see below.
COMPOSED = {
    "--model",
    "--blocks",
    "--filters",
    "--recipe",
    "--learning-rate",
    "--data",
    "--config",
    "--like",
    "--dry-run",
}


def test_every_option_is_tried() -> None:
    assert CHOSEN.keys() | COMPOSED == {parameter.opts[0] for parameter in command_of(("train",)).params}


@pytest.mark.parametrize("option", CHOSEN)
def test_a_variable_sets_its_option(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    text, field, value = CHOSEN[option]
    parameter = next(item for item in command_of(("train",)).params if option in item.opts)
    expected = {"--name": "JOB_RUN_NAME"}.get(option, "JOB_" + option[2:].upper().replace("-", "_"))
    assert variable_of(parameter) == expected
    monkeypatch.setenv(expected, text)
    assert run("train").code == 0
    assert getattr(trained[0], field) == value != getattr(Settings(), field)


@pytest.mark.parametrize("option", CHOSEN)
def test_the_command_line_sets_its_option_and_wins(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    text, field, value = CHOSEN[option]
    parameter = next(item for item in command_of(("train",)).params if option in item.opts)
    if isinstance(value, bool):
        monkeypatch.setenv(str(variable_of(parameter)), str(not value))
        arguments = [option if value else parameter.secondary_opts[0]]
    else:
        monkeypatch.setenv(str(variable_of(parameter)), "1epoch" if option == "--commit-every" else "")
        arguments = [option, text]
    assert run("train", *arguments).code == 0
    assert getattr(trained[0], field) == value


def test_network_and_recipe_come_from_options_and_variables(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_MODEL", "plainnet")
    monkeypatch.setenv("JOB_BLOCKS", "9,9,9")
    monkeypatch.setenv("JOB_LEARNING_RATE", "0.05")
    assert run("train", "--blocks", "3,3,3", "--filters", "16", "--recipe", "he").code == 0
    (settings,) = trained
    assert (settings.network.model, settings.network.blocks, settings.network.filters) == (
        "plainnet",
        (3, 3, 3),
        16,
    )
    assert settings.recipe.name == "he"
    assert settings.recipe.learning_rate == 0.05
    assert settings.recipe.momentum == RECIPES["he"].momentum == 0.9


def test_a_dry_run_prints_its_plan_and_trains_nothing(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Settings] = []

    def plan(settings: Settings, _: Reporter) -> Iterator[str]:
        planned.append(settings)
        yield from ("run  x", "data y")

    job_run = SimpleNamespace(dry_run=SimpleNamespace(plan=plan))
    monkeypatch.setattr(commands, "import_run", lambda *_: job_run)
    assert run("train", "--dry-run", "--epochs", "3") == Outcome(0, "run  x\ndata y\n", "")
    assert planned == [Settings(epochs=3)]
    assert trained == []


def test_only_data_that_was_typed_is_taken_as_it_is(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the variable names is fetched if it is absent; what a user types must be there."""
    monkeypatch.setenv("JOB_DATA", "volume")
    assert run("train").code == 0
    Path("typed").mkdir()
    assert run("train", "--data", "typed").code == 0
    assert [settings.data for settings in trained] == [None, "typed"]


# --- exit codes

ENDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", ENDS, ids=lambda kind: kind.__name__)
def test_each_error_ends_with_its_code_and_its_message(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[errors.JobError]
) -> None:
    def fail(*_: Any) -> None:
        raise kind("the rule, the value and what to do")

    monkeypatch.setattr(finding, "load_runs", fail)
    outcome = run("compare", "runs")
    assert outcome.code == kind.exit_code
    assert outcome.out == ""
    assert "the rule, the value and what to do" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_unexpected_error_shows_where_it_happened(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(finding, "load_runs", fail)
    outcome = run("compare", "runs")
    assert outcome.code == cli.UNEXPECTED == 71
    assert "Traceback" in outcome.err
    assert "ZeroDivisionError: surprise" in outcome.err


def test_an_interrupted_command_says_so_by_its_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finding, "load_runs", fail)
    assert run("compare", "runs").code == errors.Interrupted.exit_code == 75


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "runs/nowhere"],
        ["compare", "runs/nowhere"],
        ["data", "verify", "nowhere"],
        ["data", "grid", "grid.png", "--data", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_does_not_exist_is_named(run: Run, arguments: list[str], tmp_path: Path) -> None:
    outcome = run(*arguments)
    assert outcome.code == 66
    assert "nowhere" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "grid.png").exists()


def test_compare_skips_what_is_no_run_and_writes_its_report(run: Run, tmp_path: Path) -> None:
    for model in ("resnet", "plainnet"):
        write_run(tmp_path / "runs" / model, model)
    outcome = run("compare", "runs", "nowhere", "--report", "a/report")

    assert outcome.code == 0
    assert "+0.00 points from one pair" in outcome.out
    assert "Skipped nowhere: does not exist" in outcome.out
    written = [line for line in outcome.out.splitlines() if line.startswith("wrote ")]
    assert written == [f"wrote a/report/{name}" for name in ("comparison.md", "comparison.csv", "curves.png")]
    assert all(Path(line.removeprefix("wrote ")).stat().st_size for line in written)


def test_compare_reads_a_bucket(run: Run, tmp_path: Path, gcs_bucket: str) -> None:
    with closing(open_store(gcs_bucket)) as store:
        for path in sorted(write_run(tmp_path / "one").iterdir()):
            store.create(f"runs/one/{path.name}", path.read_bytes())
    outcome = run("compare", f"{gcs_bucket}/runs", "--report", "report")

    assert outcome.code == 0
    assert "\none " in outcome.out
    assert "one,resnet,20" in Path("report/comparison.csv").read_text()


@pytest.mark.parametrize(
    ("report", "code", "message"),
    [
        ("gs://bucket/report", 2, "must be a local folder"),
        ("a-file", 2, "must be a local folder"),
        ("a-file/below", 66, "a-file/below"),
        (300 * "a", 66, "File name too long"),
    ],
    ids=["bucket", "file", "below a file", "too long a name"],
)
def test_a_report_that_cannot_be_written_says_why(
    run: Run, tmp_path: Path, report: str, code: int, message: str
) -> None:
    write_run(tmp_path / "one")
    (tmp_path / "a-file").write_text("")
    outcome = run("compare", "one", "--report", report)
    assert outcome.code == code
    assert message in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("words", ["/dev/full", "/dev/null"])
def test_the_exit_code_is_right_although_nobody_can_read_why(words: str) -> None:
    for arguments, code in ((["data", "verify", "nowhere"], 66), (["train", "--model", "x"], 2)):
        with open(words, "w") as unwritable:
            command = [sys.executable, "-m", "job", *arguments]
            assert subprocess.run(command, stderr=unwritable).returncode == code


@pytest.mark.usefixtures("run")
def test_a_log_that_nobody_reads_any_more_ends_no_training() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    Reporter("plain", Gone()).note("the reader is gone")


def test_a_folder_that_is_no_run_is_not_evaluated(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    assert run("evaluate", "runs/empty").code == 66
    (tmp_path / "runs" / "empty" / "config.json").write_text("no JSON")
    outcome = run("evaluate", "runs/empty")
    assert outcome.code == 65
    assert "config.json" in outcome.err


def test_training_with_data_that_does_not_exist(run: Run) -> None:
    outcome = run("train", "--data", "nowhere")
    assert outcome.code == 66
    assert "nowhere does not exist" in outcome.err
    assert "data fetch" in outcome.err


# --- what the small commands print


@pytest.mark.parametrize(
    "command", [("data", "verify", "sample"), ("data", "verify", "nowhere"), ("data", "wash")]
)
def test_where_logs_are_json_every_line_of_every_command_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("JOB_LOG_FORMAT", "json")
    outcome = run(*command)
    lines = [json.loads(line) for line in (outcome.out + outcome.err).splitlines()]
    assert lines
    assert {line["severity"] for line in lines} <= {"INFO", "ERROR"}
    assert (lines[-1]["severity"] == "ERROR") == (outcome.code != 0)


def test_the_embedded_sample_is_verified(run: Run) -> None:
    outcome = run("data", "verify", "sample")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == ["train.bin", "test.bin"]
    assert all(line.endswith("  OK") for line in lines)


def test_altered_data_is_told_file_by_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data_batch_1.bin").write_bytes(b"\0" * 30_730_000)
    outcome = run("data", "verify")
    assert outcome.code == 65
    first, *others = outcome.out.splitlines()
    assert "SHA-256" in first
    assert "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5" in first
    assert len(others) == 5
    assert all("missing" in line for line in others)
    assert "6 of 6 files of data" in outcome.err


def test_the_grid_is_drawn(run: Run, tmp_path: Path) -> None:
    assert run("data", "grid", "pictures/grid.png", "--data", "sample").out == "wrote pictures/grid.png\n"
    with Image.open(tmp_path / "pictures" / "grid.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 640


def test_describe_prints_and_draws(run: Run, tmp_path: Path) -> None:
    arguments = ["describe", "--model", "plainnet", "--blocks", "1,1", "--filters", "4"]
    outcome = run(*arguments, "--diagram", "network.png")
    assert outcome.code == 0
    assert "plainnet6: 6 convolution and dense layers on the main path, 0 projections" in outcome.out
    assert outcome.out.endswith("wrote network.png\n")
    with Image.open(tmp_path / "network.png") as picture:
        assert picture.format == "PNG"
    refused = run(*arguments, "--diagram", "network.svg")
    assert refused.code == 2
    assert "must name a .png file, not 'network.svg'" in refused.err


@pytest.mark.parametrize(("command", "code"), [("data verify .", 65), ("--help", 0), ("describe --help", 0)])
def test_a_reader_that_has_seen_enough_changes_no_exit_code(command: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"not a record")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "job", *command.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_results_go_to_standard_output_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` can be piped into a program that reads JSON."""
    from job.run import reader

    results = {"run": "runs/x", "step": 391, "validation": {"accuracy": 0.5}}
    job_run = SimpleNamespace(evaluate=SimpleNamespace(evaluate=lambda *_, **__: results))
    monkeypatch.setattr(commands, "import_run", lambda *_: job_run)
    identity = SimpleNamespace(network=SimpleNamespace(filters=64))
    monkeypatch.setattr(reader, "read_identity", lambda _: identity)
    outcome = run("evaluate", "runs/x")
    assert json.loads(outcome.out) == results
    assert (outcome.code, outcome.err) == (0, "")
