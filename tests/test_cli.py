from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from PIL import Image

from job import __version__, cli, comparison, errors
from job.config import RECIPES, Cadence, Settings
from job.interruption import Interruption
from job.reporting import Reporter
from job.storage import open_store
from tests.test_comparison import write_run
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
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command line in this process, to the exit code that it would leave with."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Outcome(int(caught.value.code or 0), *capsys.readouterr())

    monkeypatch.setattr(cli, "leave", leave)
    log = logging.getLogger("job")
    handlers, propagate = list(log.handlers), log.propagate
    yield run
    log.handlers[:], log.propagate = handlers, propagate


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which `train` would have trained, had it not been stopped there."""
    settings: list[Settings] = []
    training = SimpleNamespace(train=lambda chosen, *_: settings.append(chosen))
    monkeypatch.setattr(cli, "_import_training", lambda *_: training)
    monkeypatch.setattr(Interruption, "install", lambda _: None)
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
            assert not parameter.envvar or f"env var: {parameter.envvar}" in shown


def test_help_answers_in_half_a_second() -> None:
    seconds = []
    for _ in range(5):  # the best one: others may use this machine, too
        started = time.perf_counter()
        finished = python("-m", "job", "--help")
        seconds.append(time.perf_counter() - started)
        assert finished.returncode == 0
        assert "Train ResNet and PlainNet" in finished.stdout
        if len(seconds) >= 3 and min(seconds) < 0.5:
            break
    assert min(seconds) < 0.5


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


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"job, version {__version__}\n", "")


# --- values that cannot be

NAME_RULE = "must start with a letter or digit and hold letters, digits, '.', '_' and '-' only (128 at most)"
INTEGER, NUMBER = "must be a whole number, not ", "must be a number, not "
STAGES = "at most 6 stages keep it at one pixel or more"
# option, value, rule, example
WRONG: list[tuple[str, str, str, str]] = [
    ("--model", "vgg", "is not one of", "'resnet', 'plainnet'"),
    ("--blocks", "2,x", "whole numbers between commas", "example: 2,5,5,2"),
    ("--blocks", "2.5", "whole numbers between commas", "example: 2,5,5,2"),
    ("--blocks", "2,0,2", "every stage needs at least 1 block", "example: --blocks 3,3,3"),
    ("--blocks", "-1", "every stage needs at least 1 block", "example: --blocks 3,3,3"),
    ("--blocks", "1,1,1,1,1,1,1", STAGES, "example: --blocks 2,5,5,2"),
    ("--filters", "0", "must be at least 1", "example: --filters 16"),
    ("--filters", "many", INTEGER, "example: 64"),
    ("--name", "a/b", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "..", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "-x", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "", NAME_RULE, "example: --name resnet-first-try"),
    ("--name", "n" * 129, NAME_RULE, "example: --name resnet-first-try"),
    ("--recipe", "sgd", "is not one of", "'article', 'fast', 'he'"),
    ("--epochs", "0", "must be at least 1", "example: --epochs 2"),
    ("--epochs", "1.5", INTEGER, "example: 20"),
    ("--batch-size", "0", "must be at least 1", "example: --batch-size 2"),
    ("--batch-size", "-128", "must be at least 1", "example: --batch-size 2"),
    ("--learning-rate", "0", "must be a finite number above 0", "example: --learning-rate 0.001"),
    ("--learning-rate", "-0.1", "must be a finite number above 0", "example: --learning-rate 0.001"),
    ("--learning-rate", "nan", "must be a finite number above 0", "example: --learning-rate 0.001"),
    ("--learning-rate", "inf", "must be a finite number above 0", "example: --learning-rate 0.001"),
    ("--learning-rate", "small", NUMBER, "example: 0.001"),
    ("--seed", "-1", "must be from 0 to 4294967295", "example: --seed 0"),
    ("--seed", "4294967296", "must be from 0 to 4294967295", "example: --seed 0"),
    ("--holdout", "7", "must be divisible by 10", "example: --holdout 5000"),
    ("--holdout", "-10", "must be divisible by 10", "example: --holdout 5000"),
    ("--precision", "float64", "is not one of", "'auto', 'float32', 'bfloat16', 'float16'"),
    ("--xla", "yes", "is not one of", "'auto', 'on', 'off'"),
    ("--replicas", "0", "must be at least 1", "example: --replicas 2"),
    ("--replicas", "two", INTEGER, "example: 2"),
    ("--workers", "0", "must be at least 1", "example: --workers 2"),
    ("--commit-every", "0epoch", "whole number of epochs, steps, min or s", "example: 500steps"),
    ("--commit-every", "500", "whole number of epochs, steps, min or s", "example: 500steps"),
    ("--commit-every", "1.5min", "whole number of epochs, steps, min or s", "example: 500steps"),
    ("--keep", "0", "must be at least 1", "example: --keep 2"),
    ("--grace-seconds", "0", "must be above 0", "example: 12"),
    ("--grace-seconds", "-3", "must be above 0", "example: 12"),
    ("--log-format", "xml", "is not one of", "'auto', 'plain', 'json'"),
]
ANY_TEXT = {"--data", "--output", "--worker-hosts"}  # whether they are right is found by looking there


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
    assert value in message
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
    monkeypatch.setenv(str(parameter.envvar), value)
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
    assert said["message"].startswith("Error: --epochs must be at least 1, not 0")


def test_every_option_that_takes_a_value_has_a_wrong_one_above() -> None:
    valued = {
        parameter.opts[0]
        for parameter in command_of(("train",)).params
        if isinstance(parameter, click.Option) and not parameter.is_flag
    }
    assert {option for option, *_ in WRONG} == valued - ANY_TEXT


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
COMPOSED = {"--model", "--blocks", "--filters", "--recipe", "--learning-rate", "--data"}


def test_every_option_is_tried() -> None:
    assert CHOSEN.keys() | COMPOSED == {parameter.opts[0] for parameter in command_of(("train",)).params}


@pytest.mark.parametrize("option", CHOSEN)
def test_a_variable_sets_its_option(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    text, field, value = CHOSEN[option]
    parameter = next(item for item in command_of(("train",)).params if option in item.opts)
    expected = {"--name": "JOB_RUN_NAME"}.get(option, "JOB_" + option[2:].upper().replace("-", "_"))
    assert parameter.envvar == expected
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
        monkeypatch.setenv(str(parameter.envvar), str(not value))
        arguments = [option if value else parameter.secondary_opts[0]]
    else:
        monkeypatch.setenv(str(parameter.envvar), "1epoch" if option == "--commit-every" else "")
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


def test_only_data_that_was_typed_is_taken_as_it_is(
    run: Run, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the variable names is fetched if it is absent; what a user types must be there."""
    monkeypatch.setenv("JOB_DATA", "volume")
    assert run("train").code == 0
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

    monkeypatch.setattr(comparison, "load_runs", fail)
    outcome = run("compare", "runs")
    assert outcome.code == kind.exit_code
    assert outcome.out == ""
    assert "the rule, the value and what to do" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_unexpected_error_shows_where_it_happened(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(comparison, "load_runs", fail)
    outcome = run("compare", "runs")
    assert outcome.code == cli.UNEXPECTED == 71
    assert "Traceback" in outcome.err
    assert "ZeroDivisionError: surprise" in outcome.err


def test_an_interrupted_command_says_so_by_its_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "load_runs", fail)
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
        ("a-file/below", 74, "a-file/below"),
    ],
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


def test_a_folder_that_is_no_run_is_not_evaluated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[Interruption] = []
    monkeypatch.setattr(Interruption, "install", lambda self: installed.append(self))
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    assert run("evaluate", "runs/empty").code == 66
    assert len(installed) == 1  # it hears signals, also as a container's first process
    (tmp_path / "runs" / "empty" / "config.json").write_text("no JSON")
    outcome = run("evaluate", "runs/empty")
    assert outcome.code == 65
    assert "config.json" in outcome.err


def test_training_with_data_that_does_not_exist(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interruption, "install", lambda _: None)
    outcome = run("train", "--data", "nowhere")
    assert outcome.code == 66
    assert "nowhere does not exist" in outcome.err
    assert "data fetch" in outcome.err


# --- what the small commands print


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


def test_results_go_to_standard_output_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` can be piped into a program that reads JSON."""
    from job import checkpoints

    results = {"run": "runs/x", "step": 391, "validation": {"accuracy": 0.5}}
    training = SimpleNamespace(evaluate=lambda *_, **__: results)
    monkeypatch.setattr(cli, "_import_training", lambda *_: training)
    identity = SimpleNamespace(network=SimpleNamespace(filters=64))
    monkeypatch.setattr(checkpoints, "read_identity", lambda _: identity)
    outcome = run("evaluate", "runs/x")
    assert json.loads(outcome.out) == results
    assert (outcome.code, outcome.err) == (0, "")
