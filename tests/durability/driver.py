"""The job, stopped at a named point of its story: what happens to it then is up to the test.

``python -m tests.durability.driver SPEC train ...`` is ``python -m job train ...`` with the functions of the
points wrapped from outside. At the point, for the ``count``-th time, the process stops itself (SIGSTOP), as
a whole and with all its threads. A SIGKILL then is a kill at that point; a SIGCONT is a process that was
frozen.

``python -m tests.durability.driver`` alone imports TensorFlow once and forks a job for each line that it
reads, which saves seconds for each of many processes. A fork is safe because nothing has used a device yet.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILTERS = 8  # of the networks that are trained here: they decide the environment of TensorFlow's import
CHUNK_BYTES = 32 << 10  # of uploads to a bucket: a checkpoint is several chunks
CALL_SECONDS = 1e-9  # calls of one step, so that there are many moments between them


class Stop:
    """Stops the process when a point is reached for the ``count``-th time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._point = spec.get("point")
        self._left = spec.get("count", 1)
        self._stuck = spec.get("stuck", False)
        self._lock = threading.Lock()
        self.reached = False
        self.half_uploaded = True  # false in an upload that has not been stopped half-way yet

    def at_half_upload(self) -> None:
        if not self.half_uploaded:
            self.half_uploaded = True
            self.at("half uploaded")

    def at(self, point: str) -> None:
        if point != self._point:
            return
        with self._lock:
            self._left -= 1
            stops_here = self._left == 0
        if stops_here:
            self.reached = True
            # To this thread, which then cannot go on before the whole process has stopped.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            if self._stuck:
                hang_in_native_code()


def hang_in_native_code() -> None:
    """Wait for a mutex that we hold: no Python signal handler runs any more, and no signal ends it."""
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by ``around(inner, *arguments)``."""
    inner = getattr(owner, name)
    setattr(owner, name, functools.wraps(inner)(lambda *a, **k: around(inner, *a, **k)))


def install(spec: dict[str, Any]) -> None:
    """Wrap the stores, the loop and the checkpoint's writer."""
    stop = Stop(spec)
    from job.engine import rendezvous
    from job.engine.training_step import Trainer
    from job.model import keras_file
    from job.run import attempt, chief, loop
    from job.run.signals import Interruption
    from job.store.exclusive import Names
    from job.store.gcs import GcsStore
    from job.store.local import LocalStore

    loop.CALL_SECONDS = CALL_SECONDS
    around = functools.partial(_around, stop)
    wrap(attempt, "train", functools.partial(_reading, stop))
    wrap(rendezvous, "meet", around("meet", "met"))
    wrap(rendezvous, "not_ready", around("look", "looked"))
    wrap(chief, "claim", around("claim", "claimed"))
    wrap(Trainer, "train_steps", around("call", "called"))
    wrap(Trainer, "predict", around("predict", "predicted"))
    wrap(attempt.Attempt, "_commit_if_due", _telling_the_step)
    wrap(Interruption, "note_unsaved_work", functools.partial(_noted, stop))
    wrap(keras_file, "save", functools.partial(_half_written, stop))
    for store in (LocalStore, GcsStore):
        wrap(store, "create", functools.partial(_create, stop))
        wrap(store, "upload", functools.partial(_upload, stop))
        wrap(store, "copy", around("copy", "copied"))
        wrap(store, "replace", around("result", "result created"))
        wrap(store, "delete", around("delete", "deleted"))
    wrap(Names, "give", functools.partial(_half_published, stop))
    _half_sent(stop, spec.get("gcs", {}))
    wrap(os, "fsync", functools.partial(_fail_to_sync, stop, [None] * spec.get("eio", 0)))


def install_clock() -> None:
    """Print how long the loop is blocked by each commit, and what each step takes and how many a call has."""
    from job.engine.training_step import Trainer
    from job.run import attempt

    def timed(name: str) -> Callable[..., Any]:
        def run(inner: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            answer = inner(*arguments, **options)
            steps = len(arguments[2]) if name == "step" else 1
            print(f"clock {name} {(time.perf_counter() - started) / steps:.6f} {steps}", flush=True)
            return answer

        return run

    wrap(attempt.Attempt, "_commit", timed("commit"))
    wrap(Trainer, "train_steps", timed("step"))


def _around(stop: Stop, before: str, after: str) -> Callable[..., Any]:
    def run(inner: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        stop.at(before)
        answer = inner(*arguments, **options)
        stop.at(after)
        return answer

    return run


def _reading(
    stop: Stop, inner: Callable[..., Any], settings: Any, interruption: Any, read: Any, reporter: Any
) -> Any:
    """The data is asked for; it is read since before TensorFlow was imported."""

    def asked_for() -> Any:
        stop.at("load")
        dataset = read()
        stop.at("loaded")
        return dataset

    return inner(settings, interruption, asked_for, reporter)


def _telling_the_step(inner: Callable[..., Any], attempt: Any, **options: Any) -> None:
    """Say how far training has come, which runs on beside a commit."""
    print(f"driver: trained step {attempt._loop.position.progress.step}", flush=True)
    inner(attempt, **options)


def _noted(stop: Stop, inner: Callable[..., Any], interruption: Any, value: bool) -> None:
    inner(interruption, value)
    if value:
        stop.at("noted")


def _upload(stop: Stop, inner: Callable[..., Any], store: Any, name: str, path: Path) -> Any:
    stop.at("upload")
    stop.half_uploaded = False
    entry = inner(store, name, path)
    stop.at("uploaded")
    return entry


def _create(stop: Stop, inner: Callable[..., Any], store: Any, name: str, data: bytes) -> None:
    before, after = _points_of(name, data)
    stop.at(before)
    inner(store, name, data)
    stop.at(after)


def _points_of(name: str, data: bytes) -> tuple[str, str]:
    if not name.startswith("record-"):
        kind = "segment" if "tfevents" in name else "config"
        return kind, f"{kind} created"
    last = {"complete": "last ", "interrupted": "closing "}.get(json.loads(data)["state"], "")
    return f"{last}append", f"{last}appended"


def _half_written(stop: Stop, inner: Callable[..., Any], twin: Any, state: Any, path: Path) -> None:
    stop.at("write")
    inner(twin, state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    stop.at("half written")
    path.write_bytes(whole)


def _half_published(stop: Stop, inner: Callable[..., bool], names: Any, part: Path, target: Path) -> bool:
    given = inner(names, part, target)  # linked; the unfinished name is still there
    if target.parent.name == "checkpoints":
        stop.at_half_upload()
    return given


def _fail_to_sync(stop: Stop, left: list[None], inner: Callable[..., None], descriptor: int) -> None:
    """From the point on, the record's folder fails so many times, as on a bad disk: its names are there."""
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if stop.reached and left and (path / "config.json").exists():
        left.pop()
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    inner(descriptor)


def _half_sent(stop: Stop, options: dict[str, Any]) -> None:
    """Send what is larger than one chunk in several requests, and stop between the first and the second.

    ``options`` are the store's.
    """
    from google.cloud.storage import blob
    from google.cloud.storage._media import _upload

    from job.store import gcs
    from job.store.gcs_call import Stream

    # GCS itself takes multiples of 256 KiB only, and so does its client.
    blob.Blob._CHUNK_SIZE_MULTIPLE = _upload.UPLOAD_CHUNK_SIZE = CHUNK_BYTES
    gcs.LARGEST_SINGLE_BYTES = blob._MAX_MULTIPART_SIZE = CHUNK_BYTES
    options = {"chunk_bytes": CHUNK_BYTES, **options}
    wrap(gcs.GcsStore, "__init__", lambda inner, *a, **k: inner(*a, **options, **k))

    def read(inner: Callable[..., bytes], source: Any, size: int = -1) -> bytes:
        if source.tell() > 0:
            stop.at_half_upload()
        return inner(source, size)

    wrap(Stream, "read", read)


def wait_for_peers(**seconds: float) -> None:
    """Replace constants of how long a worker waits for its peers."""
    from job.engine import rendezvous

    for name, value in seconds.items():
        assert hasattr(rendezvous, name)
        setattr(rendezvous, name, value)


def run(spec: dict[str, Any], arguments: list[str]) -> None:
    """Be the job. Never returns."""
    from job import __main__ as program
    from job.cli import commands

    sys.argv = ["job", *arguments]
    if spec:
        inner = commands.import_run

        def import_and_install(*arguments: Any) -> Any:
            loaded = inner(*arguments)
            if spec.get("clock"):
                install_clock()
            else:
                install(spec)
                wait_for_peers(**spec.get("peers", {}))
            return loaded

        commands.import_run = import_and_install  # type: ignore[assignment]
    program.main()


def serve() -> None:
    """Fork a job for each line: {"spec": ..., "arguments": [...], "environment": {...}, "log": path}."""
    from job.cli import commands

    commands.import_run(FILTERS)
    from job.store import gcs

    assert gcs
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _become(request)
        print(json.dumps(answer), flush=True)


def _become(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    run(request["spec"], request["arguments"])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        run(json.loads(sys.argv[1]), sys.argv[2:])
