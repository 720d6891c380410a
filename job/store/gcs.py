"""The ``Store`` in a Google Cloud Storage bucket.

``create`` and ``upload`` carry the precondition that the name is free (generation 0), which makes every call
safe to repeat. So all of them are repeated, with back-off and jitter, until an answer arrives or the call's
time is used up. A refusal after a lost answer is resolved by looking at what is stored.

Every upload carries its crc32c, so that the service refuses bytes that changed on the way.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

# Before google.auth is imported, which reads it then: our own retries wait for a late metadata server, and
# where there is none, its absence is known after one try of 3 s.
os.environ.setdefault("GCE_METADATA_DETECT_RETRIES", "1")
# The client would fetch the bucket's metadata in a thread of its own, with 120 s of retries and a permission
# (storage.buckets.get) that an object-level role does not have, to label traces that we do not make.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

import google.auth
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from job.domain.disk import disk_errors
from job.domain.errors import JobError, StorageFailed, UsageError
from job.store.checksum import crc32c
from job.store.contract import AlreadyExists, Entry, NotFound, checked_name, is_visible
from job.store.gcs_call import Call, Patience, Stream
from job.store.gcs_errors import Corrupted, SessionLost, explained, no_bucket, status_of
from job.store.scratch import Scratch

T = TypeVar("T")

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
DEADLINE_SECONDS = 60.0  # without progress; above a server's usual hiccup, far below a Job's patience
TIMEOUT_SECONDS = 10.0  # to connect, and to wait for the next bytes of an answer
CHECK_SECONDS = 8.0  # of silence: a GKE metadata server needs up to a few seconds in a new pod
CHUNK_BYTES = 4 << 20
LARGEST_SINGLE_BYTES = 8 << 20  # the client's own rule: what is larger goes up in chunks


class GcsStore:
    """A ``Store`` below ``gs://bucket/prefix``; nothing is connected before the first call.

    ``deadline_seconds``: a call fails after this time without progress (for a large object, each further
    chunk is progress). ``timeout_seconds``: for one connection or one answer. ``check_seconds``: the longest
    silence that ``check`` bears. ``JOB_GCS_PROJECT`` names the project that pays for a requester-pays bucket.
    """

    def __init__(
        self,
        location: str,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        check_seconds: float = CHECK_SECONDS,
        first_delay_seconds: float = 0.5,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+[a-z0-9])(?:/(.*))?", location.rstrip("/"))
        if match is None or not all(map(is_visible, (match[2] or "-").split("/"))):
            hint = " Name yours in k8s/components/gcs/settings.yaml." if "BUCKET" in location else ""
            raise UsageError(f"A bucket's location looks like gs://bucket/prefix, not {location!r}.{hint}")
        self.bucket = match[1]
        self.location = location.rstrip("/")
        self._prefix = f"{match[2]}/" if match[2] else ""
        self._check_seconds = check_seconds
        self._chunk_bytes = chunk_bytes
        self._patience = Patience(self.location, deadline_seconds, timeout_seconds, first_delay_seconds)
        self._connecting = threading.Lock()
        self._client: Any = None
        self._scratch = Scratch()

    # -- the contract ----------------------------------------------------------------------------------

    def check(self, *, write: bool = True) -> None:
        """See ``Store``. What may heal is waited for, silence is not: a name server or the network hangs."""
        events: queue.SimpleQueue[BaseException | str] = queue.SimpleQueue()
        self._patience.tell = events.put

        def probe() -> None:
            try:
                self._prove(write)
                events.put("proved")
            except BaseException as error:
                events.put(error)

        # Looking up names and credentials has no time-out of ours: a thread can be left behind.
        threading.Thread(target=probe, name="storage check", daemon=True).start()
        try:
            while (event := events.get(timeout=self._check_seconds)) != "proved":
                if isinstance(event, BaseException):
                    raise event
        except queue.Empty:
            raise StorageFailed(
                f"{self.location} did not answer within {self._check_seconds:g} s. Check the network, the "
                "name service, and that credentials are available (Workload Identity's metadata server, or "
                "`gcloud auth application-default login`)."
            ) from None
        finally:
            self._patience.tell = None

    def read(self, name: str) -> bytes:
        checked_name(name)

        def action(call: Call) -> bytes:
            blob = self._blob(name)
            data: bytes = blob.download_as_bytes(
                raw_download=True, checksum=None, retry=None, timeout=call.timeout()
            )
            if blob.crc32c is None or crc32c(data) != _decoded(blob.crc32c):
                raise Corrupted("the checksum of what arrived is wrong")
            return data

        return self._call(f"read {name} in", action, missing=NotFound(f"There is no {self.location}/{name}."))

    def checksum(self, name: str) -> tuple[int, int]:
        stored = self._stored(checked_name(name))
        if stored is None:
            raise NotFound(f"There is no {self.location}/{name}.")
        return int(stored.size), _decoded(stored.crc32c)

    def exists(self, name: str) -> bool:
        return self._stored(checked_name(name)) is not None

    def create(self, name: str, data: bytes) -> None:
        self._create(checked_name(name), len(data), crc32c(data), lambda: io.BytesIO(data))

    def upload(self, name: str, path: Path) -> None:
        checked_name(name)
        with disk_errors("read", path):
            size, checksum = path.stat().st_size, crc32c(path)
        self._create(name, size, checksum, lambda: path.open("rb"))

    def replace(self, name: str, data: bytes) -> None:
        checked_name(name)
        self._put(f"replace {name} in", name, len(data), crc32c(data), lambda: io.BytesIO(data), None)

    def copy(self, source: str, target: str) -> None:
        checked_name(source)
        checked_name(target)

        def action(call: Call) -> None:
            token = None
            while True:
                token, written, _ = self._blob(target).rewrite(
                    self._blob(source), token=token, retry=None, timeout=call.timeout()
                )
                call.reached(written)
                if token is None:
                    return

        missing = NotFound(f"There is no {self.location}/{source}.")
        self._call(f"replace {target} by a copy of {source} in", action, missing=missing)

    def download(self, name: str, path: Path) -> None:
        missing = NotFound(f"There is no {self.location}/{name}.")
        stored = self._stored(checked_name(name))
        if stored is None:
            raise missing
        part = path.with_name(f".{secrets.token_hex(8)}")

        def action(call: Call) -> None:
            with disk_errors("write", path):
                file = part.open("wb")
            with file:
                self._blob(name, stored.generation).download_to_file(
                    Stream(file, call),
                    raw_download=True,
                    checksum=None,  # which the client does not compare after it went on in the middle
                    retry=call.retry,
                    timeout=call.timeout(),
                )
            if (part.stat().st_size, crc32c(part)) != (stored.size, _decoded(stored.crc32c)):
                raise Corrupted("the checksum of what arrived is wrong")

        try:
            self._call(f"read {name} in", action, missing=missing)
            with disk_errors("write", path):
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[Entry]:
        checked_name(prefix, prefix=True)

        def action(call: Call) -> list[Entry]:
            blobs = self._listed(call, self._prefix + prefix)
            return [Entry(blob.name.removeprefix(self._prefix), blob.size) for blob in blobs]

        entries = self._call("list", action)
        # Consoles make placeholders for folders, whose names end with "/".
        visible = (entry for entry in entries if all(map(is_visible, entry.name.split("/"))))
        return sorted(visible, key=lambda entry: entry.name)

    def delete(self, name: str) -> None:
        self._delete(checked_name(name))

    def begin_attempt(self, number: int) -> None:
        """Nothing to do: an unfinished upload has no name, and the service forgets it."""

    def scratch(self) -> Path:
        return self._scratch.path()

    def finish_within(self, seconds: float) -> None:
        """See ``Store``. A request that hangs ends by its own time-out: 10 s, and 2 s for each MB sent."""
        self._patience.end = min(self._patience.end, time.monotonic() + seconds)

    def close(self) -> None:
        self._scratch.close()
        client, self._client = self._client, None  # without the lock: a thread that hangs may hold it
        if client is not None:
            client.close()

    # -- requests --------------------------------------------------------------------------------------

    def _bucket(self) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = _new_client()
            return self._client.bucket(self.bucket, user_project=os.environ.get("JOB_GCS_PROJECT") or None)

    def _blob(self, name: str, generation: int | None = None) -> Any:
        return self._bucket().blob(self._prefix + name, generation=generation)

    def _prove(self, write: bool) -> None:
        """Do once what training does later; see ``Store.check``."""
        self._call("list", lambda call: next(iter(self._listed(call, self._prefix, max_results=1)), None))
        if not write:
            return
        name = f".check-{secrets.token_hex(8)}"
        self._create(name, 1, crc32c(b"1"), lambda: io.BytesIO(b"1"))
        with contextlib.suppress(AlreadyExists):
            self._create(name, 1, crc32c(b"2"), lambda: io.BytesIO(b"2"))
            raise StorageFailed(
                f"The service gave one name to two objects in {self.location}, so two attempts could both "
                "believe to own a run. It must honour ifGenerationMatch=0."
            )
        self._put(f"replace {name} in", name, 1, crc32c(b"3"), lambda: io.BytesIO(b"3"), None)
        self._delete(name)

    def _listed(self, call: Call, prefix: str, **options: Any) -> Any:
        bucket = self._bucket()
        fields = "items(name,size),nextPageToken"
        return bucket.client.list_blobs(
            bucket, prefix=prefix, fields=fields, retry=None, timeout=call.timeout(), **options
        )

    def _create(self, name: str, size: int, checksum: int, source: Callable[[], BinaryIO]) -> None:
        while True:
            try:
                return self._put(f"create {name} in", name, size, checksum, source, 0)
            except api.PreconditionFailed:
                blob = self._stored(name)
            if blob is not None:  # else it was deleted since, and the name is free
                break
        if (blob.size, _decoded(blob.crc32c)) != (size, checksum):
            raise AlreadyExists(f"{self.location}/{name} exists with other content.")

    def _stored(self, name: str) -> Any:
        """Return the blob with its size, checksum and generation; None if it does not exist."""

        def action(call: Call) -> Any:
            return self._bucket().get_blob(self._prefix + name, retry=None, timeout=call.timeout())

        return self._call(f"look for {name} in", action)

    def _put(
        self,
        what: str,
        name: str,
        size: int,
        checksum: int,
        source: Callable[[], BinaryIO],
        generation: int | None,
    ) -> None:
        """Upload if the object is at ``generation``: 0 where it must not exist, None whatever is there."""
        resumable = size > LARGEST_SINGLE_BYTES

        def action(call: Call) -> None:
            blob = self._blob(name)
            blob.crc32c, blob.chunk_size = _encoded(checksum), self._chunk_bytes
            with source() as file:
                stream = Stream(file, call)
                try:
                    blob.upload_from_file(
                        stream,
                        size=size,
                        if_generation_match=generation,
                        checksum=None,  # the service compares it with ``blob.crc32c``
                        timeout=call.timeout(payload=self._chunk_bytes if resumable else size),
                        retry=call.retry if resumable else None,
                    )
                except (api.GoogleAPICallError, ValueError) as error:
                    # ValueError: the client and the server disagree on how much has arrived.
                    if resumable and stream.used and (status_of(error) or 410) in (404, 410):
                        raise SessionLost(str(error)) from error
                    raise
            if (blob.size, _decoded(blob.crc32c)) != (size, checksum):
                self._delete(name, int(blob.generation))
                raise Corrupted("the server stored other bytes than were sent")

        self._call(what, action)

    def _delete(self, name: str, generation: int | None = None) -> None:
        def action(call: Call) -> None:
            self._blob(name).delete(if_generation_match=generation, retry=None, timeout=call.timeout())

        with contextlib.suppress(NotFound, api.PreconditionFailed):
            self._call(f"delete {name} in", action, missing=NotFound())

    # -- time and errors -------------------------------------------------------------------------------

    def _call(self, what: str, action: Callable[[Call], T], *, missing: Exception | None = None) -> T:
        """Repeat until an answer. Raises ``missing`` for 404, 412 as it is, else a ``JobError``."""
        call = Call(self._patience, what)
        try:
            call.require_time()
            result: T = call.retry(action)(call)
        except (api.PreconditionFailed, JobError):
            raise
        except api.NotFound as error:
            raise missing or no_bucket(self.location) from error
        except Exception as error:
            raise explained(what, self.location, error) from error
        call.answered()
        return result


def _new_client() -> Any:
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        options = {"api_endpoint": host if "://" in host else f"http://{host}"}
        nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
        return storage.Client(project=None, credentials=nobody, client_options=options)
    try:
        credentials, project = google.auth.default(scopes=[SCOPE])
    except OSError as error:  # of the file that GOOGLE_APPLICATION_CREDENTIALS names
        raise auth.DefaultCredentialsError(str(error)) from error  # type: ignore[no-untyped-call]
    return storage.Client(project=project, credentials=credentials)


def _encoded(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def _decoded(checksum: str) -> int:
    return int.from_bytes(base64.b64decode(checksum), "big")
