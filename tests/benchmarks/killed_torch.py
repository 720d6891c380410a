"""PyTorch with a checkpoint an epoch, as its examples write and read one, to its end: FOLDER IMAGES ..."""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.progress import StepCounter, digest_of, tell_result
from tests.benchmarks.torch_worker import network

TEST_SHARE = 5  # of as many training images, one tests


def generated(count: int) -> TensorDataset:
    return TensorDataset(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (count,))
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("images", type=int)
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--filters", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = generated(options.images), generated(options.images // TEST_SHARE)
    blocks = [int(count) for count in options.blocks.split(",")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network(blocks, options.filters).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    counter, checkpoint = StepCounter(options.folder), Path(options.folder, "checkpoint.pth.tar")
    first = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        first = kept["epoch"]
        model.load_state_dict(kept["state_dict"])
        optimizer.load_state_dict(kept["optimizer"])
    for epoch in range(first, options.epochs):
        model.train()
        for images, labels in DataLoader(train, batch_size=options.batch_size, shuffle=True):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(images.to(device).float()), labels.to(device)).backward()
            optimizer.step()
            counter.did(1)
        evaluate(model, test, device)
        state = {"epoch": epoch + 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, checkpoint)
    tell_result(options.folder, weights=digest_of(map(content, model.state_dict().values())))


def content(values: torch.Tensor) -> bytes:
    """A tensor's bytes; PyTorch's own way needs NumPy."""
    here = values.cpu().contiguous()
    return ctypes.string_at(here.data_ptr(), here.nbytes)


def evaluate(model: torch.nn.Module, test: TensorDataset, device: str) -> float:
    """Accuracy on the test images."""
    model.eval()
    correct = 0
    with torch.inference_mode():
        for images, labels in DataLoader(test, batch_size=250):
            predicted = model(images.to(device).float()).argmax(1).cpu()
            correct += int((predicted == labels).sum())
    return correct / len(test)


if __name__ == "__main__":
    main()
