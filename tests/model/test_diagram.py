from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from job.domain.errors import MissingInput, UsageError
from job.domain.network import Network
from job.model import diagram, networks
from job.model.diagram import Block, Convolution, draw, stages

Box = tuple[float, float, float, float]


build = cache(networks.build)  # no test changes a network


def block(filters: int, *, summed: bool = True, projected: bool = False) -> Block:
    stride = 2 if projected else 1
    convolutions = (Convolution(3, filters, stride), Convolution(3, filters, 1))
    return Block(convolutions, summed, Convolution(1, filters, 2) if projected and summed else None)


def colours(path: Path) -> set[Any]:
    """All colours of a picture."""
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
        return {colour for _, colour in rgb.getcolors(rgb.width * rgb.height) or []}


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Box]]:
    """What is written into a picture, in order, and where, in its own pixels as drawn."""
    written: list[tuple[str, Box]] = []
    original = diagram._Pen.text

    def text(pen: diagram._Pen, at: Any, text: str, **options: Any) -> None:
        original(pen, at, text, **options)
        size = options.get("size", 14)
        size *= min(1.0, options.get("width", float("inf")) / pen.text_width(text, size))
        x, y = (value * diagram.DRAWN for value in at)
        font = diagram._Pen._font(size)
        written.append((text, pen._draw.textbbox((x, y), text, font, options.get("anchor", "mm"))))

    monkeypatch.setattr(diagram._Pen, "text", text)
    return written


def test_stages_are_read_from_the_model() -> None:
    resnet = stages(build(Network()))
    assert [stage.shape for stage in resnet] == ["32x32x64", "16x16x128", "8x8x256", "4x4x512"]
    expected: list[tuple[Block, ...]] = [(block(64),) * 2]
    expected += [
        (block(filters, projected=True), *(block(filters),) * count)
        for filters, count in ((128, 4), (256, 4), (512, 1))
    ]
    assert [stage.blocks for stage in resnet] == expected


def test_the_plain_twin_has_the_same_convolutions_and_nothing_that_skips_them() -> None:
    plain, resnet = (
        stages(build(Network(model=model, blocks=(2, 3), filters=4))) for model in ("plainnet", "resnet")
    )
    for stage, twin in zip(plain, resnet, strict=True):
        assert stage.shape == twin.shape
        assert [item.convolutions for item in stage.blocks] == [item.convolutions for item in twin.blocks]
        assert not any(item.summed or item.projection for item in stage.blocks)
        assert all(item.summed for item in twin.blocks)


def test_many_identical_blocks_are_folded() -> None:
    first, second = stages(build(Network(blocks=(9, 9), filters=4)))
    assert first.folded == [(block(4), 9)]
    assert second.folded == [(block(8, projected=True), 1), (block(8), 8)]
    (short,) = stages(build(Network(blocks=(6,), filters=4)))
    assert short.folded == [(block(4), 1)] * 6
    (long,) = stages(build(Network(blocks=(7,), filters=4)))
    assert long.folded == [(block(4), 7)]


def test_the_picture_says_what_the_network_is(tmp_path: Path, texts: list[tuple[str, Box]]) -> None:
    draw(build(Network()), str(tmp_path / "resnet.png"))
    counts = Counter(text for text, _ in texts)
    assert counts["ResNet, 30 layers"] == 1
    assert counts["15,619,990 parameters, 1,008,407,552 multiply-accumulates an image"] == 1
    # Those of the blocks, and the one before them; each later stage begins with a stride.
    assert counts["3x3, 64"] == 5
    assert (counts["3x3, 128"], counts["3x3, 256"], counts["3x3, 512"]) == (9, 9, 3)
    for filters in (128, 256, 512):
        assert counts[f"3x3, {filters}, stride 2"] == counts[f"1x1, {filters}"] == 1
    assert counts["stride 2"] == 3
    for shape in ("images 32x32x3", "32x32x64", "16x16x128", "8x8x256", "4x4x512", "mean of 4x4"):
        assert counts[shape] == 1
    assert counts["dense, 10"] == 1


def test_a_folded_picture_says_how_often(tmp_path: Path, texts: list[tuple[str, Box]]) -> None:
    network = Network(model="plainnet", blocks=(9, 9, 9), filters=16)
    draw(build(network), str(tmp_path / "plainnet.png"))
    written = [text for text, _ in texts]
    assert "PlainNet, 56 layers" in written
    assert [text for text in written if text.startswith("x ")] == ["x 9", "x 8", "x 8"]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Network(blocks=(1, 2), filters=4), {diagram.IDENTITY, diagram.PROJECTION}),
        (Network(blocks=(2,), filters=4), {diagram.IDENTITY}),
        (Network(blocks=(1, 1, 1), filters=4), {diagram.IDENTITY, diagram.PROJECTION}),
        (Network(model="plainnet", blocks=(1, 2), filters=4), set()),
    ],
    ids=["both", "identity", "projections", "plain"],
)
def test_skip_connections_are_drawn_where_they_are(
    tmp_path: Path, network: Network, expected: set[Any], texts: list[tuple[str, Box]]
) -> None:
    path = tmp_path / "network.png"
    draw(build(network), str(path))
    assert colours(path) & {diagram.IDENTITY, diagram.PROJECTION} == expected
    explained = " ".join(text for text, _ in texts)
    assert ("skip connection" in explained) == (diagram.IDENTITY in expected)
    assert ("projection" in explained) == (diagram.PROJECTION in expected)


def test_identities_are_solid_and_projections_dashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Counter[tuple[Any, bool]] = Counter()
    original = diagram._Pen.path

    def path(pen: diagram._Pen, *points: Any, **options: Any) -> None:
        lines[options.get("fill", diagram.LINE), options.get("dashed", False)] += 1
        original(pen, *points, **options)

    monkeypatch.setattr(diagram._Pen, "path", path)
    draw(build(Network()), str(tmp_path / "resnet.png"))
    # One a block, and one in the legend.
    assert lines[diagram.IDENTITY, False] == 11 + 1
    assert lines[diagram.PROJECTION, True] == 3 + 1
    assert lines[diagram.IDENTITY, True] == lines[diagram.PROJECTION, False] == 0


@pytest.mark.parametrize("model", ["resnet", "plainnet"])
@pytest.mark.parametrize(
    ("blocks", "filters"), [((2, 5, 5, 2), 64), ((9, 9, 9), 16), ((1,), 8), ((1,) * 6, 8), ((8, 1), 128)]
)
def test_texts_lie_in_the_picture_and_apart(
    tmp_path: Path, texts: list[tuple[str, Box]], model: Any, blocks: tuple[int, ...], filters: int
) -> None:
    path = tmp_path / "network.png"
    draw(build(Network(model=model, blocks=blocks, filters=filters)), str(path))
    with Image.open(path) as picture:
        width, height = (side * diagram.DRAWN // diagram.SAVED for side in picture.size)
    for text, (left, top, right, bottom) in texts:
        assert 0 <= left <= right <= width, text
        assert 0 <= top <= bottom <= height, text
    for (one, first), (other, second) in combinations(texts, 2):
        apart = (
            first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        )
        assert apart, f"{one!r} is written over {other!r}"


def test_a_long_text_shrinks_to_the_width_it_has() -> None:
    pen = diagram._Pen(200, 40)
    pen.text((100, 20), "3x3, 16384, stride 2", size=13, width=60)
    written = ImageChops.invert(pen.image).getbbox()
    assert written is not None
    assert 0.9 * 60 <= (written[2] - written[0]) / diagram.DRAWN <= 60


def test_equal_networks_give_equal_small_files(tmp_path: Path) -> None:
    model = build(Network())
    draw(model, str(tmp_path / "first.png"))
    draw(model, str(tmp_path / "new" / "folder" / "second.PNG"))
    first = (tmp_path / "first.png").read_bytes()
    assert (tmp_path / "new" / "folder" / "second.PNG").read_bytes() == first
    assert len(first) < 200_000
    (tmp_path / "first.png").write_bytes(b"old")
    draw(model, str(tmp_path / "first.png"))
    assert (tmp_path / "first.png").read_bytes() == first


@pytest.mark.parametrize("name", ["network.jpg", "network", "network.png.svg"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        draw(build(Network(blocks=(1,), filters=4)), str(tmp_path / name))
    message = str(caught.value)
    assert "must name a .png file" in message
    assert name in message
    assert "example: --diagram network.png" in message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MissingInput, match=r"file: File exists\. Name another place"):
        draw(build(Network(blocks=(1,), filters=4)), str(tmp_path / "file" / "network.png"))
