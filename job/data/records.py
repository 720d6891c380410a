"""CIFAR-10's records: from the official binary files to arrays and back, and the digests that name them.

A record is 1 label byte and 3,072 pixel bytes: the red, green and blue planes of a 32x32 picture. Each file's
SHA-256 is known, so any mirror can be trusted and nothing unverified is ever used. There is no pickle.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from job.domain.errors import InvalidData, MissingInput

RECORD = 1 + 3 * 32 * 32  # bytes
FOLDER = "cifar-10-batches-bin"
ONLY = "this job trains on CIFAR-10 only, in its binary version"
FETCH_HINT = "`python -m job data fetch --to FOLDER` brings the official files"


@dataclass(frozen=True)
class RecordFile:
    """What a file of records must be."""

    name: str
    size: int  # bytes
    sha256: str


Files = tuple[RecordFile, ...]  # the training files in their order, then the test file

OFFICIAL: Files = tuple(
    RecordFile(name, 10_000 * RECORD, sha256)
    for name, sha256 in (
        ("data_batch_1.bin", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        ("data_batch_2.bin", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        ("data_batch_3.bin", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        ("data_batch_4.bin", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        ("data_batch_5.bin", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        ("test_batch.bin", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    )
)
SAMPLE: Files = (
    RecordFile(
        "train.bin", 1_000 * RECORD, "8bd82cbed4655bf6d14cdffc537277e96a28652600a7709b04105646a1241962"
    ),
    RecordFile("test.bin", 500 * RECORD, "446f9fe9aa5a0e780c278ffac24b7fef79bb9cc47fee0908fc22a09d6aa4cb38"),
)
SAMPLE_FOLDER = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Split:
    """Images with their labels."""

    images: NDArray[np.uint8]  # [N, 32, 32, 3]
    labels: NDArray[np.int32]  # [N], 0 to 9


@dataclass(frozen=True)
class Dataset:
    """Training and test images, and one digest that names exactly these bytes."""

    train: Split
    test: Split
    sha256: str  # see `fingerprint`


def fingerprint(files: Files) -> str:
    """SHA-256 over the files' hex digests, concatenated in order: a run's data SHA-256."""
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def data_name(sha256: str) -> str:
    """``sample``, ``CIFAR-10`` or, of other data, their fingerprint itself."""
    return {fingerprint(SAMPLE): "sample", fingerprint(OFFICIAL): "CIFAR-10"}.get(sha256, sha256)


def decode(data: bytes) -> Split:
    """Records to arrays."""
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), records[:, 0].astype(np.int32))


def encode(split: Split) -> bytes:
    """Arrays to records; the inverse of `decode`."""
    pixels = split.images.transpose(0, 3, 1, 2).reshape(-1, RECORD - 1)
    return np.concatenate([split.labels.astype(np.uint8)[:, None], pixels], axis=1).tobytes()


def join_splits(files: Files, splits: dict[str, Split]) -> Dataset:
    """The data set of verified files, their images by name; the training files are joined in their order."""
    *train, test = (splits[file.name] for file in files)
    images = np.concatenate([part.images for part in train])
    return Dataset(Split(images, np.concatenate([part.labels for part in train])), test, fingerprint(files))


def checked(file: RecordFile, data: bytes | None, source: str) -> bytes:
    """Return the bytes of a file if they are what they must be."""
    if data is None:
        raise MissingInput(f"{file.name} is missing in {source}; {ONLY}: {FETCH_HINT}")
    if rule := fault(file, data):
        raise InvalidData(f"{file.name} of {source} {rule}; {FETCH_HINT}")
    return data


def fault(file: RecordFile, data: bytes) -> str | None:
    """The first rule that the bytes break, with the value received."""
    if len(data) != file.size:
        return f"must be {file.size:,} bytes, received {len(data):,}"
    labels = np.frombuffer(data, np.uint8)[::RECORD]
    if labels.max() > 9:
        record = int(np.argmax(labels > 9))
        return f"must hold labels from 0 to 9, received {labels[record]} in record {record}"
    received = hashlib.sha256(data).hexdigest()
    return None if received == file.sha256 else f"must have SHA-256 {file.sha256}, received {received}"
