"""The job, stopped at a named point of its story: what happens to it then is up to the test.

``python -m tests.durability.driver SPEC train ...`` is ``python -m job train ...`` with the functions of the
points wrapped from outside. At the point, for the ``count``-th time, the process stops itself (SIGSTOP), as
a whole and with all its threads. A SIGKILL then is a kill at that point; a SIGCONT is a process that was
frozen.

``python -m tests.durability.driver`` alone imports TensorFlow once and forks a job for each line that it
reads, which saves seconds for each of many processes. A fork is safe because nothing has used a device yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
        # Held with the store's lock of a folder. Who is frozen with that lock keeps a newer attempt out, and
        # exit code 74 names it; the points are meant to be others.
        self.calm = threading.RLock()
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
            reached = self._left == 0
        if reached:
            with self.calm:
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


def install(stop: Stop) -> None:
    """Wrap the stores, the loop and the checkpoint's writer."""
    from job import cifar10, cluster, gcs, portable, storage, training
    from job.checkpoints import Claim
    from job.storage import LocalStore
    from job.trainer import Trainer

    training.CALL_SECONDS = CALL_SECONDS
    around = functools.partial(_around, stop)
    wrap(cifar10, "load", around("load", "loaded"))
    wrap(cluster, "_meet", around("meet", "met"))
    wrap(cluster, "_unreachable", around("look", "looked"))
    wrap(Claim, "claim", around("claim", "claimed"))
    wrap(Trainer, "train_steps", around("call", "called"))
    wrap(Trainer, "predict", around("predict", "predicted"))
    wrap(portable, "save", functools.partial(_half_written, stop))
    for store in (LocalStore, gcs.GcsStore):
        wrap(store, "swap", functools.partial(_swap, stop))
        wrap(store, "create", functools.partial(_create, stop))
        wrap(store, "upload", functools.partial(_upload, stop))
        wrap(store, "copy", around("copy", "copied"))
        wrap(store, "delete", around("delete", "deleted"))
    wrap(storage, "locked", functools.partial(_locked, stop))
    wrap(LocalStore, "_publish", functools.partial(_half_published, stop))
    _half_sent(stop)


def install_clock() -> None:
    """Print how long the loop is blocked by each commit, and what each step takes."""
    from job import training
    from job.trainer import Trainer

    def timed(name: str) -> Callable[..., Any]:
        def run(inner: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            answer = inner(*arguments, **options)
            steps = len(arguments[2]) if name == "step" else 1
            print(f"clock {name} {(time.perf_counter() - started) / steps:.6f}", flush=True)
            return answer

        return run

    wrap(training.Attempt, "_commit", timed("commit"))
    wrap(Trainer, "train_steps", timed("step"))


def _around(stop: Stop, before: str, after: str) -> Callable[..., Any]:
    def run(inner: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        stop.at(before)
        answer = inner(*arguments, **options)
        stop.at(after)
        return answer

    return run


def _swap(stop: Stop, inner: Callable[..., Any], store: Any, name: str, data: bytes, expected: Any) -> Any:
    last = json.loads(data)["state"] == "complete"
    stop.at("last swap" if last else "swap")
    answer = inner(store, name, data, expected)
    stop.at("last swapped" if last else "swapped")
    return answer


def _upload(stop: Stop, inner: Callable[..., Any], store: Any, name: str, path: Path) -> Any:
    stop.at("upload")
    stop.half_uploaded = False
    entry = inner(store, name, path)
    stop.at("uploaded")
    return entry


def _create(stop: Stop, inner: Callable[..., Any], store: Any, name: str, data: bytes) -> None:
    kind = "segment" if "tfevents" in name else "config" if name == "config.json" else "result"
    stop.at(kind)
    inner(store, name, data)
    stop.at(f"{kind} created")


def _half_written(stop: Stop, inner: Callable[..., Any], twin: Any, state: Any, path: Path) -> None:
    stop.at("write")
    inner(twin, state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    stop.at("half written")
    path.write_bytes(whole)


def _half_published(
    stop: Stop, inner: Callable[..., Any], store: Any, source: Path, target: Path, **rest: Any
) -> None:
    inner(store, source, target, **rest)  # linked; the staged file is still there
    if target.parent.name == "checkpoints":
        stop.at_half_upload()


@contextlib.contextmanager
def _locked(stop: Stop, inner: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    with stop.calm, inner(*arguments):
        yield


def _half_sent(stop: Stop) -> None:
    """Send what is larger than one chunk in several requests, and stop between the first and the second."""
    from google.cloud.storage import blob
    from google.cloud.storage._media import _upload

    from job import gcs

    # GCS itself takes multiples of 256 KiB only, and so does its client.
    blob.Blob._CHUNK_SIZE_MULTIPLE = _upload.UPLOAD_CHUNK_SIZE = CHUNK_BYTES
    gcs.LARGEST_SINGLE_BYTES = blob._MAX_MULTIPART_SIZE = CHUNK_BYTES
    wrap(gcs.GcsStore, "__init__", lambda inner, *a, **k: inner(*a, **{"chunk_bytes": CHUNK_BYTES, **k}))

    def read(inner: Callable[..., bytes], source: Any, size: int = -1) -> bytes:
        if source.tell() > 0:
            stop.at_half_upload()
        return inner(source, size)

    wrap(gcs._Source, "read", read)


def wait_for_peers(**seconds: float) -> None:
    """Replace constants of how long a worker waits for its peers."""
    from job import cluster

    for name, value in seconds.items():
        assert hasattr(cluster, name)
        setattr(cluster, name, value)


def run(spec: dict[str, Any], arguments: list[str]) -> None:
    """Be the job. Never returns."""
    from job import cli

    sys.argv = ["job", *arguments]
    if spec:
        inner = cli._import_training

        def import_and_install(*arguments: Any) -> Any:
            training = inner(*arguments)
            if spec.get("clock"):
                install_clock()
            else:
                install(Stop(spec))
                wait_for_peers(**spec.get("peers", {}))
            return training

        cli._import_training = import_and_install  # type: ignore[assignment]
    cli.main()


def serve() -> None:
    """Fork a job for each line: {"spec": ..., "arguments": [...], "environment": {...}, "log": path}."""
    from job import cli

    cli._import_training(FILTERS)
    from job import gcs

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
