"""A run's record: what is known of it, as values and as the JSON that a store holds.

Every revision of the record is an object of its own; the newest is the record (see ``job.run.record_log``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from job.domain.account import Spent, account_of
from job.domain.errors import InvalidData

RECORD_FORMAT = 2
STATES = ("running", "interrupted", "diverged", "complete")
LATER: Mapping[str, Any] = {"later": True}  # of a field that a record of an earlier version may lack


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training has come, with the sums of the epoch under way, so that it can go on in mid-epoch."""

    step: int = 0  # optimizer steps in all
    epoch: int = 0  # epochs complete, and that many entries of the history
    batch: int = 0  # steps done in the epoch under way
    loss_sum: float = 0.0  # over the epoch's images so far; float64, added in step order
    correct: int = 0
    images: int = 0
    loss_scale: float = 0.0  # float16 only
    finite_steps: int = 0  # since the loss scale changed


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long training has taken, in seconds of the loop's own clock."""

    epoch: float = 0.0  # training calls of the epoch under way
    total: float = 0.0  # training and evaluation since the run began
    timed_images: int = 0  # of this epoch, without each attempt's first call, which traces and compiles
    timed: float = 0.0  # the seconds that these took
    # Since the run began, without the first calls of each attempt, as its account counts them:
    trained: float = field(default=0.0, metadata=LATER)
    evaluated: float = field(default=0.0, metadata=LATER)

    @property
    def images_per_second(self) -> float:
        """Of the epoch under way; 0 where nothing is timed yet."""
        return self.timed_images / self.timed if self.timed else 0.0


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A checkpoint that can be restored."""

    name: str
    size: int  # bytes
    crc32c: int
    progress: Progress
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A result, which stays while a longer training goes on."""

    epochs: int
    result: dict[str, Any]  # content of result.json
    commit: Commit | None  # becomes model.keras; None where only the results of a run are kept


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process of an attempt, and the program that it ran."""

    attempt: int
    began: float  # seconds since 1970, by its own clock
    host: str
    process: str  # boot, process id and start time, which no other process of the host has
    version: str  # of this program
    revision: str | None  # of its source, where that is known
    spent: Spent | None = field(default=None, metadata=LATER)  # until its newest revision


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run's newest revision says."""

    attempt: int = 0
    nonce: str = ""  # of the attempt: two attempts never write equal records
    revision: int = 0
    written: float = 0.0  # seconds since 1970, by the owner's clock: its last sign of life
    state: str = "running"  # one of STATES
    epochs: int = 0  # that the newest attempt was asked for
    commits: tuple[Commit, ...] = ()  # newest first
    history: tuple[dict[str, Any], ...] = ()  # one entry an epoch
    confusion: list[list[int]] | None = None  # of the last validation
    finished: Finished | None = None
    owners: tuple[Owner, ...] = ()  # one an attempt, the newest last

    @property
    def restorable(self) -> tuple[Commit, ...]:
        """Commits in the order in which they are tried, the finished one last."""
        finished = (self.finished.commit,) if self.finished and self.finished.commit else ()
        return tuple(dict.fromkeys((*self.commits, *finished)))

    def with_spent(self, spent: Spent) -> Record:
        """The same, with the time that its newest attempt has spent."""
        return replace(self, owners=(*self.owners[:-1], replace(self.owners[-1], spent=spent)))

    def account(self, timing: Timing | None = None) -> dict[str, Any] | None:
        """Where the time went of all attempts that noted it, by default as of the newest commit.

        As :func:`job.domain.account.account_of` has it.
        """
        timing = timing or next((commit.timing for commit in self.restorable), Timing())
        spent = [owner.spent for owner in self.owners if owner.spent is not None]
        return account_of(spent, training=timing.trained, evaluation=timing.evaluated)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        """As a store holds it."""
        return {"format": RECORD_FORMAT, **asdict(self)}

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Record:
        """Read a record. Raises InvalidData for garbage, for wrong types and for other formats."""
        values = parse(data, where, RECORD_FORMAT)
        try:
            record: Record = _read(cls, values, "")
            if record.state not in STATES:
                raise TypeError(f"state must be one of {', '.join(STATES)}, not {record.state!r}")
        except (TypeError, RecursionError) as error:
            raise InvalidData(
                f"{where} is not a run's record: {error}; restore it or choose another --name"
            ) from error
        return record


def _read(kind: Any, value: Any, name: str) -> Any:
    """Make a value of the type that a field declares of what JSON holds. Raises TypeError with the name."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        values = _read(dict, value, name)
        may_lack = {item.name for item in fields(kind) if "later" in item.metadata}
        if differing := sorted((values.keys() ^ hints.keys()) - (may_lack - values.keys())):
            raise TypeError(
                f"{name or 'it'} must have exactly its fields, but {differing[0]} is missing or unknown"
            )
        return kind(
            **{key: _read(hints[key], item, f"{name}.{key}".lstrip(".")) for key, item in values.items()}
        )
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # with None
        return None if value is None else _read(arguments[0], value, name)
    if origin in (tuple, list):
        items = enumerate(_read(list, value, name))
        return origin(_read(arguments[0], item, f"{name}[{index}]") for index, item in items)
    wanted = origin or kind
    if wanted is not bool and isinstance(value, bool):  # which Python takes for a number
        raise TypeError(f"{name or 'it'} must be of type {wanted.__name__}, not {value!r}")
    if not isinstance(value, (int, float) if wanted is float else wanted):
        raise TypeError(f"{name or 'it'} must be of type {wanted.__name__}, not {value!r:.40}")
    return value


def parse(data: bytes, where: str, format: int) -> dict[str, Any]:
    """Decode a JSON object and check its format number. Raises InvalidData."""
    try:
        values: dict[str, Any] = json.loads(data)
        version = values.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidData(
            f"{where} must be a JSON object with a format number, but {error!r}; restore it or choose "
            "another --name"
        ) from error
    if version != format:
        raise InvalidData(
            f"{where} has format {version}, but this version reads format {format}; use the version that "
            "wrote it"
        )
    return values
