"""Records, checksums, splits and grids, on the embedded sample and on small archives made here."""

import hashlib
import io
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job import cifar10
from job.errors import InvalidData, MissingInput, PermissionRefused, UsageError

ROOT = Path(__file__).parents[1]
SAMPLE_SHA256 = "32cdc9708ee60b9268464fcd2ff3c9d2f346a82e5d3b7928e07f47e3f6b9e54b"


@pytest.fixture(scope="module")
def sample() -> cifar10.Dataset:
    return cifar10.load("sample")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A binary folder, complete and right by the sample's digests."""
    folder = tmp_path / "data" / cifar10.FOLDER
    folder.mkdir(parents=True)
    for file in cifar10.SAMPLE:
        (folder / file.name).write_bytes((cifar10.SAMPLE_FOLDER / file.name).read_bytes())
    return folder


def pack(folder: Path, *extra: tarfile.TarInfo) -> Path:
    """An archive like the official one, with further members in front."""
    archive = folder.parent / "archive.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
        tar.add(folder, cifar10.FOLDER)
    return archive


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def test_a_record_is_a_label_and_three_planes() -> None:
    red, green, blue = np.arange(1024) % 251, np.arange(1024) % 13, np.full(1024, 200)
    data = bytes([7]) + np.concatenate([red, green, blue]).astype(np.uint8).tobytes()
    split = cifar10.decode(data)
    assert split.images.shape == (1, 32, 32, 3)
    assert (str(split.images.dtype), str(split.labels.dtype)) == ("uint8", "int32")
    assert split.labels.tolist() == [7]
    row, column = 5, 9
    pixel = 32 * row + column
    assert split.images[0, row, column].tolist() == [pixel % 251, pixel % 13, 200]
    assert cifar10.encode(split) == data


def test_sample_is_real_balanced_and_pinned(sample: cifar10.Dataset) -> None:
    assert sample.train.images.shape == (1000, 32, 32, 3)
    assert sample.test.images.shape == (500, 32, 32, 3)
    assert np.bincount(sample.train.labels).tolist() == [100] * 10
    assert np.bincount(sample.test.labels).tolist() == [50] * 10
    assert sample.sha256 == SAMPLE_SHA256
    means = sample.train.images.mean(axis=(0, 1, 2))
    assert means == pytest.approx([126.1, 123.9, 115.0], abs=3)  # of all 50,000: 125.3, 123.0, 113.9
    assert "Krizhevsky" in (cifar10.SAMPLE_FOLDER / "NOTICE").read_text()


def test_fingerprint_is_the_digest_of_the_digests() -> None:
    joined = "".join(file.sha256 for file in cifar10.SAMPLE)
    assert cifar10.fingerprint(cifar10.SAMPLE) == hashlib.sha256(joined.encode()).hexdigest()
    assert cifar10.fingerprint(cifar10.OFFICIAL) == (
        "9a5bcfec531a52ec23c8b757ae038db2a9db1b0c869b7da8543f4cd0cfb14034"
    )


def test_folder_its_parent_and_archive_give_the_same_data(folder: Path, sample: cifar10.Dataset) -> None:
    for source in (folder, folder.parent, pack(folder, member(f"{cifar10.FOLDER}/readme.html", size=9))):
        data = cifar10.load(str(source), files=cifar10.SAMPLE)
        assert data.sha256 == sample.sha256
        assert np.array_equal(data.train.images, sample.train.images)
        assert np.array_equal(data.test.labels, sample.test.labels)


def test_training_files_are_joined_in_their_order(tmp_path: Path, sample: cifar10.Dataset) -> None:
    records = cifar10.encode(sample.train)
    parts = {f"{i}.bin": records[i * 10 * cifar10.RECORD :][: 10 * cifar10.RECORD] for i in range(3)}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    files = tuple(
        cifar10.RecordFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in parts.items()
    )
    loaded = cifar10.load(str(tmp_path), files=files)
    assert np.array_equal(loaded.train.images, sample.train.images[:20])
    assert np.array_equal(loaded.test.images, sample.train.images[20:30])


def altered(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


def with_label_10(data: bytes) -> bytes:
    return data[: 3 * cifar10.RECORD] + b"\x0a" + data[3 * cifar10.RECORD + 1 :]


@pytest.mark.parametrize(
    ("change", "rule", "received"),
    [
        (altered, "must have SHA-256 446f9fe9", "received "),
        (lambda data: data[:-1], "must be 1,536,500 bytes", "received 1,536,499"),
        (lambda data: data + b"\0", "must be 1,536,500 bytes", "received 1,536,501"),
        (lambda data: b"", "must be 1,536,500 bytes", "received 0"),
        (with_label_10, "must hold labels from 0 to 9", "received 10 in record 3"),
    ],
    ids=["altered", "truncated", "too long", "empty", "label"],
)
@pytest.mark.parametrize("archived", [False, True])
def test_wrong_files_are_refused(
    folder: Path, change: Callable[[bytes], bytes], rule: str, received: str, archived: bool
) -> None:
    file = folder / "test.bin"
    file.write_bytes(change(file.read_bytes()))
    source = pack(folder) if archived else folder
    with pytest.raises(InvalidData) as caught:
        cifar10.load(str(source), files=cifar10.SAMPLE)
    assert f"test.bin of {source}" in str(caught.value)
    assert rule in str(caught.value)
    assert received in str(caught.value)
    good, bad = cifar10.verify(str(source), files=cifar10.SAMPLE)
    assert (good.name, good.size, good.problem) == ("train.bin", 3_073_000, None)
    assert str(good) == f"train.bin          3,073,000 bytes  sha256 {cifar10.SAMPLE[0].sha256}  OK"
    assert bad.size == len(file.read_bytes())
    assert bad.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert rule in (bad.problem or "")


def test_other_data_than_the_official_is_refused(folder: Path) -> None:
    (folder / "train.bin").rename(folder / "data_batch_1.bin")
    with pytest.raises(InvalidData, match=r"data_batch_1\.bin of .* must be 30,730,000 bytes"):
        cifar10.load(str(folder))


def test_missing_things_are_named(folder: Path) -> None:
    absent = folder / "absent"
    with pytest.raises(MissingInput, match=f"{absent} does not exist.*data fetch"):
        cifar10.load(str(absent))
    with pytest.raises(MissingInput, match=f"{absent} does not exist"):
        cifar10.verify(str(absent))
    (folder / "test.bin").unlink()
    for source in (folder, pack(folder)):
        with pytest.raises(
            MissingInput, match=f"test.bin is missing in {source}; the binary version is needed"
        ):
            cifar10.load(str(source), files=cifar10.SAMPLE)
    report = cifar10.verify(str(folder), files=cifar10.SAMPLE)[1]
    assert (report.size, report.sha256) == (None, None)
    assert str(report) == "test.bin                   - bytes  sha256 -  is missing"


def test_unreadable_files_are_a_permission_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read a file of any mode
    with pytest.raises(PermissionRefused, match=r"train\.bin: Permission denied"):
        cifar10.load(str(folder), files=cifar10.SAMPLE)


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        (member("../evil.bin", size=3), "must lie inside cifar-10-batches-bin/"),
        (member(f"{cifar10.FOLDER}/../../evil.bin", size=3), "must lie inside"),
        (member("/tmp/evil.bin", size=3), "must lie inside"),
        (member("other/train.bin", size=3), "must lie inside"),
        (member("train.bin", size=3), "must lie inside"),
        (member(f"{cifar10.FOLDER}/train.bin", tarfile.SYMTYPE, "/etc/passwd"), "no link"),
        (member(f"{cifar10.FOLDER}/evil", tarfile.LNKTYPE, "../../evil.bin"), "no link"),
        (member(f"{cifar10.FOLDER}/fifo", tarfile.FIFOTYPE), "no device"),
        (member(f"{cifar10.FOLDER}/big", size=(64 << 20) + 1), "larger than 67,108,864 bytes"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_unsafe_archives_are_refused(folder: Path, extra: tarfile.TarInfo, rule: str) -> None:
    archive = pack(folder, extra)
    before = sorted(folder.parents[1].rglob("*"))
    with pytest.raises(InvalidData) as caught:
        cifar10.load(str(archive), files=cifar10.SAMPLE)
    assert str(archive) in str(caught.value)
    assert rule in str(caught.value)
    assert f"received {extra.name!r}" in str(caught.value)
    assert sorted(folder.parents[1].rglob("*")) == before


@pytest.mark.parametrize("where", [9, 5_000, 100_000, -20, -3])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "altered"])
def test_damaged_archives_are_refused(folder: Path, where: int, cut: bool) -> None:
    archive = pack(folder)
    data = bytearray(archive.read_bytes())
    if cut:
        del data[where:]
    else:
        data[3 if where == 9 else where] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(InvalidData) as caught:
        cifar10.load(str(archive), files=cifar10.SAMPLE)
    assert str(archive) in str(caught.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidData, match=r"notes\.txt: must be a whole \.tar\.gz archive"):
        cifar10.load(str(tmp_path / "notes.txt"))


def test_pictures_become_records(sample: cifar10.Dataset) -> None:
    images, labels = sample.test.images[:7], sample.test.labels[:7]
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(7, 1024, 3)).save(buffer, "PNG")
    records = (cifar10.SAMPLE_FOLDER / "test.bin").read_bytes()[: 7 * cifar10.RECORD]
    assert cifar10.convert(buffer.getvalue(), labels.tolist()) == records
    with pytest.raises(ValueError, match="must match exactly"):
        cifar10.convert(buffer.getvalue(), labels.tolist()[:6])


def test_balanced_draws_are_golden() -> None:
    labels = np.tile(np.arange(10, dtype=np.int32), 4)
    drawn = cifar10.draw_balanced(labels, 2, key=0)
    assert drawn.shape == (10, 2)
    assert (labels[drawn] == np.arange(10)[:, None]).all()
    assert drawn[:, 0].tolist() == [0, 21, 2, 13, 4, 25, 16, 17, 38, 9]
    assert drawn[:, 1].tolist() == [20, 11, 32, 33, 34, 35, 36, 37, 8, 39]
    assert not np.array_equal(drawn, cifar10.draw_balanced(labels, 2, key=1))
    for wrong in (0, 5, -1):
        with pytest.raises(UsageError, match=f"must be 1 to 4, received {wrong}; try 4"):
            cifar10.draw_balanced(labels, wrong, key=0)


def test_holdout_is_balanced_fixed_and_ordered(sample: cifar10.Dataset) -> None:
    rest, held = cifar10.split_holdout(sample.train, 20)
    assert np.bincount(held.labels).tolist() == [2] * 10
    assert np.bincount(rest.labels).tolist() == [98] * 10
    golden = [35, 117, 299, 312, 332, 463, 493, 523, 525, 586]
    golden += [628, 649, 652, 813, 850, 937, 942, 965, 992, 994]
    kept = np.delete(np.arange(1000), golden)
    assert np.array_equal(held.images, sample.train.images[golden])
    assert np.array_equal(held.labels, sample.train.labels[golden])
    assert np.array_equal(rest.images, sample.train.images[kept])
    assert np.array_equal(rest.labels, sample.train.labels[kept])


def test_holdout_ignores_the_global_random_state(sample: cifar10.Dataset) -> None:
    np.random.seed(1)
    first = cifar10.split_holdout(sample.train, 100)[1]
    np.random.seed(2)
    assert np.array_equal(cifar10.split_holdout(sample.train, 100)[1].images, first.images)


@pytest.mark.parametrize("count", [-10, 0, 5, 15, 1000, 1010])
def test_impossible_holdouts_are_refused(sample: cifar10.Dataset, count: int) -> None:
    with pytest.raises(UsageError) as caught:
        cifar10.split_holdout(sample.train, count)
    assert "divisible by 10 (classes), positive and at most 990" in str(caught.value)
    assert f"received {count}; try 100" in str(caught.value)
    assert cifar10.split_holdout(sample.train, 990)[0].labels.shape == (10,)


def test_grid_has_a_row_of_random_images_for_each_class(sample: cifar10.Dataset) -> None:
    grid = cifar10.class_grid(sample.train, per_class=3, seed=4)
    cell = 64 + 6
    assert grid.shape == (6 + 10 * cell, 6 + 3 * cell, 3)
    assert grid.dtype == np.uint8
    seen = set()
    for row in range(10):
        for column in range(3):
            top, left = 6 + row * cell, 6 + column * cell
            image = grid[top : top + 64 : 2, left : left + 64 : 2]
            same = (sample.train.images == image).all(axis=(1, 2, 3))
            assert sample.train.labels[same].tolist() == [row]
            seen.add(int(np.argmax(same)))
        assert (grid[row * cell : row * cell + 6] == 255).all()
    assert len(seen) == 30
    assert np.array_equal(grid, cifar10.class_grid(sample.train, per_class=3, seed=4))
    assert not np.array_equal(grid, cifar10.class_grid(sample.train, per_class=3, seed=5))


def test_saved_grid_names_the_classes(sample: cifar10.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    cifar10.save_grid(path, sample.train, per_class=2, seed=4)
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    grid = cifar10.class_grid(sample.train, per_class=2, seed=4)
    assert np.array_equal(pixels[:, -grid.shape[1] :], grid)
    names = pixels[:, : -grid.shape[1]]
    for row in np.array_split(names, 10):
        dark = row.min(axis=2) < 100
        assert dark.sum() > 50
        assert not dark[:, :4].any()  # none is cut off
    with pytest.raises(UsageError, match=r"must end in \.png, received 'grid\.gif'"):
        cifar10.save_grid("grid.gif", sample.train)


def test_import_is_light() -> None:
    heavy = ("tensorflow", "PIL", "google.cloud")
    code = f"import sys, job.cifar10; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_make_sample_draws_balanced_records_in_order(sample: cifar10.Dataset) -> None:
    script = runpy.run_path(str(ROOT / "tests/tools/make_sample.py"))
    drawn = cifar10.decode(script["sample_of"](sample.train, 5))
    assert np.bincount(drawn.labels).tolist() == [5] * 10
    positions = [int(np.argmax((sample.train.images == image).all(axis=(1, 2, 3)))) for image in drawn.images]
    assert positions == sorted(set(positions))
