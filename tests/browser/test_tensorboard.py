"""What a person sees in TensorBoard: read from the page and from what it has drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import MODELS, SEEDS, Run

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # seconds; a busy machine trains slowly

SPLITS = ("train", "validation")


def chart(page: Page, title: str) -> Locator:
    """One chart of the custom layout."""
    card = page.locator("tf-custom-scalar-multi-line-chart-card")
    return card.filter(has=page.get_by_text(title, exact=True))


def points(line: Locator) -> list[tuple[float, float]]:
    """Corners of a drawn line, in pixels."""
    corners = re.findall(r"([-\d.]+),([-\d.]+)", line.get_attribute("d") or "")
    return [(float(x), float(y)) for x, y in corners]


def drawn(card: Locator, count: int) -> list[list[tuple[float, float]]]:
    """All visible lines of a chart, once there are ``count`` of them."""
    lines = card.locator("path.line[stroke]")
    expect(lines).to_have_count(count)
    return [points(line) for line in lines.all()]


def values_under_pointer(page: Page, card: Locator) -> dict[str, float]:
    """Name of each curve and its value at the last epoch, from the tooltip."""
    box = card.locator("vz-line-chart2").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    rows = page.locator("vz-line-chart-tooltip tbody tr:visible")
    expect(rows.first).to_be_visible()
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    return {name: float(value) for _, name, _, value, *_ in cells}


def test_it_opens_on_one_chart_with_the_curves_of_both_networks(
    page: Page, address: str, runs: Sequence[Run]
) -> None:
    page.goto(address)
    expect(page.get_by_text("ResNet and PlainNet", exact=True)).to_be_visible()
    accuracy = chart(page, "Accuracy")
    curves = len(runs) * len(SPLITS)
    epochs = len(runs[0].accuracies("train"))

    for title, count in (("Accuracy", curves), ("Loss", curves), ("Images per second", len(runs))):
        lines = drawn(chart(page, title), count)
        assert [len(line) for line in lines] == [epochs] * count, title
        assert len({tuple(line) for line in lines}) == count, title  # none hides another

    shown = values_under_pointer(page, accuracy)
    expected = {
        f"epoch_accuracy ({run.name}/{split})": run.accuracies(split)[-1] for run in runs for split in SPLITS
    }
    assert shown == pytest.approx(expected, abs=0.0006)  # three digits are shown
    for model in MODELS:
        assert sum(f"({model}" in name for name in shown) == len(SEEDS) * len(SPLITS)


def test_the_lines_rise_where_the_accuracy_does(page: Page, address: str, runs: Sequence[Run]) -> None:
    """A line's height follows its values, so what is drawn is the accuracy and not its smoothed shadow."""
    page.goto(address)
    lines = drawn(chart(page, "Accuracy"), len(runs) * len(SPLITS))
    rises = sorted(line[0][1] - line[-1][1] for line in lines)  # pixels; y grows downward
    gains = sorted(run.accuracies(split)[-1] - run.accuracies(split)[0] for run in runs for split in SPLITS)
    scale = rises[-1] / gains[-1]
    assert scale > 0
    assert rises == pytest.approx([gain * scale for gain in gains], abs=1)


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
    page.goto(address.partition("#")[0] + "#hparams")
    expect(page.locator("vaadin-grid-cell-content").get_by_text(runs[-1].name)).to_be_visible()

    shown = [
        (
            row["Trial ID"],
            row["model"],
            float(row["seed"]),
            *(float(row[f"{split}.epoch_accuracy"]) for split in SPLITS),
        )
        for row in rows(page)
    ]
    assert shown == [
        (
            run.name,
            run.identity["model"],
            run.identity["seed"],
            *(run.accuracies(split)[-1] for split in SPLITS),
        )
        for run in runs
    ]


def test_sample_grids_and_confusion_matrices_are_shown(page: Page, address: str, runs: Sequence[Run]) -> None:
    page.goto(address.partition("#")[0] + "#images")
    for tag, split in (("confusion_matrix", "validation"), ("samples", "train")):
        for run in runs:
            card = page.locator("tf-image-loader").filter(has_text=tag).filter(has_text=f"{run.name}/{split}")
            expect(card).to_have_count(1)
            picture = card.locator("img")
            expect(picture).to_be_visible()
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 200


def test_the_graph_shows_the_stages_and_the_skip_connection(
    page: Page, address: str, runs: Sequence[Run]
) -> None:
    page.goto(address.partition("#")[0] + "#graphs")
    page.locator("paper-dropdown-menu").first.click()
    page.locator("paper-item").filter(has_text="resnet").first.click()
    nodes = page.locator("tf-graph-scene g.node")
    for name in ("images", "stem", "stage1", "stage2", "pool", "flatten", "logits", "probabilities"):
        expect(nodes.filter(has_text=name)).to_have_count(1)

    nodes.filter(has_text="stage2").dblclick()
    nodes.filter(has_text="block1").last.dblclick()
    for source in ("shortcut", "conv2"):
        edge = page.locator(f"g.edge[data-edge='stage2/block1/{source}--stage2/block1/add'] path")
        expect(edge).to_be_visible()
