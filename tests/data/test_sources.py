"""Records, checksums, splits and grids, on the embedded sample and on small archives made here."""

import gzip
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

from job.data import grid, holdout, npm, records, sources
from job.domain.errors import InvalidData, MissingInput, PermissionRefused, UsageError

ROOT = Path(__file__).parents[2]
SAMPLE_SHA256 = "32cdc9708ee60b9268464fcd2ff3c9d2f346a82e5d3b7928e07f47e3f6b9e54b"


@pytest.fixture(scope="module")
def sample() -> records.Dataset:
    return sources.load("sample")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A binary folder, complete and right by the sample's digests."""
    folder = tmp_path / "data" / records.FOLDER
    folder.mkdir(parents=True)
    for file in records.SAMPLE:
        (folder / file.name).write_bytes((records.SAMPLE_FOLDER / file.name).read_bytes())
    return folder


def pack(folder: Path, *extra: tarfile.TarInfo) -> Path:
    """An archive like the official one, with further members in front."""
    archive = folder.parent / "archive.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
        tar.add(folder, records.FOLDER)
    return archive


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def test_a_record_is_a_label_and_three_planes() -> None:
    red, green, blue = np.arange(1024) % 251, np.arange(1024) % 13, np.full(1024, 200)
    data = bytes([7]) + np.concatenate([red, green, blue]).astype(np.uint8).tobytes()
    split = records.decode(data)
    assert split.images.shape == (1, 32, 32, 3)
    assert (str(split.images.dtype), str(split.labels.dtype)) == ("uint8", "int32")
    assert split.labels.tolist() == [7]
    row, column = 5, 9
    pixel = 32 * row + column
    assert split.images[0, row, column].tolist() == [pixel % 251, pixel % 13, 200]
    assert records.encode(split) == data


def test_sample_is_real_balanced_and_pinned(sample: records.Dataset) -> None:
    assert sample.train.images.shape == (1000, 32, 32, 3)
    assert sample.test.images.shape == (500, 32, 32, 3)
    assert np.bincount(sample.train.labels).tolist() == [100] * 10
    assert np.bincount(sample.test.labels).tolist() == [50] * 10
    assert sample.sha256 == SAMPLE_SHA256
    means = sample.train.images.mean(axis=(0, 1, 2))
    assert means == pytest.approx([126.1, 123.9, 115.0], abs=3)  # of all 50,000: 125.3, 123.0, 113.9
    assert "Krizhevsky" in (records.SAMPLE_FOLDER / "NOTICE").read_text()


def test_fingerprint_is_the_digest_of_the_digests() -> None:
    joined = "".join(file.sha256 for file in records.SAMPLE)
    assert records.fingerprint(records.SAMPLE) == hashlib.sha256(joined.encode()).hexdigest()
    assert records.fingerprint(records.OFFICIAL) == (
        "9a5bcfec531a52ec23c8b757ae038db2a9db1b0c869b7da8543f4cd0cfb14034"
    )


def test_folder_its_parent_and_archive_give_the_same_data(folder: Path, sample: records.Dataset) -> None:
    for source in (folder, folder.parent, pack(folder, member(f"{records.FOLDER}/readme.html", size=9))):
        data = sources.load(str(source), files=records.SAMPLE)
        assert data.sha256 == sample.sha256
        assert np.array_equal(data.train.images, sample.train.images)
        assert np.array_equal(data.test.labels, sample.test.labels)


def test_training_files_are_joined_in_their_order(tmp_path: Path, sample: records.Dataset) -> None:
    whole = records.encode(sample.train)
    parts = {f"{i}.bin": whole[i * 10 * records.RECORD :][: 10 * records.RECORD] for i in range(3)}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    files = tuple(
        records.RecordFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in parts.items()
    )
    loaded = sources.load(str(tmp_path), files=files)
    assert np.array_equal(loaded.train.images, sample.train.images[:20])
    assert np.array_equal(loaded.test.images, sample.train.images[20:30])


def altered(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


def with_label_10(data: bytes) -> bytes:
    return data[: 3 * records.RECORD] + b"\x0a" + data[3 * records.RECORD + 1 :]


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
        sources.load(str(source), files=records.SAMPLE)
    assert f"test.bin of {source}" in str(caught.value)
    assert rule in str(caught.value)
    assert received in str(caught.value)
    good, bad = sources.verify(str(source), files=records.SAMPLE)
    assert (good.name, good.size, good.problem) == ("train.bin", 3_073_000, None)
    assert str(good) == f"train.bin          3,073,000 bytes  sha256 {records.SAMPLE[0].sha256}  OK"
    assert bad.size == len(file.read_bytes())
    assert bad.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert rule in (bad.problem or "")


def test_other_data_than_the_official_is_refused(folder: Path) -> None:
    (folder / "train.bin").rename(folder / "data_batch_1.bin")
    with pytest.raises(InvalidData, match=r"data_batch_1\.bin of .* must be 30,730,000 bytes"):
        sources.load(str(folder))


def test_missing_things_are_named(folder: Path) -> None:
    absent = folder / "absent"
    with pytest.raises(MissingInput, match=f"{absent} does not exist.*data fetch"):
        sources.load(str(absent))
    with pytest.raises(MissingInput, match=f"{absent} does not exist"):
        sources.verify(str(absent))
    (folder / "test.bin").unlink()
    for source in (folder, pack(folder)):
        with pytest.raises(
            MissingInput,
            match=f"test.bin is missing in {source}; this job trains on CIFAR-10 only, in its binary version",
        ):
            sources.load(str(source), files=records.SAMPLE)
    report = sources.verify(str(folder), files=records.SAMPLE)[1]
    assert (report.size, report.sha256) == (None, None)
    assert str(report) == "test.bin                   - bytes  sha256 -  is missing"


def test_unreadable_files_are_a_permission_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read a file of any mode
    with pytest.raises(PermissionRefused, match=r"train\.bin: Permission denied"):
        sources.load(str(folder), files=records.SAMPLE)


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        (member("../evil.bin", size=3), "must lie inside cifar-10-batches-bin/"),
        (member(f"{records.FOLDER}/../../evil.bin", size=3), "must lie inside"),
        (member("/tmp/evil.bin", size=3), "must lie inside"),
        (member("other/train.bin", size=3), "must lie inside"),
        (member("train.bin", size=3), "must lie inside"),
        (member(f"{records.FOLDER}/train.bin", tarfile.SYMTYPE, "/etc/passwd"), "no link"),
        (member(f"{records.FOLDER}/evil", tarfile.LNKTYPE, "../../evil.bin"), "no link"),
        (member(f"{records.FOLDER}/fifo", tarfile.FIFOTYPE), "no device"),
        (member(f"{records.FOLDER}/big", size=(64 << 20) + 1), "larger than 67,108,864 bytes"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_unsafe_archives_are_refused(folder: Path, extra: tarfile.TarInfo, rule: str) -> None:
    archive = pack(folder, extra)
    before = sorted(folder.parents[1].rglob("*"))
    with pytest.raises(InvalidData) as caught:
        sources.load(str(archive), files=records.SAMPLE)
    assert str(archive) in str(caught.value)
    assert rule in str(caught.value)
    assert f"received {extra.name!r}" in str(caught.value)
    assert sorted(folder.parents[1].rglob("*")) == before


def test_an_archive_whose_headers_hold_no_numbers_is_damaged(folder: Path) -> None:
    extra = member(f"{records.FOLDER}/train.bin", size=3)
    extra.pax_headers = {"GNU.sparse.size": "x"}
    with pytest.raises(InvalidData, match=r"must be a whole \.tar\.gz archive"):
        sources.load(str(pack(folder, extra)), files=records.SAMPLE)


def test_what_a_mac_adds_to_an_archive_is_passed_over(folder: Path, sample: records.Dataset) -> None:
    extra = [
        f"._{records.FOLDER}",
        f"{records.FOLDER}/._train.bin",
        "__MACOSX/x",
        f"{records.FOLDER}/.DS_Store",
    ]
    archive = pack(folder, *(member(name, size=9) for name in extra))
    assert sources.load(str(archive), files=records.SAMPLE).sha256 == sample.sha256


def test_an_uncompressed_archive_is_read(folder: Path, sample: records.Dataset) -> None:
    with gzip.open(pack(folder)) as stream:
        (folder.parent / "plain.TAR").write_bytes(stream.read())
    assert sources.load(str(folder.parent / "plain.TAR"), files=records.SAMPLE).sha256 == sample.sha256


def test_another_data_set_is_told_what_this_job_trains_on(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, member("cifar-100-binary/train.bin", size=9))
    with pytest.raises(InvalidData, match="this job trains on CIFAR-10 only"):
        sources.load(str(archive), files=records.SAMPLE)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(MissingInput, match="this job trains on CIFAR-10 only"):
        sources.load(str(tmp_path / "pictures"))


def test_what_a_source_holds_is_known_before_it_is_read() -> None:
    assert sources.digest_of("sample") == SAMPLE_SHA256
    assert (
        sources.digest_of("absent")
        == sources.digest_of("gs://bucket/x")
        == records.fingerprint(records.OFFICIAL)
    )


def test_a_mistyped_sample_is_named(tmp_path: Path) -> None:
    sources.require("sample")
    sources.require("gs://bucket/data")
    sources.require(str(tmp_path))
    with pytest.raises(MissingInput, match="smaple does not exist; did you mean 'sample', the embedded data"):
        sources.require("smaple")
    with pytest.raises(MissingInput, match="else does not exist; give 'sample'"):
        sources.require("else")


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
        sources.load(str(archive), files=records.SAMPLE)
    assert str(archive) in str(caught.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidData, match=r"notes\.txt: must be a whole \.tar\.gz archive"):
        sources.load(str(tmp_path / "notes.txt"))


def test_pictures_become_records(sample: records.Dataset) -> None:
    images, labels = sample.test.images[:7], sample.test.labels[:7]
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(7, 1024, 3)).save(buffer, "PNG")
    expected = (records.SAMPLE_FOLDER / "test.bin").read_bytes()[: 7 * records.RECORD]
    assert npm.convert(buffer.getvalue(), labels.tolist()) == expected
    with pytest.raises(ValueError, match="must match exactly"):
        npm.convert(buffer.getvalue(), labels.tolist()[:6])


def test_balanced_draws_are_golden() -> None:
    labels = np.tile(np.arange(10, dtype=np.int32), 4)
    drawn = holdout.draw_balanced(labels, 2, key=0)
    assert drawn.shape == (10, 2)
    assert (labels[drawn] == np.arange(10)[:, None]).all()
    assert drawn[:, 0].tolist() == [0, 21, 2, 13, 4, 25, 16, 17, 38, 9]
    assert drawn[:, 1].tolist() == [20, 11, 32, 33, 34, 35, 36, 37, 8, 39]
    assert not np.array_equal(drawn, holdout.draw_balanced(labels, 2, key=1))
    for wrong in (0, 5, -1):
        with pytest.raises(UsageError, match=f"must be 1 to 4, received {wrong}; try 4"):
            holdout.draw_balanced(labels, wrong, key=0)


def test_holdout_is_balanced_fixed_and_ordered(sample: records.Dataset) -> None:
    rest, held = holdout.split_holdout(sample.train, 20)
    assert np.bincount(held.labels).tolist() == [2] * 10
    assert np.bincount(rest.labels).tolist() == [98] * 10
    golden = [35, 117, 299, 312, 332, 463, 493, 523, 525, 586]
    golden += [628, 649, 652, 813, 850, 937, 942, 965, 992, 994]
    kept = np.delete(np.arange(1000), golden)
    assert np.array_equal(held.images, sample.train.images[golden])
    assert np.array_equal(held.labels, sample.train.labels[golden])
    assert np.array_equal(rest.images, sample.train.images[kept])
    assert np.array_equal(rest.labels, sample.train.labels[kept])


def test_holdout_ignores_the_global_random_state(sample: records.Dataset) -> None:
    np.random.seed(1)
    first = holdout.split_holdout(sample.train, 100)[1]
    np.random.seed(2)
    assert np.array_equal(holdout.split_holdout(sample.train, 100)[1].images, first.images)


@pytest.mark.parametrize("count", [-10, 0, 5, 15, 1000, 1010])
def test_impossible_holdouts_are_refused(sample: records.Dataset, count: int) -> None:
    with pytest.raises(UsageError) as caught:
        holdout.split_holdout(sample.train, count)
    assert "divisible by 10 (classes), positive and at most 990" in str(caught.value)
    assert f"received {count}; try 100" in str(caught.value)
    assert holdout.split_holdout(sample.train, 990)[0].labels.shape == (10,)


def test_grid_has_a_row_of_random_images_for_each_class(sample: records.Dataset) -> None:
    drawn = grid.class_grid(sample.train, per_class=3, seed=4)
    cell = 64 + 6
    assert drawn.shape == (6 + 10 * cell, 6 + 3 * cell, 3)
    assert drawn.dtype == np.uint8
    seen = set()
    for row in range(10):
        for column in range(3):
            top, left = 6 + row * cell, 6 + column * cell
            image = drawn[top : top + 64 : 2, left : left + 64 : 2]
            same = (sample.train.images == image).all(axis=(1, 2, 3))
            assert sample.train.labels[same].tolist() == [row]
            seen.add(int(np.argmax(same)))
        assert (drawn[row * cell : row * cell + 6] == 255).all()
    assert len(seen) == 30
    assert np.array_equal(drawn, grid.class_grid(sample.train, per_class=3, seed=4))
    assert not np.array_equal(drawn, grid.class_grid(sample.train, per_class=3, seed=5))


def test_saved_grid_names_the_classes(sample: records.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    grid.save_grid(path, sample.train, per_class=2, seed=4)
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    drawn = grid.class_grid(sample.train, per_class=2, seed=4)
    assert np.array_equal(pixels[:, -drawn.shape[1] :], drawn)
    names = pixels[:, : -drawn.shape[1]]
    for row in np.array_split(names, 10):
        dark = row.min(axis=2) < 100
        assert dark.sum() > 50
        assert not dark[:, :4].any()  # none is cut off
    with pytest.raises(UsageError, match=r"must end in \.png, received 'grid\.gif'"):
        grid.save_grid("grid.gif", sample.train)


def test_import_is_light() -> None:
    heavy = ("tensorflow", "PIL", "google.cloud")
    code = f"import sys, job.data.sources; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_make_sample_draws_balanced_records_in_order(sample: records.Dataset) -> None:
    script = runpy.run_path(str(ROOT / "tests/tools/make_sample.py"))
    drawn = records.decode(script["sample_of"](sample.train, 5))
    assert np.bincount(drawn.labels).tolist() == [5] * 10
    positions = [int(np.argmax((sample.train.images == image).all(axis=(1, 2, 3)))) for image in drawn.images]
    assert positions == sorted(set(positions))
