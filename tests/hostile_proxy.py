"""A small HTTP proxy that hurts what passes through it, and counts how often it did."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
LONGEST_STALL_SECONDS = 20.0


@dataclass
class Request:
    """One request of a client; ``kind`` says what it asks of the storage service."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def kind(self) -> str:
        return kind(self.method, self.target)


@dataclass
class Response:
    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


@dataclass
class Fault:
    """What to do to the next ``times`` requests of a kind, after ``skip`` of them were spared.

    name: ``status`` (answer ``status`` without asking the server), ``reset`` (in the middle of the request's
    body), ``lose`` (the server carries it out, the connection is reset before the answer), ``stall`` (the
    same, but nothing comes at all), ``truncate`` (half of the answer's body), ``flip`` (one bit of the
    request's payload), ``flip and lose``, ``flip_answer`` (one bit of the answer's body); any other name does
    no harm but calls ``meanwhile``.
    """

    name: str
    kind: str
    times: int = 1
    skip: int = 0
    status: int = 503
    body: bytes = b'{"error": {"message": "injected by the test"}}'
    meanwhile: Callable[[], None] | None = None  # after the server has carried the request out


def kind(method: str, target: str) -> str:
    """Name what a request asks for: upload, session, chunk, download, list, look, delete or rewrite."""
    path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
    if "upload_id" in query:
        return "chunk"
    if path.startswith("/upload/"):
        return "session" if query.get("uploadType") == ["resumable"] else "upload"
    if "/rewriteTo/" in path:
        return "rewrite"
    if method == "DELETE":
        return "delete"
    if query.get("alt") == ["media"]:
        return "download"
    if method == "GET" and "/o/" in path:
        return "look"
    return "list" if path.endswith("/o") else "other"


class HostileProxy:
    """Forwards to a server on loopback; ``inject`` faults, then look at ``injected`` and ``requests``."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.injected: Counter[str] = Counter()  # by the fault's name
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []  # of the proxy itself: a test that saw one proves nothing
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert self.errors == []

    def inject(self, name: str, kind: str, **options: Any) -> Fault:
        fault = Fault(name, kind, **options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def kinds(self) -> list[str]:
        """Return the kinds of all requests so far, in order."""
        return [request.kind for request in self.requests]

    def forward(self, request: Request) -> Response:
        """Ask the server behind."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=30)
        try:
            headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP_BY_HOP}
            connection.request(request.method, request.target, request.body or None, headers)
            answer = connection.getresponse()
            kept = [(key, value) for key, value in answer.getheaders() if key.lower() not in HOP_BY_HOP]
            return Response(answer.status, kept, answer.read())
        finally:
            connection.close()

    def fault_for(self, method: str, target: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.kind in (kind(method, target), "any") and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    self.injected[fault.name] += 1
                    return fault
        return None

    def stall(self) -> None:
        self._stopping.wait(LONGEST_STALL_SECONDS)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    proxy: HostileProxy

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.resets: set[int] = set()

    def shutdown_request(self, request: Any) -> None:
        if id(request) in self.resets:
            self.resets.discard(id(request))  # closing with linger 0, without a shutdown, sends a reset
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Unlike the base class, do not print: clients that hang up are what we are here for."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True
        except Exception as error:
            self.server.proxy.errors.append(error)
            raise

    def _serve(self) -> None:
        proxy, length = self.server.proxy, int(self.headers.get("Content-Length") or 0)
        fault = proxy.fault_for(self.command, self.path)
        if fault is not None and fault.name == "reset":
            self.rfile.read(length // 2)
            self._reset()
            return
        request = Request(self.command, self.path, dict(self.headers.items()), self.rfile.read(length))
        if len(request.body) < length:  # the client died while it sent
            self.close_connection = True
            return
        proxy.requests.append(request)
        if fault is not None and fault.name in ("flip", "flip and lose"):
            request.body = _flipped(request.body)
        if fault is not None and fault.name == "status":
            self._answer(Response(fault.status, body=fault.body))
            return
        response = proxy.forward(request)
        if fault is not None and fault.meanwhile is not None:
            fault.meanwhile()
        self._answer_badly(response, fault.name if fault else "")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815 - the base class's names

    def _answer_badly(self, response: Response, fault: str) -> None:
        if fault in ("lose", "flip and lose"):
            self._reset()
        elif fault == "stall":
            self.server.proxy.stall()
            self._reset()
        elif fault == "truncate":
            self._answer(response, response.body[: len(response.body) // 2])
            self._reset()
        elif fault == "flip_answer":
            response.body = _flipped(response.body)
            self._answer(response)
        else:
            self._answer(response)

    def _answer(self, response: Response, part: bytes | None = None) -> None:
        self.send_response(response.status)
        for key, value in response.headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body if part is None else part)

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.resets.add(id(self.request))


def _flipped(body: bytes) -> bytes:
    """Flip a bit of the last byte; of a multipart body, the last before the boundary that ends it."""
    changed = bytearray(body)
    end = body.rfind(b"\r\n--") if body.endswith(b"--") else len(body)
    changed[end - 1] ^= 1
    return bytes(changed)
