"""The two networks as plain numbers: kind, blocks and filters, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from job.domain.errors import UsageError

IMAGE_SIZE = 32  # pixels, height and width of a CIFAR-10 image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASS_COUNT = len(CLASSES)

Model = Literal["resnet", "plainnet"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Shape of a ResNet or of its twin without skip connections.

    ``blocks[i]`` residual blocks of two convolutions make stage i; its filters double with every stage
    and all stages but the first halve the map.
    """

    model: Model = "resnet"
    blocks: tuple[int, ...] = (2, 5, 5, 2)  # the article's
    filters: int = 64  # in the first stage; the article's

    def __post_init__(self) -> None:
        if self.model not in ("resnet", "plainnet"):
            raise UsageError(
                f"the model must be resnet or plainnet, not {self.model!r}; example: --model resnet"
            )
        if not self.blocks or min(self.blocks) < 1:
            raise UsageError(
                f"every stage needs at least 1 block, but blocks are {self.blocks_text!r}; example: "
                f"--blocks 3,3,3"
            )
        most = int(math.log2(IMAGE_SIZE)) + 1
        if len(self.blocks) > most:
            raise UsageError(
                f"each stage after the first halves the {IMAGE_SIZE}x{IMAGE_SIZE} map, so at most "
                f"{most} stages "
                f"keep it at one pixel or more, but blocks are {self.blocks_text!r}; example: "
                f"--blocks 2,5,5,2"
            )
        if self.filters < 1:
            raise UsageError(f"filters must be at least 1, not {self.filters}; example: --filters 16")

    @property
    def layers(self) -> int:
        """Convolutions on the main path plus the dense layer: the field's "ResNet-30"."""
        return 2 * sum(self.blocks) + 2

    @property
    def parameters(self) -> int:
        """Variables of the network, the moving statistics among them; Keras counts the same."""
        normalization = 4  # scale, offset, mean and variance of each channel
        inputs = self.filters
        total = 3 * normalization + 9 * 3 * inputs + inputs * (1 + normalization)
        for stage, count in enumerate(self.blocks):
            outputs = self.filters << stage
            for index in range(count):
                total += 9 * (inputs + outputs) * outputs + 2 * outputs * (1 + normalization)
                if self.model == "resnet" and stage > 0 and index == 0:
                    total += inputs * outputs + outputs
                inputs = outputs
        return total + (inputs + 1) * CLASS_COUNT

    @property
    def final_map(self) -> int:
        """Pixels along one side of the last stage's map, the pooling window."""
        return IMAGE_SIZE >> (len(self.blocks) - 1)

    @property
    def blocks_text(self) -> str:
        """As the command line takes them."""
        return ",".join(map(str, self.blocks))
