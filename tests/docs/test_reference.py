"""docs/reference.md against the program; its tables of options, exit codes and recipes are written by it."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import job
from job import cli
from job.console import Reporter
from job.domain import errors
from job.domain.network import Network
from job.model import networks
from tests.docs.pages import REFERENCE, Row, after, block, chapter, codes, table
from tests.test_cli import COMMANDS, command_of
from tests.test_house import ROOT
from tests.tools import write_reference
from tests.tools.regions import with_region

LEAVES = [path for path in COMMANDS if path and not isinstance(command_of(path), click.Group)]


def test_the_page_is_what_the_program_writes() -> None:
    """After a change of an option, an error, a recipe or the failure policy: make docs."""
    assert write_reference.renewed(REFERENCE) == REFERENCE


def test_a_region_is_replaced_and_nothing_else() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert with_region(page, "x", r"n\1w") == "a\n<!-- x -->\n\nn\\1w\n\n<!-- end of x -->\nb\n"
    for broken in ("no region", page + page):
        with pytest.raises(ValueError, match="must have the region 'x' once"):
            with_region(broken, "x", "new")


# --- options


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_has_a_row_with_its_default_and_choices(path: tuple[str, ...]) -> None:
    """By another way than the page is written: from the command line's own help and from its types."""
    command = command_of(path)
    rows = table(chapter(REFERENCE, f"`python -m job {' '.join(path)}`", 3))
    assert len(rows) == len(command.params)
    for row, parameter in zip(rows, command.params, strict=True):
        assert row["Meaning"].endswith((".", "`."))
        assert (row["Default"] == "required") == parameter.required
        if isinstance(parameter, click.Option):
            assert codes(row["Option"]) == [*parameter.opts, *parameter.secondary_opts]
        if isinstance(parameter.type, click.Choice):
            assert set(parameter.type.choices) <= set(codes(row["Meaning"]))


def test_the_page_has_every_command_and_no_other() -> None:
    titles = re.findall(r"^### `python -m job (.+)`$", REFERENCE, re.MULTILINE)
    assert titles == [" ".join(path) for path in LEAVES]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_a_variable_that_the_page_names_sets_its_option(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page, Click and the environment agree: each option in turn is set to something valid."""
    context = next(item for item in write_reference.leaves() if item.command is command_of(path))
    for row in table(chapter(REFERENCE, f"`{context.command_path}`", 3)):
        for variable in codes(row["Variable"]):
            parameter = next(item for item in context.command.params if named(item) == codes(row["Option"]))
            monkeypatch.setenv(variable, valid_for(parameter))
            assert parameter.value_from_envvar(context) is not None, variable
            monkeypatch.delenv(variable)
            assert parameter.value_from_envvar(context) is None, variable


def named(parameter: click.Parameter) -> list[str]:
    if isinstance(parameter, click.Option):
        return [*parameter.opts, *parameter.secondary_opts]
    return [parameter.human_readable_name]


def valid_for(parameter: click.Parameter) -> str:
    if isinstance(parameter.type, click.Choice):
        return str(parameter.type.choices[0])
    return "1"


def environment_reads() -> Iterator[str]:
    """Environment variables that job/ reads outside Click."""
    for path in (ROOT / "job").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript | ast.Compare) else ""
            yield from re.findall(r"^os\.environ(?:\.get\(|\[)'(\w+)'", text)
            yield from re.findall(r"^'(\w+)' (?:not )?in os\.environ", text)


def environment_defaults() -> Iterator[str]:
    """Environment variables of others that job/ sets where the user has not."""
    for path in (ROOT / "job").rglob("*.py"):
        yield from re.findall(r"os\.environ\.setdefault\(\s*\"(\w+)\"", path.read_text())


def test_every_further_variable_is_described() -> None:
    described = {
        name for row in table(chapter(REFERENCE, "Further variables")) for name in codes(row["Variable"])
    }
    options = set(re.findall(r"`(JOB_\w+)`", chapter(REFERENCE, "Commands and options")))
    assert set(environment_reads()) - options <= described
    assert described <= set(environment_reads()) | set(environment_defaults())


def test_the_file_of_settings_that_is_shown_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below what is typed and what a variable says, as the page has it."""
    path = tmp_path / "mine.toml"
    path.write_text(block(REFERENCE, "config"))
    monkeypatch.setenv("JOB_EPOCHS", "7")
    arguments = ["--config", str(path), "--filters", "32"]
    values = command_of(("train",)).make_context("train", arguments, auto_envvar_prefix="JOB").params
    assert (values["data"], values["blocks"], values["recipe"].name) == ("sample", (3, 3, 3), "mine")
    assert (values["epochs"], values["filters"]) == (7, 32)


# --- logs


def test_the_fields_of_a_json_log_are_described() -> None:
    out = io.StringIO()
    reporter = Reporter("json", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.console.LINE_SECONDS", 0.0)
        for done in (1, 2):  # the second is so long after the first that the time left is known
            reporter.progress("epoch 1", done, 3, images_per_second=9, loss=1, accuracy=0.5)
    reporter.transfer("data", 3, 3)
    measures = {"loss": 1.0, "accuracy": 0.5, "images_per_second": 9.0}
    entry = {"epoch": 1, "step": 3, "wall_time": 1.0, "train": measures, "validation": measures}
    reporter.epoch(entry, 1, seconds_left=0)
    _, progress, download, epoch = map(json.loads, out.getvalue().splitlines())
    rows = {row["Line"]: set(codes(row["Further fields"])) for row in table(chapter(REFERENCE, "Logs"))}
    always = {"timestamp", "severity", "message"}
    assert always <= set(codes(chapter(REFERENCE, "Logs")))
    assert rows == {
        "Progress": progress.keys() - always,
        "An epoch": epoch.keys() - always,
        "A download": download.keys() - always,
    }


# --- exit codes


def test_every_exit_code_is_listed_once_in_order() -> None:
    shown = [int(row["Code"]) for row in table(chapter(REFERENCE, "Exit codes"))]
    kinds = write_reference.kinds()
    assert shown == sorted(shown)
    assert set(shown) == {0, cli.UNEXPECTED, *(kind.exit_code for kind in kinds)}
    assert len(shown) == len(kinds) + 2  # no two errors share a code
    assert errors.JobError.exit_code == cli.UNEXPECTED


def test_both_jobs_have_one_failure_policy() -> None:
    decided = write_reference.failure_policy()
    assert decided[75] == "Ignore"
    assert decided[2] == "FailJob"


# --- facts


@pytest.mark.parametrize(
    "row", table(after(REFERENCE, "networks")), ids=lambda row: row["`--model`"] + row["Layers"]
)
def test_the_networks_are_as_they_are_described(row: Row) -> None:
    arguments = [
        part
        for option in ("--model", "--blocks", "--filters")
        for part in (option, codes(row[f"`{option}`"])[0])
    ]
    context = command_of(("describe",)).make_context("describe", arguments)
    network = Network(**{name: context.params[name] for name in ("model", "blocks", "filters")})
    model = networks.build(network)
    assert row["Layers"] == str(network.layers)
    assert row["Parameters"] == f"{model.count_params():,}"
    assert row["Multiply-accumulates an image"] == f"{networks.multiply_accumulates(model):,}"


def test_the_gap_between_the_twins_is_stated() -> None:
    resnet, plainnet = (
        int(row["Parameters"].replace(",", "")) for row in table(after(REFERENCE, "networks"))[:2]
    )
    assert f"difference, {resnet - plainnet:,} parameters" in REFERENCE


def test_images_have_this_versions_tag() -> None:
    run = re.search(r"docker run (?:.*\\\n)*\s+(\S+) train", chapter(REFERENCE, "Containers"))
    assert run
    assert run[1] == f"cifar-residual-job:{job.__version__}"
