"""A web server on loopback that answers by a script."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from job.data.download import Archive, Patience

QUICK = Patience(timeout=5.0, attempts=3, pause=0.01, deadline=20.0)


class Server:
    """Serves one body by a script: each request takes the next step, and the last step stays."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.steps: list[dict[str, Any]] = [{}]
        self.requests: list[tuple[str | None, int, int]] = []  # Range, status, body bytes sent
        self.go_on = threading.Event()  # ends all stalls
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client may leave early
                    outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/cifar-10-binary.tar.gz"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        asked = handler.headers["Range"]
        body, status, start = step.get("body", self.body), step.get("status", 200), 0
        if asked and not step.get("ignore_range") and status == 200:
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
        sent = body[start:][: step.get("cut")] if status < 300 else b""
        self.requests.append((asked, status, len(sent)))
        handler.send_response(status)
        if status == 206:
            first = start + step.get("shift", 0)
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if not step.get("no_length"):
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        for position in range(0, len(sent), 20_000):
            handler.wfile.write(sent[position : position + 20_000])
            time.sleep(step.get("slowly", 0.0))
        if "stall" in step:
            self.go_on.wait()

    def archive(self, body: bytes | None = None) -> Archive:
        """What a client expects to get."""
        body = self.body if body is None else body
        return Archive(self.url, len(body), hashlib.sha256(body).hexdigest())

    def close(self) -> None:
        self.go_on.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def listing(folder: Path) -> list[str]:
    """All files below a folder, but for the lock file that stays."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.endswith(".lock"))
