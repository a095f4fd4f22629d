"""A webhook's receiving end, for tests: a real HTTP server on a free port that remembers what came."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Call:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """``answer`` gives the status of a call (a string: a redirect there)."""

    answer: Callable[[Call], int | str] = lambda call: 200
    calls: list[Call] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def calls_by_id(self) -> dict[str, Call]:
        """The first call of each event: one whose answer came late is made again."""
        return {call.headers["webhook-id"]: call for call in reversed(list(self.calls))}


@contextlib.contextmanager
def receiver(answer: Callable[[Call], int | str] = lambda call: 200) -> Iterator[Receiver]:
    seen = Receiver(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            call = Call(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            seen.calls.append(call)
            status = seen.answer(call)
            self.send_response(302 if isinstance(status, str) else status)
            if isinstance(status, str):
                self.send_header("Location", status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
