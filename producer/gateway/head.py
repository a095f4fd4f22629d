"""uvicorn's fast HTTP parser, with a limit: by itself it would collect a request's head for as long as one is sent."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Above what `outermost` refuses politely; whoever sends more before a head is complete is cut off.
MAX_BYTES = 64 * 1024


class LimitedHead(HttpToolsProtocol):
    _is_in_head = False
    _head_bytes = 0

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._is_in_head else 0
        if self._head_bytes > MAX_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's head is too long.")
