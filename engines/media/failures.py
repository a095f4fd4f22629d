"""The two things that can be wrong with a medium, and the clock that its decoding runs against."""

from __future__ import annotations

import time

from tokenfleet.wire.errors import InvalidRequest


def invalid(message: str, hint: str = "") -> InvalidRequest:
    return InvalidRequest(message, code="invalid_media", hint=hint, param="messages")


def too_large(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, code="media_too_large", hint=hint, param="messages")


class Deadline:
    """``check`` is called between frames: C code can't be interrupted, but what one call of it may do is bounded."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise too_large(
                f"Decoding the media took longer than {self._seconds:g} s.", "Send less, or smaller and shorter media."
            )
