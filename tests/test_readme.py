"""The README against the code: whatever it says in a table, a tree, a command or a link must be so."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import click
import pytest
import yaml
from PIL import Image

import job
from job import cifar10, cli, errors, networks
from job.config import RECIPES, Network, Recipe
from tests.test_cli import COMMANDS, command_of
from tests.test_house import LAYERS, ROOT, commands_in, make_targets

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = ("experiment", "containers", "cluster", "benchmark")  # where other chapters go
NOTHING = "none"

Row = dict[str, str]


def chapter(title: str, level: int = 2) -> str:
    """The text under a heading, down to the next one of its level or above."""
    text = README.partition(f"\n{'#' * level} {title}\n")[2]
    assert text, f"the README has no heading {title!r}"
    return re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[Row]:
    """The rows of the first table in a text, by the titles of their columns."""
    lines = re.search(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert lines, text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    titles, rule, *rows = cells
    assert all(set(cell) <= set(":-") for cell in rule)
    assert all(len(row) == len(titles) for row in rows), rows
    return [dict(zip(titles, row, strict=True)) for row in rows]


def after(mark: str) -> str:
    """The text after a comment that marks a place."""
    assert README.count(f"<!-- {mark} -->") == 1
    return README.partition(f"<!-- {mark} -->")[2]


def codes(cell: str) -> list[str]:
    """What a cell shows in code style."""
    return re.findall(r"`([^`]+)`", cell)


def test_images_have_this_versions_tag() -> None:
    run = re.search(r"docker run (?:.*\\\n)*\s+(\S+) train", chapter("In containers"))
    assert run
    assert run[1] == f"cifar-residual-job:{job.__version__}"


# --- options

LEAVES = [path for path in COMMANDS if path and not isinstance(command_of(path), click.Group)]


def described(parameter: click.Parameter) -> tuple[list[str], str]:
    """Names and variable of an option or an argument, as a row of the README gives them."""
    if isinstance(parameter, click.Option):
        names = [*parameter.opts, *parameter.secondary_opts]
    else:
        names = [str(parameter.name).upper()]
    return names, str(parameter.envvar or NOTHING)


def default_of(parameter: click.Parameter) -> str | None:
    """A default as text; None where something else decides."""
    value = parameter.to_info_dict().get("default")
    if value is None or parameter.required:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_is_described_with_its_variable_and_default(path: tuple[str, ...]) -> None:
    rows = table(chapter(f"`python -m job {' '.join(path)}`", 3))
    parameters = [item for item in command_of(path).params if item.name != "help"]
    assert len(rows) == len(parameters)
    for row, parameter in zip(rows, parameters, strict=True):
        names, variable = described(parameter)
        assert codes(row["Option"]) == names
        assert (codes(row["Variable"]) or [row["Variable"]]) == [variable]
        default = default_of(parameter)
        if default is None:  # said in words: code style is for what stands on the command line
            assert not re.fullmatch(r"`[^`]*`", row["Default"])
        else:
            assert row["Default"] == f"`{default}`"
        assert (row["Default"] == "required") == parameter.required
        assert row["Meaning"].endswith(".")


def test_no_command_is_described_that_does_not_exist() -> None:
    titles = re.findall(r"^### `python -m job (.+)`$", README, re.MULTILINE)
    assert titles == [" ".join(path) for path in LEAVES]


def test_choices_are_named() -> None:
    for path in LEAVES:
        rows = {
            row["Option"]: row["Meaning"] + row["Default"]
            for row in table(chapter(f"`python -m job {' '.join(path)}`", 3))
        }
        for parameter in command_of(path).params:
            if isinstance(parameter.type, click.Choice):
                text = rows[f"`{parameter.opts[0]}`"]
                assert set(parameter.type.choices) <= set(codes(text)), (path, parameter.name)


def environment_reads() -> Iterator[str]:
    """Environment variables that job/ reads outside Click."""
    for path in (ROOT / "job").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript | ast.Compare) else ""
            yield from re.findall(r"^os\.environ(?:\.get\(|\[)'(\w+)'", text)
            yield from re.findall(r"^'(\w+)' (?:not )?in os\.environ", text)


def environment_defaults() -> Iterator[str]:
    """Environment variables of others that job/ sets where the user has not."""
    for path in (ROOT / "job").glob("*.py"):
        yield from re.findall(r"os\.environ\.setdefault\(\s*\"(\w+)\"", path.read_text())


def test_every_further_variable_is_described() -> None:
    named = {name for row in table(chapter("Further variables", 3)) for name in codes(row["Variable"])}
    options = {parameter.envvar for path in LEAVES for parameter in command_of(path).params}
    assert set(environment_reads()) - options <= named
    assert named <= set(environment_reads()) | set(environment_defaults())


# --- exit codes


def test_the_exit_codes_are_the_programs() -> None:
    rows = table(chapter("Exit codes"))
    named = {int(row["Code"]): codes(row["Error"]) for row in rows}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JobError)
    ]
    expected = {kind.exit_code: [kind.__name__] for kind in kinds if kind is not errors.JobError}
    assert named == {0: [], cli.UNEXPECTED: [], **expected}
    assert list(named) == sorted(named)
    assert errors.JobError.exit_code == cli.UNEXPECTED


@pytest.mark.parametrize("model", ["resnet", "plainnet"])
def test_the_policy_is_the_manifests(model: str) -> None:
    (job,) = yaml.safe_load_all((ROOT / "k8s" / "base" / f"20-{model}.yaml").read_text())
    decided: dict[int, str] = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            decided.setdefault(code, rule["action"])
    for row in table(chapter("Exit codes")):
        code = int(row["Code"])
        assert row["Policy"] == ("" if code == 0 else decided.get(code, "counted")), code


# --- facts


def test_the_recipes_are_the_programs() -> None:
    rows = table(after("recipes"))
    assert {title for row in rows for title in row} == {"Value", *(f"`{name}`" for name in RECIPES)}
    shown = {name: {codes(row["Value"])[0]: codes(row[f"`{name}`"])[0] for row in rows} for name in RECIPES}
    expected = {
        name: {
            field.name: str(getattr(recipe, field.name)) for field in fields(Recipe) if field.name != "name"
        }
        for name, recipe in RECIPES.items()
    }
    assert shown == expected


@pytest.mark.parametrize("row", table(after("networks")), ids=lambda row: row["`--model`"] + row["Layers"])
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
    resnet, plainnet = (int(row["Parameters"].replace(",", "")) for row in table(after("networks"))[:2])
    assert f"difference, {resnet - plainnet:,} parameters" in README


def test_the_demo_shows_what_make_demo_runs() -> None:
    """The names that it prints hold the digest of all that decides a run."""
    match = re.search(r"^DEMO_ARGS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match
    shown = after("demo").partition("```\n")[2].partition("```")[0]
    for model in ("resnet", "plainnet"):
        arguments = ["--model", model, "--data", "sample", *shlex.split(match[1])]
        settings = cli._settings(dict(command_of(("train",)).make_context("train", arguments).params))
        identity = settings.identity(precision="bfloat16", data_sha256=cifar10.fingerprint(cifar10.SAMPLE))
        assert f"\nruns/demo/{identity.default_name}: attempt 1 on " in f"\n{shown}"
        assert f"\n{identity.default_name} " in shown  # in the table
        assert f"epoch {settings.epochs}/{settings.epochs}: " in shown
    assert "One pair proves nothing." in shown


# --- names


def test_every_make_target_that_is_named_exists() -> None:
    named = set(commands_in(README)) | set(re.findall(r"^    make ([a-z][a-z0-9-]*)", README, re.MULTILINE))
    assert {"demo", "test", "data", "run", "tensorboard"} <= named
    assert named <= make_targets().keys()


def test_every_job_command_that_is_named_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.findall(r"python -m job ([^`\n]*)", README)
    assert len(lines) > len(LEAVES)
    for line in lines:
        words = shlex.split(line.replace("FILE.png", "file.png"), comments=True)
        command: click.Command = cli.cli
        while isinstance(command, click.Group) and words:
            command = command.commands[words.pop(0)]
        if words:
            assert command.make_context("job", words)


def test_the_layout_lists_every_module_from_top_to_bottom() -> None:
    listed = re.findall(r"^    (\S+) {2,}\S", chapter("Layout"), re.MULTILINE)
    modules = [Path(name).stem for name in listed if re.fullmatch(r"job/\w+\.py", name)]
    assert sorted(modules) == sorted(path.stem for path in (ROOT / "job").glob("*.py"))
    assert modules == list(reversed(LAYERS))
    for name in listed:
        assert list(ROOT.glob(name.rstrip("/"))), f"{name} does not exist"


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            name
        )


def test_every_promise_names_the_test_that_holds_it() -> None:
    text = chapter("What happens when ...")
    held = re.findall(r"^- (.+): (`tests/.+`)$", text.partition("<details>")[2], re.MULTILINE)
    promises = [row["What happens"] for row in table(text)]
    assert len(promises) >= 19
    assert [promise for promise, _ in held] == promises
    assert all(codes(tests) for _, tests in held)


def test_the_exit_codes_in_the_text_are_right() -> None:
    """A number after "exit" is one of the table's."""
    known = {row["Code"] for row in table(chapter("Exit codes"))}
    named = re.findall(r"[Ee]xits? (?:code )?(\d+)(?:(?:, | or )(\d+))*", README)
    assert named
    assert {number for numbers in named for number in numbers if number} <= known


# --- links, pictures, shape


def anchors() -> set[str]:
    """Where GitHub jumps to: titles in lower case, with hyphens for spaces and nothing else but letters."""
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors(), target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_pictures_are_small_whole_and_described() -> None:
    shown = re.findall(r"!\[([^\]]*)\]\((\.github/pictures/[^)]+)\)", README)
    assert shown
    for text, name in shown:
        assert len(text) > 10
        assert (ROOT / name).stat().st_size < 200_000
        with Image.open(ROOT / name) as picture:
            assert picture.format == "PNG"
            picture.load()
    assert {Path(name).name for _, name in shown} == {
        path.name for path in (ROOT / ".github" / "pictures").iterdir()
    }


def test_the_first_screen_says_what_why_how_and_what_to_expect() -> None:
    first = "\n".join(README.splitlines()[:60])
    positions = [
        first.find(part)
        for part in ("**Why.**", "make demo", "make test", "What you should see", "demo-curves.png")
    ]
    assert all(left < right for left, right in pairwise([0, *positions]))


def test_the_places_for_other_chapters_are_marked_once() -> None:
    for section in SECTIONS:
        assert README.count(f"<!-- section: {section} -->") == 1
