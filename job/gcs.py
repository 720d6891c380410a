"""The ``Store`` in a Google Cloud Storage bucket.

Every write carries a precondition: generation 0 to create, the record's generation to swap. That makes each
call safe to repeat, so all of them are repeated, with back-off and jitter, until an answer arrives or the
call's time is used up; a 412 after a lost answer is resolved by looking at what is stored.

Every upload carries its crc32c, so that the service refuses bytes that changed on the way. A server that
stored them nevertheless (an emulator does) is found out by the checksum in its answer, and exactly that
generation is replaced: garbage never stays under a name, least of all the record's.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import google.auth
import requests
import urllib3
from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

from job.errors import JobError, MissingInput, PermissionRefused, StorageFailed, UsageError
from job.storage import (
    DEADLINE_SECONDS,
    AlreadyExists,
    Budget,
    Conflict,
    Entries,
    Entry,
    Limit,
    NotFound,
    Spool,
    checked_name,
    crc32c,
    disk_errors,
)

T = TypeVar("T")

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
TIMEOUT_SECONDS = 10.0  # to connect, and to wait for the next bytes of an answer
CHECK_SECONDS = 8.0  # a GKE metadata server needs up to a few seconds in a new pod
CHUNK_BYTES = 4 << 20
LARGEST_SINGLE_BYTES = 8 << 20  # the client's own rule: what is larger goes up in chunks
SLOWEST_BYTES_PER_SECOND = 500_000  # an upload at this rate must not run into the time-out
LARGEST_DELAY_SECONDS = 4.0
CHECK_NAME = ".write-check"  # never stored

# The client would fetch the bucket's metadata in a thread of its own, with 120 s of retries and a permission
# (storage.buckets.get) that an object-level role does not have, to label traces that we do not make.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


class _Corrupted(Exception):
    """The bytes changed on the way. ``generation`` holds them, if the server stored them."""

    def __init__(self, message: str, generation: int | None = None) -> None:
        super().__init__(message)
        self.generation = generation


class _SessionLost(Exception):
    """The server no longer knows a resumable upload: begin it again."""


class _Blob(storage.Blob):
    """A blob that does not delete a corrupt upload by its name alone, which could be another's by then."""

    def delete(self, **preconditions: Any) -> None:
        if preconditions:
            super().delete(**preconditions)


class GcsStore:
    """A ``Store`` below ``gs://bucket/prefix``; nothing is connected before the first call.

    ``deadline_seconds``: a call fails after this time without progress (for a large object, each further
    chunk is progress). ``timeout_seconds``: for one connection or one answer.
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
        if match is None or not _is_visible(match[2] or "-"):
            raise UsageError(f"A bucket's location looks like gs://bucket/prefix, not {location!r}.")
        self.bucket = match[1]
        self.location = location.rstrip("/")
        self._prefix = f"{match[2]}/" if match[2] else ""
        self._deadline_seconds = deadline_seconds
        self._timeout_seconds = timeout_seconds
        self._check_seconds = check_seconds
        self._first_delay_seconds = first_delay_seconds
        self._chunk_bytes = chunk_bytes
        self._limit = Limit()
        self._connecting = threading.Lock()
        self._client: Any = None
        spool = Path(os.environ.get("JOB_SPOOL") or Path(tempfile.gettempdir(), f"job-spool-{os.getuid()}"))
        self._spool = Spool(spool, spool / ".lock", self._budget)

    # -- the contract ----------------------------------------------------------------------------------

    def check(self, *, write: bool = True) -> None:
        """See ``Store``. Answers within ``check_seconds``, also where a name server or the network hangs."""
        outcome: list[BaseException | None] = []

        def probe() -> None:
            try:
                self._retry("reach", lambda budget: self._probe(budget, write), self._check_seconds * 0.75)
            except BaseException as error:
                outcome.append(error)
            else:
                outcome.append(None)

        # Looking up names and credentials has no time-out of ours: a thread can be left behind.
        thread = threading.Thread(target=probe, name="storage check", daemon=True)
        thread.start()
        thread.join(self._check_seconds)
        if not outcome:
            raise StorageFailed(
                f"{self.location} did not answer within {self._check_seconds:g} s. Check the network, the "
                "name service, and that credentials are available (Workload Identity's metadata server, or "
                "`gcloud auth application-default login`)."
            )
        if isinstance(outcome[0], api.NotFound):
            raise self._no_bucket() from outcome[0]
        if outcome[0] is not None:
            raise outcome[0]

    def read(self, name: str) -> tuple[bytes, str]:
        def action(budget: Budget) -> tuple[bytes, str]:
            blob = self._blob(name)
            data: bytes = blob.download_as_bytes(checksum=None, retry=None, timeout=self._timeout(budget))
            if blob.crc32c is None or blob.generation is None:
                raise _Corrupted("the answer has no checksum or no generation")
            if crc32c(data) != _decoded(blob.crc32c):
                raise _Corrupted("the checksum of what arrived is wrong")
            return data, str(blob.generation)

        try:
            return self._retry(f"read {name} in", action)
        except api.NotFound:
            raise NotFound(f"There is no {self.location}/{name}.") from None

    def create(self, name: str, data: bytes) -> None:
        self._create(name, len(data), crc32c(data), lambda: io.BytesIO(data))

    def upload(self, name: str, path: Path) -> Entry:
        with disk_errors("read", path):
            size, checksum = path.stat().st_size, crc32c(path)
        generation = self._create(name, size, checksum, lambda: path.open("rb"))
        path.unlink(missing_ok=True)
        return Entry(name, size, str(generation))

    def download(self, name: str, path: Path) -> None:
        blob = self._stored(name)
        if blob is None:
            raise NotFound(f"There is no {self.location}/{name}.")
        part = path.with_name(f".{secrets.token_hex(8)}")
        try:
            with disk_errors("write", part), part.open("xb") as file:
                self._fetch(name, blob, file, part)
            with disk_errors("write", path):
                part.replace(path)
        except api.NotFound:
            raise NotFound(f"{self.location}/{name} was deleted meanwhile.") from None
        finally:
            part.unlink(missing_ok=True)

    def holds(self, name: str, size: int, checksum: int) -> bool:
        return self._equal(name, size, checksum) is not None

    def copy(self, source: str, target: str) -> None:
        origin = self._stored(source)
        if origin is None:
            raise NotFound(f"There is no {self.location}/{source}.")
        try:
            self._retry(f"copy {source} in", lambda budget: self._rewrite(origin, target, budget))
        except api.NotFound:
            raise NotFound(f"{self.location}/{source} was deleted meanwhile.") from None
        except api.PreconditionFailed:
            if self._equal(target, origin.size, _decoded(origin.crc32c)) is None:
                raise AlreadyExists(f"{self.location}/{target} exists with other content.") from None

    def swap(self, name: str, data: bytes, expected: str | None) -> str:
        try:
            return str(self._put(name, len(data), crc32c(data), lambda: io.BytesIO(data), int(expected or 0)))
        except api.PreconditionFailed:
            pass
        try:  # Refused, or carried out by an earlier try whose answer was lost: what is stored tells.
            current, version = self.read(name)
        except NotFound:
            raise Conflict(f"{self.location}/{name} is gone; expected version {expected}.") from None
        if current == data:
            return version
        raise Conflict(f"{self.location}/{name} is at version {version}, not at {expected}.")

    def list(self, prefix: str = "") -> Entries:
        checked_name(prefix, prefix=True)

        def action(budget: Budget) -> Entries:
            blobs = self._connected().list_blobs(
                self.bucket,
                prefix=self._prefix + prefix,
                fields="items(name,size,generation),nextPageToken",
                retry=None,
                timeout=self._timeout(budget),
            )
            return [
                Entry(blob.name.removeprefix(self._prefix), blob.size, str(blob.generation)) for blob in blobs
            ]

        try:
            entries = self._retry("list", action)
        except api.NotFound as error:
            raise self._no_bucket() from error
        # Consoles make placeholders for folders, whose names end with "/".
        return sorted((entry for entry in entries if _is_visible(entry.name)), key=lambda entry: entry.name)

    def delete(self, name: str, version: str) -> None:
        def action(budget: Budget) -> None:
            self._blob(name).delete(
                if_generation_match=int(version), retry=None, timeout=self._timeout(budget)
            )

        with contextlib.suppress(api.NotFound, api.PreconditionFailed):
            self._retry(f"delete {name} in", action)

    def staging(self) -> Path:
        with disk_errors("write in", self._spool.parent):
            return self._spool.path()

    def hurry(self, seconds: float) -> None:
        self._limit.hurry(seconds)

    def close(self) -> None:
        self._spool.close()
        with self._connecting:
            if self._client is not None:
                self._client.close()
            self._client = None

    # -- requests --------------------------------------------------------------------------------------

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = _new_client()
            return self._client

    def _blob(self, name: str, generation: int | None = None) -> Any:
        bucket = self._connected().bucket(self.bucket)
        return _Blob(self._prefix + checked_name(name), bucket, generation=generation)

    def _probe(self, budget: Budget, write: bool) -> None:
        timeout = self._timeout(budget, most=self._check_seconds / 3)
        list_one = {"max_results": 1, "prefix": self._prefix, "fields": "items(name),nextPageToken"}
        next(iter(self._connected().list_blobs(self.bucket, retry=None, timeout=timeout, **list_one)), None)
        if write:  # No object has generation 1: who may write is told 412, and nothing is written.
            probe = self._connected().bucket(self.bucket).blob(self._prefix + CHECK_NAME)
            with contextlib.suppress(api.PreconditionFailed):
                probe.upload_from_string(b"", if_generation_match=1, retry=None, timeout=timeout)

    def _create(self, name: str, size: int, checksum: int, source: Callable[[], BinaryIO]) -> int:
        """Store a new object and return its generation; one with equal content is ours."""
        try:
            return self._put(name, size, checksum, source, 0)
        except api.PreconditionFailed:
            generation = self._equal(name, size, checksum)
        if generation is None:
            raise AlreadyExists(f"{self.location}/{name} exists with other content.")
        return generation

    def _equal(self, name: str, size: int, checksum: int) -> int | None:
        """Return the generation stored under the name if its content is what the arguments say."""
        blob = self._stored(name)
        if blob is None or blob.size != size or _decoded(blob.crc32c) != checksum:
            return None
        return int(blob.generation)

    def _stored(self, name: str) -> Any:
        """Return the blob with its size, checksum and generation; None if it does not exist."""

        def action(budget: Budget) -> Any:
            blob = self._blob(name)
            blob.reload(retry=None, timeout=self._timeout(budget))
            return blob

        try:
            return self._retry(f"look for {name} in", action)
        except api.NotFound:
            return None

    def _put(
        self, name: str, size: int, checksum: int, source: Callable[[], BinaryIO], generation: int
    ) -> int:
        """Upload where the object is at ``generation`` (0: absent); return the new one."""
        replaced = generation

        def action(budget: Budget) -> int:
            nonlocal replaced
            try:
                return self._send(name, size, checksum, source, replaced, budget)
            except _Corrupted as error:
                if error.generation is not None:
                    replaced = error.generation
                raise

        try:
            return self._retry(f"write {name} in", action)
        except api.NotFound as error:
            raise self._no_bucket() from error

    def _send(
        self,
        name: str,
        size: int,
        checksum: int,
        source: Callable[[], BinaryIO],
        generation: int,
        budget: Budget,
    ) -> int:
        blob = self._blob(name)
        blob.crc32c, blob.chunk_size = _encoded(checksum), self._chunk_bytes
        resumable = size > LARGEST_SINGLE_BYTES
        with source() as file:
            stream = _Source(file, budget)
            try:
                blob.upload_from_file(
                    stream,
                    size=size,
                    if_generation_match=generation,
                    checksum="crc32c",
                    timeout=self._timeout(budget, payload=self._chunk_bytes if resumable else size),
                    retry=self._chunk_retry(budget) if resumable else None,
                )
            except DataCorruption as error:
                raise _Corrupted(str(error), int(error.response.json()["generation"])) from error
            except (api.GoogleAPICallError, ValueError) as error:
                # ValueError: the client and the server disagree on how much has arrived.
                if resumable and stream.used and getattr(error, "code", 410) in (404, 410):
                    raise _SessionLost(str(error)) from error
                raise
        if blob.size != size or _decoded(blob.crc32c) != checksum:
            raise _Corrupted("the server stored other bytes than were sent", int(blob.generation))
        return int(blob.generation)

    def _fetch(self, name: str, blob: Any, file: BinaryIO, path: Path) -> None:
        """Download one generation, going on where a lost connection stopped; begin again if it is corrupt."""

        def action(budget: Budget) -> None:
            start = file.seek(0, os.SEEK_END)
            if start < blob.size:
                self._blob(name, blob.generation).download_to_file(
                    _Sink(file, path, budget),
                    start=start or None,
                    raw_download=True,
                    checksum=None,  # of a part it could not be checked
                    retry=None,
                    timeout=self._timeout(budget),
                )
            if file.tell() < blob.size:
                raise ConnectionError(f"the answer ended after {file.tell()} of {blob.size} bytes")
            if crc32c(path) != _decoded(blob.crc32c):
                file.truncate(0)
                raise _Corrupted("the checksum of what arrived is wrong")

        self._retry(f"read {name} in", action)

    def _rewrite(self, origin: Any, target: str, budget: Budget) -> None:
        blob = self._blob(target)
        token = None
        while True:
            token, written, _ = blob.rewrite(
                origin, token=token, if_generation_match=0, retry=None, timeout=self._timeout(budget)
            )
            budget.reached(written)
            if token is None:
                return

    # -- time and errors -------------------------------------------------------------------------------

    def _budget(self) -> Budget:
        return Budget(self._limit, self._deadline_seconds)

    def _timeout(self, budget: Budget, *, payload: int = 0, most: float | None = None) -> float:
        """Return the seconds to wait for one answer to a request that carries ``payload`` bytes."""
        usual = self._timeout_seconds + payload / SLOWEST_BYTES_PER_SECOND
        return max(0.1, min(usual if most is None else most, budget.left()))

    def _delays(self) -> Iterator[float]:
        """Yield exponentially growing delays, jittered so that many workers do not come back as one."""
        delay = self._first_delay_seconds
        while True:
            yield random.uniform(delay / 2, delay)
            delay = min(2 * delay, LARGEST_DELAY_SECONDS)

    def _chunk_retry(self, budget: Budget) -> Any:
        """Return the client's own retry, which repeats one chunk of a large upload and not all of it."""
        return Retry(
            predicate=lambda error: _transient(error) and budget.left() > 0,
            initial=self._first_delay_seconds,
            maximum=LARGEST_DELAY_SECONDS,
            timeout=self._deadline_seconds,
        )

    def _retry(self, what: str, action: Callable[[Budget], T], seconds: float | None = None) -> T:
        """Repeat ``action`` until it answers; raise 404 and 412 as they are, and else a ``JobError``."""
        budget = Budget(self._limit, self._deadline_seconds if seconds is None else seconds)
        last: Exception | None = None
        for delay in self._delays():
            if budget.left() <= 0:
                break
            try:
                return action(budget)
            except (api.NotFound, api.PreconditionFailed, JobError):
                raise
            except Exception as error:
                if not _transient(error):
                    raise self._final(what, error) from error
                last = error
            if not budget.sleep(delay):
                break
        raise StorageFailed(
            f"Could not {what} {self.location}: {last or 'no time was left'}. Tried again until the time "
            "was used up. What was committed before is intact; check the network, then run the same command "
            "again."
        ) from last

    def _final(self, what: str, error: Exception) -> JobError:
        if isinstance(error, api.Unauthorized | api.Forbidden):
            return PermissionRefused(
                f"Not allowed to {what} {self.location}. Grant roles/storage.objectUser on "
                f"gs://{self.bucket} (roles/storage.objectViewer is enough for data) to the identity of the "
                f"job: with Workload Identity, its Kubernetes service account. The service said: {error}"
            )
        if isinstance(error, auth.GoogleAuthError):
            return PermissionRefused(
                f"Cannot {what} {self.location}: the credentials are not usable. Check "
                f"GOOGLE_APPLICATION_CREDENTIALS, or log in again. The reason: {error}"
            )
        return StorageFailed(f"Could not {what} {self.location}: {error}")

    def _no_bucket(self) -> MissingInput:
        return MissingInput(
            f"There is no bucket gs://{self.bucket}. Correct the name, or create it: "
            f"gcloud storage buckets create gs://{self.bucket}"
        )


class _Source:
    """The file to upload as the client reads it: each further chunk is progress."""

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        self._file = file
        self._budget = budget
        self.used = False

    def read(self, size: int = -1) -> bytes:
        if self._budget.left() <= 0:
            raise StorageFailed("The time for storage was used up in mid-upload. The last commit is intact.")
        self.used = True
        data = self._file.read(size)
        self._budget.reached(self._file.tell())
        return data

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)


class _Sink:
    """The file to download as the client writes it."""

    def __init__(self, file: BinaryIO, path: Path, budget: Budget) -> None:
        self._file = file
        self._path = path
        self._budget = budget

    def write(self, data: bytes) -> int:
        if self._budget.left() <= 0:
            raise StorageFailed("The time for storage was used up in mid-download.")
        with disk_errors("write", self._path):  # here, where it cannot be mistaken for a network error
            written = self._file.write(data)
            self._file.flush()
        self._budget.reached(self._file.tell())
        return written


def _new_client() -> Any:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client(project=None, credentials=AnonymousCredentials())  # type: ignore[no-untyped-call]
    credentials, project = google.auth.default(scopes=[SCOPE])
    return storage.Client(project=project, credentials=credentials)


def _transient(error: Exception) -> bool:
    """Say whether the same request may succeed a little later."""
    if isinstance(error, api.GoogleAPICallError | InvalidResponse):
        code = error.response.status_code if isinstance(error, InvalidResponse) else error.code
        refused = code == 400 and _is_checksum_refusal(error)
        return code is not None and (code in (408, 429) or code >= 500 or refused)
    if type(error) is auth.DefaultCredentialsError:  # a late metadata server, unless a file was named
        return not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if isinstance(error, auth.RefreshError):
        return error.retryable or isinstance(error.__cause__, auth.TransportError)
    return isinstance(error, _TRANSIENT) and not isinstance(error, _MALFORMED)


_TRANSIENT = (
    _Corrupted,
    _SessionLost,
    api.RetryError,
    auth.TransportError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    json.JSONDecodeError,
    ConnectionError,
    TimeoutError,
)
_MALFORMED = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
)


def _is_checksum_refusal(error: Exception) -> bool:
    return re.search(r"crc32c|md5|checksum|hash", str(error), re.IGNORECASE) is not None


def _is_visible(name: str) -> bool:
    return all(part and not part.startswith(".") for part in name.split("/"))


def _encoded(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def _decoded(checksum: str) -> int:
    return int.from_bytes(base64.b64decode(checksum), "big")
