"""A network as a picture: stages as columns, blocks as boxes, skip connections beside them. Pillow alone.

Everything in the picture is read from the built model, so it shows what trains, not what was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers
from PIL import Image, ImageDraw, ImageFont

from job.domain.disk import disk_errors
from job.domain.errors import UsageError
from job.model import networks

# Logical pixels. A picture is drawn at 4 times and saved at 2 times their number: Pillow's lines are jagged.
DRAWN, SAVED = 4, 2
MARGIN, TITLE = 16, 66
BOX, BAR, PADDING = 132, 26, 7  # a block's width, a convolution's height, what is around it
GAP, PLAIN_GAP = 50, 36  # between two blocks, with and without a sum in it
ENTRY = 78  # from a column's top to its first block
SIDE = 74  # right of the blocks, for skip connections
GUTTER = 30  # between two columns, for the way from one to the next
ARC = 38  # from a block's right edge to the upright part of its skip connection
BEND = 9  # radius of a line's corners
FOLD = 7  # so many identical blocks in a row are drawn as one
MOST_FOLDED = 3  # sheets of a folded block's stack

INK, PALE, PAPER, LINE = (33, 37, 41), (108, 117, 125), (255, 255, 255), (73, 80, 87)
IDENTITY, PROJECTION = (11, 95, 165), (200, 60, 10)
COLOURS = ((31, 119, 180), (44, 140, 60), (130, 90, 180), (190, 130, 20), (20, 140, 150), (180, 60, 110))
WEIGHTED = (layers.Conv2D, layers.Dense)

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Convolution:
    """What a picture says of a convolution."""

    size: int  # of the kernel, in pixels along one side
    filters: int
    stride: int

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> Convolution:
        """Read a Conv2D layer."""
        return cls(layer.kernel_size[0], layer.filters, layer.strides[0])

    def __str__(self) -> str:
        """As in ``3x3, 128, stride 2``."""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.size}x{self.size}, {self.filters}{stride}"


@dataclass(frozen=True)
class Block:
    """Two convolutions and what skips them."""

    convolutions: tuple[Convolution, ...]
    summed: bool  # with its input, or with the projection of its input
    projection: Convolution | None


@dataclass(frozen=True)
class Stage:
    """Blocks whose maps have one size."""

    blocks: tuple[Block, ...]
    shape: str  # of the output, as in "16x16x128"

    @property
    def folded(self) -> list[tuple[Block, int]]:
        """Blocks to draw, each with the number of times that it stands there."""
        drawn = []
        for block, same in groupby(self.blocks):
            count = len(list(same))
            drawn += [(block, count)] if count >= FOLD else [(block, 1)] * count
        return drawn


def stages(model: keras.Model) -> list[Stage]:
    """Read the stages of a network of :func:`job.model.networks.build` from its layers."""
    parts: dict[int, dict[int, dict[str, keras.layers.Layer]]] = {}
    for layer in model.layers:
        if match := re.fullmatch(r"stage(\d+)_block(\d+)_(\w+)", layer.name):
            stage, block, part = int(match[1]), int(match[2]), match[3]
            parts.setdefault(stage, {}).setdefault(block, {})[part] = layer
    return [
        Stage(tuple(map(_block, blocks.values())), _shape(list(blocks.values())[-1]["conv2"]))
        for blocks in parts.values()
    ]


def _block(parts: dict[str, keras.layers.Layer]) -> Block:
    projection = Convolution.of(parts["shortcut"]) if "shortcut" in parts else None
    return Block((Convolution.of(parts["conv1"]), Convolution.of(parts["conv2"])), "add" in parts, projection)


def _shape(layer: keras.layers.Layer) -> str:
    return "x".join(str(size) for size in layer.output.shape[1:])


def draw(model: keras.Model, path: str) -> None:
    """Draw a network of :func:`job.model.networks.build` into a PNG file, anew if it exists.

    Raises:
        UsageError: the file's name does not end in .png.
        JobError: the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"--diagram must name a .png file, not {path!r}; example: --diagram network.png")
    picture = _Picture(model).drawn()
    with disk_errors("write", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", optimize=True)


class _Pen:
    """Draws in logical pixels on a canvas of DRAWN times their number."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width * DRAWN), round(height * DRAWN)), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        *,
        fill: Colour,
        line: Colour | None = None,
    ) -> None:
        corners = [value * DRAWN for value in (left, top, left + width, top + height)]
        self._draw.rounded_rectangle(corners, 5 * DRAWN, fill, line, round(1.25 * DRAWN))

    def text(
        self,
        at: Point,
        text: str,
        *,
        size: float = 14,
        fill: Colour = INK,
        anchor: str = "mm",
        width: float = float("inf"),
    ) -> None:
        """One line, smaller where it would be wider than ``width``."""
        size *= min(1.0, width / self.text_width(text, size))
        self._draw.text((at[0] * DRAWN, at[1] * DRAWN), text, fill, self._font(size), anchor)

    def text_width(self, text: str, size: float) -> float:
        return float(self._font(size).getlength(text)) / DRAWN

    @staticmethod
    def _font(size: float) -> Any:
        return ImageFont.load_default(size * DRAWN)

    def path(self, *points: Point, fill: Colour = LINE, dashed: bool = False, arrow: bool = True) -> None:
        """Upright and level lines through the points, with round corners."""
        bent = _bent(points)
        for part in _dashes(bent) if dashed else [bent]:
            scaled = [(x * DRAWN, y * DRAWN) for x, y in part]
            self._draw.line(scaled, fill, round(1.75 * DRAWN), joint="curve")
        if arrow:
            self._arrow_head(points[-2], points[-1], fill)

    def _arrow_head(self, start: Point, tip: Point, fill: Colour) -> None:
        length = abs(tip[0] - start[0]) + abs(tip[1] - start[1])  # the lines are upright or level
        x, y = (tip[0] - start[0]) / length, (tip[1] - start[1]) / length
        base = (tip[0] - 8 * x, tip[1] - 8 * y)
        corners = [tip, (base[0] - 4 * y, base[1] + 4 * x), (base[0] + 4 * y, base[1] - 4 * x)]
        self._draw.polygon([(point[0] * DRAWN, point[1] * DRAWN) for point in corners], fill)

    def sum_sign(self, centre: Point) -> None:
        x, y = (value * DRAWN for value in centre)
        self._draw.circle((x, y), 9 * DRAWN, PAPER, LINE, round(1.75 * DRAWN))
        self.path((centre[0] - 5, centre[1]), (centre[0] + 5, centre[1]), arrow=False)
        self.path((centre[0], centre[1] - 5), (centre[0], centre[1] + 5), arrow=False)


def _bent(points: Sequence[Point]) -> list[Point]:
    """Replace each inner point by a curve from the line before it to the line after it."""
    bent = [points[0]]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        start, end = _towards(corner, before), _towards(corner, after)
        share = np.linspace(0, 1, 9)[:, None]
        weights = np.hstack([(1 - share) ** 2, 2 * share * (1 - share), share**2])  # a quadratic Bezier curve
        bent += [(float(x), float(y)) for x, y in weights @ np.array([start, corner, end])]
    return [*bent, points[-1]]


def _towards(corner: Point, other: Point) -> Point:
    """The point BEND away from the corner, or half way where the line is short."""
    distance = abs(other[0] - corner[0]) + abs(other[1] - corner[1])
    share = min(0.5, BEND / distance)
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])


def _dashes(points: Sequence[Point], period: float = 9, dash: float = 5) -> Iterator[list[Point]]:
    """Pieces of ``dash`` length along the line, one every ``period``."""
    xs, ys = np.array(points).T
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])
    for start in np.arange(0, lengths[-1], period):
        at = np.array([start, min(start + dash, lengths[-1])])
        ends = np.stack([np.interp(at, lengths, xs), np.interp(at, lengths, ys)], axis=1)
        yield [(float(x), float(y)) for x, y in ends]


def _tint(colour: Colour, share: float) -> Colour:
    """Mix a share of the colour into white."""
    red, green, blue = (round(255 + share * (value - 255)) for value in colour)
    return red, green, blue


def _reduced(image: Image.Image) -> Image.Image:
    """Smooth the picture to its final size, in 256 colours: a small file, and exact tints of all areas."""
    return image.reduce(DRAWN // SAVED).quantize(256, dither=Image.Dither.NONE)


class _Picture:
    """Places the parts from left to right: input, stages, classifier."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._stages = stages(model)
        self._summed = any(block.summed for stage in self._stages for block in stage.blocks)
        self._block_height = 2 * BAR + 3 * PADDING
        self._gap, self._side = (GAP, SIDE) if self._summed else (PLAIN_GAP, PADDING)
        tallest = max(len(stage.folded) for stage in self._stages)
        # The input has four boxes of its own.
        flow = max(tallest * (self._block_height + self._gap), 4 * (BAR + 2 * PADDING) + PADDING)
        self._column = 2 * PADDING + BOX + self._side  # width
        self._height = ENTRY + flow
        self._pen = _Pen(self._width, TITLE + self._height + (62 if self._summed else 40))

    @property
    def _width(self) -> float:
        return 2 * MARGIN + 2 * (BOX + GUTTER) + len(self._stages) * (self._column + GUTTER) - GUTTER

    def drawn(self) -> Image.Image:
        """The whole picture."""
        self._draw_title()
        left: float = MARGIN
        end = self._draw_end(left, "input", self._stem())
        left += BOX + GUTTER
        for index, stage in enumerate(self._stages):
            end = self._draw_stage(left, index, stage, end)
            left += self._column + GUTTER
        self._connect(end, left, left + BOX / 2, TITLE + ENTRY)
        self._draw_end(left, "classifier", self._head())
        self._draw_legend()
        return _reduced(self._pen.image)

    def _draw_title(self) -> None:
        weighted = [layer.name for layer in self._model.layers if isinstance(layer, WEIGHTED)]
        depth = sum(not name.endswith("_shortcut") for name in weighted)
        name = "ResNet" if self._summed else "PlainNet"
        work = networks.multiply_accumulates(self._model)
        totals = f"{self._model.count_params():,} parameters, {work:,} multiply-accumulates an image"
        self._pen.text((MARGIN, 26), f"{name}, {depth} layers", size=22, anchor="lm")
        self._pen.text((MARGIN, 50), totals, fill=PALE, anchor="lm")

    def _stem(self) -> list[str]:
        first = next(layer for layer in self._model.layers if isinstance(layer, layers.Conv2D))
        return [f"images {_shape(self._model.layers[0])}", "BN", str(Convolution.of(first)), "ReLU, BN"]

    def _head(self) -> list[str]:
        pool, dense = self._model.get_layer("pool"), self._model.get_layer("logits")
        window = "x".join(map(str, pool.pool_size))
        return [f"mean of {window}", f"dense, {dense.units}", "softmax"]

    def _draw_end(self, left: float, title: str, boxes: Sequence[str]) -> Point:
        """Draw what comes before or after the stages; returns where the way goes on."""
        centre, top = left + BOX / 2, TITLE + ENTRY
        self._pen.text((centre, TITLE + 18), title, size=15)
        for index, text in enumerate(boxes):
            if index:
                self._pen.path((centre, top - 2 * PADDING), (centre, top))
            self._pen.box(left + PADDING, top, BOX - 2 * PADDING, BAR, fill=_tint(LINE, 0.12), line=PALE)
            self._pen.text((centre, top + BAR / 2), text, size=13)
            top += BAR + 2 * PADDING
        return centre, top - 2 * PADDING

    def _draw_stage(self, left: float, index: int, stage: Stage, came_from: Point) -> Point:
        colour = COLOURS[index % len(COLOURS)]
        self._pen.box(left, TITLE, self._column, self._height, fill=_tint(colour, 0.1))
        middle = left + self._column / 2
        self._pen.text((middle, TITLE + 18), f"stage {index + 1}", size=15)
        self._pen.text((middle, TITLE + 38), stage.shape, size=13, fill=PALE)
        centre, top = left + PADDING + BOX / 2, float(TITLE + ENTRY)
        self._connect(came_from, left, centre, top)
        end = top
        for place, (block, count) in enumerate(stage.folded):
            if place:
                self._pen.path((centre, end), (centre, top))
            end = self._draw_block(centre, top, block, count, colour)
            top += self._block_height + self._gap
        return centre, end

    def _connect(self, start: Point, left: float, centre: float, top: float) -> None:
        """Lead the way from the foot of one column through the gutter to the head of the next."""
        gutter, foot, head = left - GUTTER / 2, start[1] + 14, TITLE + ENTRY - 20
        self._pen.path(start, (start[0], foot), (gutter, foot), (gutter, head), (centre, head), (centre, top))

    def _draw_block(self, centre: float, top: float, block: Block, count: int, colour: Colour) -> float:
        """Draw a block and its skip connection; returns the height at which the way goes on."""
        left, bottom = centre - BOX / 2, top + self._block_height
        for sheet in range(min(count, MOST_FOLDED) - 1, -1, -1):
            shift = 4 * sheet
            self._pen.box(left + shift, top + shift, BOX, self._block_height, fill=PAPER, line=colour)
        for index, convolution in enumerate(block.convolutions):
            y = top + PADDING + index * (BAR + PADDING)
            self._pen.box(left + PADDING, y, BOX - 2 * PADDING, BAR, fill=_tint(colour, 0.25))
            self._pen.text((centre, y + BAR / 2), str(convolution), size=13, width=BOX - 3 * PADDING)
        if count > 1:
            self._pen.text((centre - 16, bottom + GAP / 2 - 3), f"x {count}", size=17, anchor="rm")
        if not block.summed:
            return bottom
        plus = bottom + self._gap / 2 - 3
        self._pen.path((centre, bottom), (centre, plus - 9), arrow=False)
        self._draw_skip(centre, top - 12, plus, block.projection)
        self._pen.sum_sign((centre, plus))
        return plus + 9

    def _draw_skip(self, centre: float, start: float, end: float, projection: Convolution | None) -> None:
        x = centre + BOX / 2 + ARC
        fill = PROJECTION if projection else IDENTITY
        points = ((centre, start), (x, start), (x, end), (centre + 9, end))
        self._pen.path(*points, fill=fill, dashed=projection is not None)
        if projection:
            self._draw_projection((x, (start + end) / 2), projection)

    def _draw_projection(self, middle: Point, projection: Convolution) -> None:
        width, height = SIDE - 8, 40
        x, y = middle
        self._pen.box(x - width / 2, y - height / 2, width, height, fill=PAPER, line=PROJECTION)
        for text, shift in zip(str(projection).split(", stride "), (-8, 8), strict=True):
            line = text if shift < 0 else f"stride {text}"
            self._pen.text((x, y + shift), line, size=12, fill=PROJECTION, width=width - PADDING)

    def _draw_legend(self) -> None:
        x, y = float(MARGIN), TITLE + self._height + 22
        if self._summed:
            x = self._draw_key(x, y, "skip connection: the block's input", IDENTITY, dashed=False)
        if any(block.projection for stage in self._stages for block in stage.blocks):
            self._draw_key(x, y, "projection: a 1x1 convolution of it", PROJECTION, dashed=True)
        y += 22 * self._summed
        follow = "each first convolution and each sum" if self._summed else "each convolution"
        note = f"3x3, 64: convolution, 64 filters.  BN: batch normalization.  ReLU and BN follow {follow}."
        self._pen.text((MARGIN, y), note, size=13, fill=PALE, anchor="lm", width=self._width - 2 * MARGIN)

    def _draw_key(self, x: float, y: float, text: str, fill: Colour, *, dashed: bool) -> float:
        self._pen.path((x, y), (x + 36, y), fill=fill, dashed=dashed)
        self._pen.text((x + 44, y), text, size=13, fill=PALE, anchor="lm")
        return x + 44 + self._pen.text_width(text, 13) + 24
