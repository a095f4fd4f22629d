"""Media out of a caller's messages and arguments: the messages name them by content hash, their bytes go beside.

Where they stand is LLaMA-Factory's rule: at the words ``<image>``, ``<video>``, ``<audio>`` in the texts, as many as
there are media; without such a word, before the first message. Or at content parts, as OpenAI's clients write them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tokenfleet.producer.media_kinds import Kind, check_kind
from tokenfleet.producer.media_sources import bytes_of, of_base64
from tokenfleet.wire.chat import MediaPart, Message, TextPart
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.media import MediaSettings
from tokenfleet.wire.requests import Messages

ARGUMENTS: Mapping[str, Kind] = {"images": "image", "videos": "video", "audios": "audio"}
WORDS: Mapping[Kind, str] = {"image": "<image>", "video": "<video>", "audio": "<audio>"}

# OpenAI's and vLLM's types of parts: what kind they are, and the name under which their content stands.
PARTS: Mapping[str, tuple[Kind, str]] = {
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "video_url": ("video", "video_url"),
    "audio_url": ("audio", "audio_url"),
    "image": ("image", "image"),
    "video": ("video", "video"),
    "audio": ("audio", "audio"),
    "input_audio": ("audio", "input_audio"),
}


@dataclass
class Taken:
    """``messages`` with references only; ``media`` by sha256, the bytes that are to be stored."""

    messages: Messages
    media: dict[str, bytes] = field(default_factory=dict)


def has_media(messages: Messages, named: Mapping[str, Any]) -> bool:
    """Whether `take` has anything to do. Cheap: most chats are text."""
    if any(is_given(named.get(name)) for name in ARGUMENTS):
        return True
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return False
    return any(_is_medium(part) for message in messages for part in _parts_of(message))


def is_given(sources: Any) -> bool:
    """Whether an argument names any medium: neither None nor an empty list."""
    return sources is not None and not (isinstance(sources, list | tuple) and not sources)


def take(messages: Messages, named: Mapping[str, Any], limits: MediaSettings) -> Taken:
    """The media of ``messages`` and of the arguments ``images``, ``videos``, ``audios``. Nothing given is changed.

    Reads files: not for an event loop. Raises `InvalidRequest`: ``media_mismatch``, ``unsupported_media``,
    ``invalid_media``, ``media_too_large``, ``url_refused``."""
    return _Taking(limits).take(messages, {kind: named.get(name) for name, kind in ARGUMENTS.items()})


def references_only(messages: Messages, named: Mapping[str, Any]) -> Messages:
    """The messages as plain JSON, for a message of the queue: their media are references (`AsyncClient.upload`).

    Raises `InvalidRequest` (``unsupported_media``) for media themselves."""
    if not has_media(messages, named):
        return messages
    taken = take(messages, named, MediaSettings())
    if taken.media:
        raise InvalidRequest(
            "Media don't travel inside a message of the queue.",
            code="unsupported_media",
            hint="client.upload() stores one and gives the part that names it in messages.",
            param="messages",
        )
    return taken.messages


class _Taking:
    """One request's media while they are gathered."""

    def __init__(self, limits: MediaSettings) -> None:
        self._limits = limits
        self._media: dict[str, bytes] = {}
        self._items = 0

    def take(self, messages: Messages, given: Mapping[Kind, Any]) -> Taken:
        if isinstance(messages, str):
            messages = ({"role": "user", "content": messages},) if messages else ()
        if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
            raise InvalidRequest("messages: a list of messages (or one string) is needed.", param="messages")
        if not messages:
            raise InvalidRequest("Media need messages.", code="media_mismatch", param="messages")
        taken = [self._message(message, k) for k, message in enumerate(messages)]
        for kind, sources in given.items():
            refs = [self._part(kind, source, f"{kind}s[{k}]", True) for k, source in enumerate(_listed(kind, sources))]
            if refs or any(_kind(part) == kind for message in taken for part in _parts_of(message)):
                _place(taken, kind, refs)
        return Taken(taken, self._media)

    def _message(self, message: Any, index: int) -> dict[str, Any]:
        if isinstance(message, Message):
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages.{index}: an object is needed.", param=f"messages.{index}")
        result = dict(message)
        if isinstance(result.get("content"), list | tuple):
            result["content"] = [
                self._content(part, f"messages.{index}.content.{k}") for k, part in enumerate(result["content"])
            ]
        return result

    def _content(self, part: Any, place: str) -> Any:
        """A part as it is stored: text as it is, a medium as a reference."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if isinstance(part, TextPart | MediaPart):
            part = part.model_dump()
        if not isinstance(part, Mapping):
            return part  # for the schema to refuse
        kind_of_part = part.get("type")
        if kind_of_part == "file":
            return self._file(part, place)
        if not isinstance(kind_of_part, str) or kind_of_part not in PARTS:
            return dict(part)
        kind, name = PARTS[kind_of_part]
        if "ref" in part:
            self._count()
            return {"type": kind, "ref": part["ref"]}
        content = part.get(name)
        if kind_of_part == "input_audio":
            data = content.get("data") if isinstance(content, Mapping) else None
            if not isinstance(data, str):
                raise _malformed(place, '"input_audio": {"data": <base64>, "format": "wav"}')
            if data[:5].lower() != "data:":
                return self._stored(kind, of_base64(data, place, self._limits), place)
            content = data
        elif isinstance(content, Mapping) and "url" in content:
            content = content["url"]
        if content is None:
            raise _malformed(place, f'"{name}": {{"url": "data:…"}}')
        return self._part(kind, content, place, False)

    def _file(self, part: Mapping[str, Any], place: str) -> dict[str, str]:
        """OpenAI's file part, for a file that is a medium by its declared type."""
        file = part.get("file")
        data = file.get("file_data") if isinstance(file, Mapping) else None
        kind = data[5:].partition("/")[0].lower() if isinstance(data, str) and data[:5].lower() == "data:" else ""
        if kind not in WORDS:
            raise InvalidRequest(
                f"{place}: only files of images, videos and audios are taken.", code="unsupported_media",
                hint='"file": {"file_data": "data:video/mp4;base64,…"}', param=place,
            )  # fmt: skip
        return self._part(cast("Kind", kind), data, place, False)

    def _part(self, kind: Kind, source: Any, place: str, may_be_path: bool) -> dict[str, str]:
        data = bytes_of(kind, source, place, self._limits, may_be_path=may_be_path)
        return self._add(kind, data)

    def _stored(self, kind: Kind, data: bytes, place: str) -> dict[str, str]:
        check_kind(kind, data, place)
        return self._add(kind, data)

    def _add(self, kind: Kind, data: bytes) -> dict[str, str]:
        self._count()
        ref = hashlib.sha256(data).hexdigest()
        self._media[ref] = data
        total = sum(map(len, self._media.values()))
        if total > self._limits.max_request_bytes:
            raise InvalidRequest(
                f"The media of a request may have at most {self._limits.max_request_bytes} bytes in all.",
                code="media_too_large", param="messages",
            )  # fmt: skip
        return {"type": kind, "ref": ref}

    def _count(self) -> None:
        self._items += 1
        if self._items > self._limits.max_items:
            raise InvalidRequest(
                f"A request may have at most {self._limits.max_items} media.", code="media_too_large", param="messages"
            )


def _place(messages: list[dict[str, Any]], kind: Kind, refs: list[dict[str, str]]) -> None:
    """Put ``refs`` where the texts have the kind's word, or else before the first message that is not the system's."""
    word = WORDS[kind]
    words = sum(text.count(word) for message in messages for text in _texts(message))
    parts = sum(_kind(part) == kind for message in messages for part in _parts_of(message))
    if words and words != (len(refs) or parts):
        raise InvalidRequest(
            f"{kind.capitalize()}s given: {len(refs) or parts}; times that the texts have {word}: {words}.",
            code="media_mismatch",
            hint=f"Give one {kind} for each {word}, or leave the words out.",
            param="messages",
        )
    if words and refs:
        waiting = iter(refs)
        for message in messages:
            if any(word in text for text in _texts(message)):
                message["content"] = [part for piece in _as_parts(message) for part in _split(piece, word, waiting)]
    elif refs:
        first = next((m for m in messages if m.get("role") not in ("system", "developer")), messages[0])
        first["content"] = [*refs, *_as_parts(first)]


def _split(part: Any, word: str, refs: Iterator[dict[str, str]]) -> Iterator[Any]:
    """A text with a medium in place of each word."""
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        yield part
        return
    for piece in re.split(f"({re.escape(word)})", part["text"]):
        if piece == word:
            yield next(refs)
        elif piece:
            yield {"type": "text", "text": piece}


def _as_parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content or ())


def _parts_of(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else getattr(message, "content", None)
    return content if isinstance(content, list | tuple) else ()


def _texts(message: Mapping[str, Any]) -> list[str]:
    return [
        part["text"]
        for part in _as_parts(message)
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]


def _kind(part: Any) -> str | None:
    """``image``, ``video``, ``audio`` for a reference."""
    return part.get("type") if isinstance(part, Mapping) and "ref" in part else None


def _is_medium(part: Any) -> bool:
    if isinstance(part, Mapping):
        kind = part.get("type")
        return isinstance(kind, str) and (kind in PARTS or kind == "file")
    return getattr(part, "type", "text") in WORDS


def _listed(kind: Kind, sources: Any) -> Sequence[Any]:
    """One medium is as good as a list of one."""
    if sources is None:
        return ()
    if isinstance(sources, list):
        return sources
    if isinstance(sources, tuple):
        is_samples = kind == "audio" and len(sources) == 2 and isinstance(sources[1], int)
        return [sources] if is_samples else sources
    return [sources]


def _malformed(place: str, example: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: the part's content is missing.", code="invalid_media", hint=example, param=place)
