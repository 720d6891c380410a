"""A picture of the data: random images of each class, a row each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from job.data.holdout import draw_balanced
from job.data.records import Split
from job.domain.disk import disk_errors
from job.domain.errors import UsageError
from job.domain.network import CLASSES

GRID_SCALE = 2  # screen pixels per image pixel
GRID_GAP = 6  # pixels of white between two images
GRID_NAMES = 120  # pixels left of the grid, for the longest class name


def class_grid(split: Split, per_class: int = 10, seed: int = 0) -> NDArray[np.uint8]:
    """A picture [height, width, 3] with a row of random images for each class, on white."""
    chosen = split.images[draw_balanced(split.labels, per_class, key=seed)]  # [10, per_class, 32, 32, 3]
    cells = chosen.repeat(GRID_SCALE, axis=2).repeat(GRID_SCALE, axis=3)
    cells = np.pad(cells, ((0, 0), (0, 0), (0, GRID_GAP), (0, GRID_GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = cells.shape
    picture = cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    return np.pad(picture, ((GRID_GAP, 0), (GRID_GAP, 0), (0, 0)), constant_values=255)


def save_grid(path: str | Path, split: Split, per_class: int = 10, seed: int = 0) -> None:
    """Write `class_grid` with the classes' names as a PNG file, anew if it exists."""
    from PIL import Image, ImageDraw, ImageFont

    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"the picture's name must end in .png, received {str(path)!r}; try grid.png")
    grid = Image.fromarray(class_grid(split, per_class, seed))
    picture = Image.new("RGB", (GRID_NAMES + grid.width, grid.height), "white")
    picture.paste(grid, (GRID_NAMES, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    row = grid.height / len(CLASSES)
    for index, name in enumerate(CLASSES):
        draw.text((GRID_NAMES - 8, (index + 0.5) * row), name, "black", font, anchor="rm")
    with disk_errors("write", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG")
