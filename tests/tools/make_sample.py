"""Write the embedded sample anew: `python tests/tools/make_sample.py data job/data/sample`.

It draws with raw Philox words, so the files come out the same everywhere. `records.SAMPLE` has their digests.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from job.data import sources
from job.data.holdout import draw_balanced
from job.data.records import Split, encode

KEY = 11  # of the Philox stream; another than the hold-out's
PER_CLASS = {"train.bin": 100, "test.bin": 50}


def sample_of(split: Split, per_class: int) -> bytes:
    """Records of ``per_class`` random images of each class, in the order of the full data."""
    chosen = np.sort(draw_balanced(split.labels, per_class, key=KEY), axis=None)
    return encode(Split(split.images[chosen], split.labels[chosen]))


def main(source: str, target: str) -> None:
    """Write both files into the folder ``target`` and print their digests."""
    data = sources.load(source)
    for name, split in {"train.bin": data.train, "test.bin": data.test}.items():
        records = sample_of(split, PER_CLASS[name])
        Path(target, name).write_bytes(records)
        print(name, len(records), hashlib.sha256(records).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
