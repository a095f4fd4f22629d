"""Images, videos and audios: their bytes lie next to the jobs by content hash, never inside a request or a message."""

from __future__ import annotations

from collections.abc import Iterable

from tokenfleet.wire.chat import MediaPart
from tokenfleet.wire.errors import InvalidRequest


def check_modalities(modalities: Iterable[str], media: Iterable[MediaPart]) -> None:
    """Raises `InvalidRequest` (``unsupported_modality``) for the first medium that a model can't take."""
    taken = tuple(modalities)
    for part in media:
        if part.type not in taken:
            raise InvalidRequest(
                f"This model takes no {part.type}.",
                code="unsupported_modality",
                hint=f"It takes: {', '.join(taken)}.",
                param="messages",
            )
