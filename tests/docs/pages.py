"""The pages as text, and their parts: chapters, tables, what stands in code style."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_house import ROOT

PAGES: dict[str, str] = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, REFERENCE = PAGES["README.md"], PAGES["docs/reference.md"]
PROMISES, EXPERIMENT = PAGES["docs/promises.md"], PAGES["docs/experiment.md"]
ARCHITECTURE = PAGES["docs/architecture.md"]

Row = dict[str, str]


def chapter(page: str, title: str, level: int = 2) -> str:
    """The text under a heading, down to the next one of its level or above."""
    text = page.partition(f"\n{'#' * level} {title}\n")[2]
    assert text, f"the page has no heading {title!r}"
    return re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[Row]:
    """The rows of the first table in a text, by the titles of their columns."""
    lines = re.search(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert lines, text
    cells = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines[0].splitlines()
    ]
    titles, rule, *rows = cells
    assert all(set(cell) <= set(":-") for cell in rule)
    assert all(len(row) == len(titles) for row in rows), rows
    return [dict(zip(titles, row, strict=True)) for row in rows]


def after(page: str, mark: str) -> str:
    """The text after a comment that marks a place."""
    assert page.count(f"<!-- {mark} -->") == 1
    return page.partition(f"<!-- {mark} -->")[2]


def codes(cell: str) -> list[str]:
    """What a cell shows in code style."""
    return re.findall(r"`([^`]+)`", cell)


def block(page: str, mark: str) -> str:
    """The content of the fenced block after a mark."""
    found = re.match(r"\n```\w*\n(.*?)^```$", after(page, mark), re.DOTALL | re.MULTILINE)
    assert found, mark
    return found[1]


def anchors(page: str) -> set[str]:
    """Where GitHub jumps to: titles in lower case, with hyphens for spaces and nothing else but letters."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)]+)\)", page)


def folder_of(name: str) -> Path:
    """Where a page's relative links start."""
    return (ROOT / name).parent
