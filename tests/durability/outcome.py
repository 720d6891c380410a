"""What a finished run holds, read without our code and without TensorFlow, to compare bit for bit."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import h5py
from tensorboard.compat.proto import event_pb2

from job.publish.publication import MODEL, RESULT
from job.run.reader import read_record
from job.store.contract import Store
from tests.durability.verdicts import check_is_complete, without_times

TIMED_TAGS = {"training/images_per_second"}
RESULTS_OF_A_PROCESS = {"time", "peak_memory_bytes", "seconds", "images_per_second", "program"}


@dataclass(frozen=True)
class Outcome:
    """Everything that must not depend on what happened on the way."""

    arrays: dict[str, tuple[str, bytes]]  # weights and optimizer: type and bytes of each
    loss_scale: tuple[float, int]
    history: Any
    confusion: Any
    result: dict[str, Any]
    scalars: dict[tuple[str, str, int], bytes]  # by folder, tag and step


def outcome(store: Store) -> Outcome:
    """Read a run that must be complete and sound."""
    check_is_complete(store)
    record = read_record(store)
    assert record.finished is not None
    return Outcome(
        arrays(store.read(MODEL)),
        (record.commits[0].progress.loss_scale, record.commits[0].progress.finite_steps),
        without_times(record.history),
        record.confusion,
        {key: value for key, value in record.finished.result.items() if key not in RESULTS_OF_A_PROCESS},
        scalars(store),
    )


def check_same_outcome(store: Store, reference: Outcome) -> None:
    """Equal bit for bit, and named where not."""
    mine = outcome(store)
    assert mine.arrays.keys() == reference.arrays.keys()
    different = [name for name, array in mine.arrays.items() if array != reference.arrays[name]]
    assert not different, f"other bits in {different}"
    for part in ("loss_scale", "history", "confusion", "result", "scalars"):
        one, other = getattr(mine, part), getattr(reference, part)
        assert one == other, f"another {part}: {one} instead of {other}"
    assert RESULT in {entry.name for entry in store.list()}


def arrays(keras_file: bytes) -> dict[str, tuple[str, bytes]]:
    """Return every array of a ``.keras`` file: weights, moving statistics, and the optimizer's."""
    with zipfile.ZipFile(io.BytesIO(keras_file)) as archive:
        weights = io.BytesIO(archive.read("model.weights.h5"))
    found: dict[str, tuple[str, bytes]] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (str(item.dtype), item[()].tobytes())

    with h5py.File(weights) as file:
        file.visititems(keep)
    assert any(name.startswith("optimizer") for name in found)
    return found


def scalars(store: Store) -> dict[tuple[str, str, int], bytes]:
    """Return every scalar event. Each (folder, tag, step), of any kind, must be there exactly once."""
    seen: Counter[tuple[str, str, int]] = Counter()
    values: dict[tuple[str, str, int], bytes] = {}
    for entry in store.list():
        folder, _, name = entry.name.rpartition("/")
        if "tfevents" not in name:
            continue
        for event in events(store.read(entry.name)):
            for value in event.summary.value:
                key = (folder, value.tag, event.step)
                seen[key] += 1
                if value.metadata.plugin_data.plugin_name == "scalars" and value.tag not in TIMED_TAGS:
                    values[key] = value.tensor.SerializeToString(deterministic=True)
    twice = [key for key, count in seen.items() if count > 1]
    assert not twice, f"more than once: {twice}"
    return values


def extended_from(shorter: Outcome, longer: Outcome) -> Outcome:
    """What a run holds that was finished twice: all of the longer training, and the end of the shorter."""
    ends = {key: value for key, value in shorter.scalars.items() if key[1].startswith("recalibrated_")}
    assert ends
    return replace(longer, scalars=longer.scalars | ends)


def events(data: bytes) -> list[Any]:
    """Parse TensorBoard's record format: length, its checksum, data, its checksum."""
    found, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        body = data[position + 12 : position + 12 + length]
        (checksum,) = struct.unpack_from("<I", data, position + 12 + length)
        rotated = google_crc32c.value(body)
        assert checksum == (((rotated >> 15) | (rotated << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        found.append(event_pb2.Event.FromString(body))
        position += 16 + length
    return found
