"""Every page against the program: commands, exit codes, named tests and files, links and pictures."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from PIL import Image

from job.cli.commands import cli
from tests.docs.pages import PAGES, REFERENCE, anchors, chapter, folder_of, links, table
from tests.test_cli import COMMANDS, command_of
from tests.test_house import ROOT, commands_in, make_targets

each_page = pytest.mark.parametrize("name", PAGES)


@each_page
def test_every_make_target_that_is_named_exists(name: str) -> None:
    assert set(commands_in(PAGES[name])) <= make_targets().keys()


@each_page
def test_every_variable_given_to_make_is_one_of_the_makefiles(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"(?:^    |`)(make [^`\n]*)", PAGES[name], re.MULTILINE):
        for variable in re.findall(r" ([A-Z_]+)=", re.sub(r'"[^"]*"', "", line)):
            assert f"$({variable})" in makefile, line


def commands_of_the_job(page: str) -> list[list[str]]:
    """The command lines of the job in a page, without those that only show a command's usage."""
    lines = re.findall(r"python -m job\b ?([^`\n]*)", page)
    words = [shlex.split(line, comments=True) for line in lines if "[" not in line]
    return [line for line in words if line and not line[-1].endswith(".")]


@each_page
def test_every_job_command_that_is_named_parses(name: str) -> None:
    for words in commands_of_the_job(PAGES[name]):
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        if words and words != ["--help"]:
            assert command.make_context("job", [word.replace("FILE", "file") for word in words])


def test_the_pages_name_commands_of_the_job() -> None:
    """Else the test above would look at nothing."""
    assert len([words for page in PAGES.values() for words in commands_of_the_job(page)]) > 10


@each_page
def test_every_option_that_is_named_exists(name: str) -> None:
    """In code style; options of other programs are named."""
    parameters = [item for path in COMMANDS for item in command_of(path).params]
    known = {text for item in parameters for text in [*item.opts, *item.secondary_opts]}
    others = {"--help", "--only", "--part", "--workload", "--turns", "--seconds", "--markdown"}
    others |= {"--signal", "--every"}  # of `make bench`, as those before
    others |= {"--security-opt", "--user"}  # Docker's
    named = {code.split()[0].split("=")[0] for code in re.findall(r"`(--[^`]+)`", PAGES[name])}
    assert named <= known | others


@each_page
def test_the_exit_codes_in_the_text_are_the_programs(name: str) -> None:
    """A number after "exit" is one of the table's."""
    known = {row["Code"] for row in table(chapter(REFERENCE, "Exit codes"))}
    named = re.findall(r"[Ee]xits? (?:code )?(\d+)(?:(?:, | or )(\d+))*", PAGES[name])
    assert {number for numbers in named for number in numbers if number} <= known


@each_page
def test_every_test_that_is_named_exists(name: str) -> None:
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGES[name]):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert not test or test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            test
        )


@each_page
def test_every_file_of_the_project_that_is_named_exists(name: str) -> None:
    for file in re.findall(r"`((?:job|tests|docs|k8s|requirements)/[\w./-]*)`", PAGES[name]):
        assert (ROOT / file).exists(), file


@each_page
def test_every_module_that_is_named_exists(name: str) -> None:
    for module in re.findall(r"python -m ((?:job|tests)[\w.]*)", PAGES[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@each_page
def test_links_lead_somewhere(name: str) -> None:
    for target in links(PAGES[name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (folder_of(name) / file).resolve() if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached = {(folder_of(name) / link).resolve() for name, page in PAGES.items() for link in links(page)}
    assert {ROOT / name for name in PAGES} <= reached | {ROOT / "README.md"}


def test_pictures_are_small_whole_and_described() -> None:
    shown = set()
    for name, page in PAGES.items():
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page):
            path = folder_of(name) / target
            shown.add(path.resolve())
            assert len(text) > 10
            assert path.stat().st_size < 200_000
            with Image.open(path) as picture:
                assert picture.format == "PNG"
                picture.load()
    assert shown == set(Path(ROOT / "docs" / "pictures").resolve().iterdir())


def test_contributing_is_one_screen() -> None:
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 45


def test_hand_written_lines_are_short() -> None:
    """At most 120 characters, but for tables, lists of tests, what is shown of a terminal, and commands."""
    for name, page in PAGES.items():
        prose = re.sub(
            r"^(?:```.*?^```|<!-- commands -->.*?<!-- end of commands -->)$", "", page, flags=re.M | re.S
        )
        for line in prose.splitlines():
            if not line.startswith(("|", "    ", "![", "- ")):
                assert len(line) <= 120, (name, line)
