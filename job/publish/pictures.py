"""Small pictures for TensorBoard, drawn with Pillow alone: the training image carries no plotting library."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# TensorBoard shows an image about 330 pixels wide: narrow cells and large letters stay legible there.
CELL = 44  # pixels, height and width of one cell of the confusion matrix
MARGIN = 112  # pixels left of the matrix, for the longest class name ("automobile")
HEADER = 160  # pixels above it, for the title and the column names
DARK_BLUE = np.array([8, 48, 107], np.float64)  # a class that is always recognized
INK, PAPER = (33, 37, 41), (255, 255, 255)

Font = Any  # Pillow returns one of two font classes that share no public base


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels [height, width, 3] as a PNG file; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def confusion_matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """Draw ``counts[true class][predicted class]`` as a PNG file.

    The shade of a cell is its share of the images of its true class; the number in it is a count. Zeros stay
    empty, so that the confusions stand out.
    """
    matrix = np.asarray(counts, np.int64)  # [classes, classes]
    size = len(names)
    picture = Image.new("RGB", (MARGIN + size * CELL + 12, HEADER + size * CELL + 12), PAPER)
    draw = ImageDraw.Draw(picture)
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    draw.text((12, 8), f"{accuracy:.2%} of {matrix.sum():,} images are right.", INK, _font(20))
    draw.text((12, 32), "Rows: true class. Columns: predicted class.", INK, _font(18))
    _draw_names(picture, draw, names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for row in range(size):
        for column in range(size):
            _draw_cell(draw, row, column, int(matrix[row, column]), float(shares[row, column]))
    return png(np.asarray(picture))


def _draw_names(picture: Image.Image, draw: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
    """Names of the rows before them; names of the columns above them, read from below."""
    for index, name in enumerate(names):
        middle = index * CELL + CELL // 2
        draw.text((MARGIN - 8, HEADER + middle), name, INK, _font(18), anchor="rm")
        label = Image.new("RGB", (MARGIN - 14, CELL), PAPER)
        ImageDraw.Draw(label).text((2, CELL // 2), name, INK, _font(18), anchor="lm")
        picture.paste(label.rotate(90, expand=True), (MARGIN + index * CELL, HEADER - label.width - 2))


def _draw_cell(draw: ImageDraw.ImageDraw, row: int, column: int, count: int, share: float) -> None:
    left, top = MARGIN + column * CELL, HEADER + row * CELL
    # The square root lifts rare confusions above the white of none at all.
    red, green, blue = (255 + (DARK_BLUE - 255) * share**0.5).astype(int)
    draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), (int(red), int(green), int(blue)))
    if count:
        ink = PAPER if share > 0.25 else INK
        draw.text((left + CELL // 2 - 1, top + CELL // 2 - 1), str(count), ink, _font(18), anchor="mm")


def _font(size: float) -> Font:
    return ImageFont.load_default(size)
