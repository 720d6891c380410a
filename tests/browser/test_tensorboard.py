"""What a person sees in TensorBoard: read from the page and from what it has drawn."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import MODELS, SEEDS, Run

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # seconds; a busy machine trains slowly

METRICS = ("train.epoch_accuracy", "epoch_accuracy")  # as the hyperparameter table calls them
GROUPS = {"train": "/train", "validation": ""}  # a split, and what its entry has behind the run's name

CUSTOM = "#custom_scalars&_smoothingWeight=0"  # one chart for all runs, unsmoothed

Line = list[tuple[float, float]]

expect.set_options(timeout=60_000)  # milliseconds


def chart(page: Page, title: str) -> Locator:
    """One chart of the custom layout."""
    card = page.locator("tf-custom-scalar-multi-line-chart-card")
    return card.filter(has=page.get_by_text(title, exact=True))


def settles(page: Page, read: Callable[[], Any], expected: Any, seconds: float = 60) -> None:
    """Read the page until it shows what is expected: what is there may still be laid out and drawn."""
    end = time.monotonic() + seconds
    found = attempt(read)
    while found != expected and time.monotonic() < end:
        page.wait_for_timeout(200)
        found = attempt(read)
    assert found == expected


def attempt(read: Callable[[], Any]) -> Any:
    """What is read, or why the page is not ready to be read."""
    try:
        return read()
    except (IndexError, KeyError, ValueError) as error:
        return error


def drawn(card: Locator) -> list[Line]:
    """The corners of each visible line of a chart, in pixels."""
    paths = card.locator("path.line[stroke]").evaluate_all(
        "lines => lines.map(line => line.getAttribute('d'))"
    )
    return [[(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path)] for path in paths]


def lengths(lines: Callable[[], list[Line]]) -> list[int]:
    return [len(line) for line in lines()]


def distinct(lines: Callable[[], list[Line]]) -> int:
    return len(set(map(tuple, lines())))


def values_under_pointer(page: Page, card: Locator) -> dict[str, float]:
    """Name of each curve and its value at the last epoch, from the tooltip."""
    box = card.locator("vz-line-chart2").bounding_box()
    assert box is not None
    for right in (box["width"] / 2, 4):  # pixels from the right edge; the tooltip follows a movement
        page.mouse.move(box["x"] + box["width"] - right, box["y"] + box["height"] / 2)
    cells = page.locator("vz-line-chart-tooltip tbody tr").evaluate_all(
        """rows => rows.filter(row => row.getBoundingClientRect().height)
            .map(row => [...row.cells].map(cell => cell.textContent))"""
    )
    return {name: float(value) for _, name, _, value, *_ in cells}


def test_the_bare_address_opens_on_the_accuracy_of_both_networks(
    page: Page, address: str, runs: Sequence[Run]
) -> None:
    """First the accuracy, then the loss, both unfolded; each run has one entry for each of its curves."""
    page.goto(address)
    cards = page.locator("metrics-card-groups card-view")
    expect(cards.first).to_be_visible()
    titles = page.locator("metrics-card-groups .group-title")
    settles(page, lambda: titles.all_text_contents()[:2], ["epoch_accuracy", "epoch_loss"])
    expect(cards.first).to_contain_text("epoch_accuracy")
    first = cards.first.bounding_box()
    assert first is not None
    assert first["y"] + first["height"] < 1080  # the viewport: nobody has to scroll
    listed = page.locator("runs-data-table tb-data-table-content-row, runs-data-table .run-name-column")
    names = {f"{run.name}{group}" for run in runs for group in GROUPS.values()}
    settles(page, lambda: page_texts(page, names), names)
    expect(listed).not_to_have_count(0)


def page_texts(page: Page, names: set[str]) -> set[str]:
    """Which of these names stand in the list of runs."""
    return {name for name in names if page.get_by_text(name, exact=True).count()}


def test_one_chart_has_the_curves_of_both_networks(page: Page, address: str, runs: Sequence[Run]) -> None:
    page.goto(address + CUSTOM)
    expect(page.get_by_text("ResNet and PlainNet", exact=True)).to_be_visible()
    accuracy = chart(page, "Accuracy")
    curves = len(runs) * len(GROUPS)
    epochs = len(runs[0].accuracies("train"))
    # What TensorBoard takes for an outlier leaves the chart, and its line is cut there.
    page.get_by_text("Ignore outliers in chart scaling").first.click()

    for title, count in (("Accuracy", curves), ("Loss", curves), ("Images per second", len(runs))):
        lines = partial(drawn, chart(page, title))
        settles(page, partial(lengths, lines), [epochs] * count)
        settles(page, partial(distinct, lines), count)  # none hides another

    expected = {
        f"epoch_accuracy ({run.name}{group})": run.accuracies(split)[-1]
        for run in runs
        for split, group in GROUPS.items()
    }
    assert all(sum(f"({model}" in name for name in expected) == 2 * len(SEEDS) for model in MODELS)
    three_digits = pytest.approx(expected, abs=0.0006)
    settles(page, lambda: values_under_pointer(page, accuracy), three_digits)


def test_the_lines_rise_where_the_accuracy_does(page: Page, address: str, runs: Sequence[Run]) -> None:
    """A line's height follows its values, so what is drawn is the accuracy and not its smoothed shadow."""
    page.goto(address + CUSTOM)
    page.get_by_text("Ignore outliers in chart scaling").first.click()
    gains = sorted(run.accuracies(split)[-1] - run.accuracies(split)[0] for run in runs for split in GROUPS)
    card = chart(page, "Accuracy")

    def rises() -> list[float]:
        """From a line's first to its last corner, relative to the steepest; y grows downward."""
        pixels = sorted(line[0][1] - line[-1][1] for line in drawn(card))
        return [rise / abs(pixels[-1]) for rise in pixels]

    settles(page, rises, pytest.approx([gain / gains[-1] for gain in gains], abs=0.01))


def rows(page: Page) -> list[dict[str, str]]:
    """The hyperparameter table as it lies on the page: what is below each title, row by row from above."""
    cells: list[tuple[str, float, float]] = page.locator("vaadin-grid-cell-content").evaluate_all(
        """cells => cells.map(cell => [cell.textContent.trim(), cell.getBoundingClientRect()])
            .filter(([text, box]) => text && box.width && box.height)
            .map(([text, box]) => [text, box.x, box.y])"""
    )
    titles: dict[float, str] = {}
    found: dict[float, dict[str, str]] = {}
    for text, x, y in cells:
        if x not in titles:
            titles[x] = text  # the first of its column; some are higher than others
        else:
            found.setdefault(y, {})[titles[x]] = text
    return [found[y] for y in sorted(found)]


def test_the_hyperparameter_table_has_a_row_for_every_run(
    page: Page, address: str, runs: Sequence[Run]
) -> None:
    page.goto(address + "#hparams")
    expect(page.locator("vaadin-grid-cell-content").get_by_text(runs[-1].name)).to_be_visible()

    def shown() -> list[tuple[str, str, float, float, float]]:
        numbers = ("seed", *METRICS)
        return [
            (row["Trial ID"], row["model"], *(float(row[title]) for title in numbers))  # type: ignore[misc]
            for row in rows(page)
        ]

    expected = [
        (
            run.name,
            run.identity["model"],
            run.identity["seed"],
            *(run.accuracies(split)[-1] for split in GROUPS),
        )
        for run in runs
    ]
    settles(page, shown, expected)


def test_sample_grids_and_confusion_matrices_are_shown(page: Page, address: str, runs: Sequence[Run]) -> None:
    page.goto(address + "#images")
    for tag, split in (("confusion_matrix", "validation"), ("samples", "train")):
        for run in runs:
            card = (
                page.locator("tf-image-loader")
                .filter(has_text=tag)
                .filter(has_text=re.compile(f"{run.name}{GROUPS[split]}(?!/)"))
            )
            expect(card).to_have_count(1)
            picture = card.locator("img")
            expect(picture).to_be_visible()
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 200


def test_the_graph_shows_the_stages_and_the_skip_connection(
    page: Page, address: str, runs: Sequence[Run]
) -> None:
    page.goto(address + "#graphs")
    nodes = page.locator("tf-graph-scene g.node")
    of_first_graph = nodes.filter(has_text="stem").element_handle()  # a graph that arrives closes the menu
    page.locator("paper-dropdown-menu").first.click()
    page.locator("paper-item").filter(has_text="resnet").first.click()
    of_first_graph.wait_for_element_state("hidden")  # PlainNet's nodes have the same names
    for name in ("images", "stem", "stage1", "stage2", "pool", "flatten", "logits", "probabilities"):
        expect(nodes.filter(has_text=name)).to_have_count(1)

    nodes.filter(has_text="stage2").dblclick()
    nodes.filter(has_text="block1").last.dblclick()
    for source in ("shortcut", "conv2"):
        edge = page.locator(f"g.edge[data-edge='stage2/block1/{source}--stage2/block1/add'] path")
        expect(edge).to_be_visible()
    page.wait_for_timeout(2000)  # milliseconds, in which all glides to its place, for the picture
