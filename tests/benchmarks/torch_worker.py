"""The same network in PyTorch, as its users make it fast: channels last, fused Adam, data on device."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.benchmarks.turns import Turns

STEPS = {"cpu": 1, "cuda": 10}  # between two waits for the device


def convolution(inputs: int, outputs: int, size: int = 3, *, halve: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=2 if halve else 1, padding=size // 2)


def normalization(filters: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01)  # Keras's defaults


class Block(nn.Module):
    def __init__(self, inputs: int, filters: int, *, halve: bool) -> None:
        super().__init__()
        self.first = convolution(inputs, filters, halve=halve)
        self.inner = normalization(filters)
        self.second = convolution(filters, filters)
        self.shortcut = convolution(inputs, filters, 1, halve=True) if halve else nn.Identity()
        self.outer = normalization(filters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.inner(functional.relu(self.first(x))))
        return self.outer(functional.relu(self.shortcut(x) + y))


def network(blocks: list[int], filters: int) -> nn.Sequential:
    """From pixels [N, 3, 32, 32] to logits [N, 10]."""
    parts: list[nn.Module] = [
        normalization(3),
        convolution(3, filters),
        nn.ReLU(),
        normalization(filters),
    ]
    width = filters
    for stage, count in enumerate(blocks):
        for block in range(count):
            parts.append(Block(width, filters << stage, halve=stage > 0 and block == 0))
            width = filters << stage
    parts += [nn.AvgPool2d(32 >> (len(blocks) - 1)), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*parts)


class Work:
    """Training steps, or evaluations, of one batch after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._batch_size, self._evaluate = options.batch_size, options.evaluate
        self._bfloat16 = options.precision == "bfloat16"
        blocks = [int(count) for count in options.blocks.split(",")]
        self._network = network(blocks, options.filters).to(self.device, memory_format=torch.channels_last)
        self._network.train(not options.evaluate)
        self._optimizer = torch.optim.Adam(self._network.parameters(), fused=True)
        self._forward: Any = torch.compile(self._loss) if options.compile else self._loss
        self._images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8).to(
            self.device, memory_format=torch.channels_last
        )
        self._labels = torch.randint(0, 10, (options.images,)).to(self.device)
        self._order = torch.randperm(options.images)
        self._next = 0

    def unit(self) -> int:
        """Some steps; how many images they had."""
        steps = STEPS[self.device]
        for _ in range(steps):
            loss = self._evaluate_step() if self._evaluate else self._train_step()
        loss.item()  # waits for the device
        return steps * int(self._batch_size)

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._next + self._batch_size > len(self._order):
            self._order, self._next = torch.randperm(len(self._order)), 0
        chosen = self._order[self._next : self._next + self._batch_size].to(self.device)
        self._next += self._batch_size
        return self._images[chosen], self._labels[chosen]

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self._bfloat16):
            return functional.cross_entropy(self._network(images.float()), labels)

    def _train_step(self) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = self._forward(*self._batch())
        loss.backward()
        self._optimizer.step()
        return loss

    def _evaluate_step(self) -> torch.Tensor:
        with torch.inference_mode():
            loss: torch.Tensor = self._forward(*self._batch())
            return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--filters", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    work = Work(parser.parse_args())
    turns = Turns(device_memory=work.device_memory)
    while turns.did(work.unit()):
        pass


if __name__ == "__main__":
    main()
