"""Where images, videos and audios stand in the texts: at their parts, or at words such as ``<image>``.

A conversation uses one way for a kind: words if any of its texts has one, and then as many as there are media.
What a model reads there instead, and how often, is an `Expansion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenfleet.wire.chat import MediaPart, Message, TextPart
from tokenfleet.wire.errors import InvalidRequest

WORDS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


@dataclass(frozen=True, slots=True)
class Placement:
    """``by_part``: kinds whose parts leave a word where they stand; ``by_word``: kinds whose words are in the texts."""

    media: tuple[MediaPart, ...] = ()
    by_part: frozenset[str] = frozenset()
    by_word: frozenset[str] = frozenset()
    words: Mapping[str, str] = field(default_factory=lambda: WORDS)
    """What a part of each kind leaves in a text."""


def parts_of(message: Message) -> Sequence[TextPart | MediaPart]:
    return (TextPart(text=message.content),) if isinstance(message.content, str) else message.content or ()


def place(messages: Sequence[Message], known: Mapping[str, str] | None) -> Placement:
    """``known`` are the kinds that a named template has tokens for; None if that isn't known.

    Raises `InvalidRequest` (code ``invalid_media``) for media without a word or words without media."""
    media = tuple(part for message in messages for part in parts_of(message) if isinstance(part, MediaPart))
    texts = [message.text for message in messages]
    by_part: set[str] = set()
    by_word: set[str] = set()
    for kind, word in WORDS.items():
        given = sum(part.type == kind for part in media)
        words = sum(text.count(word) for text in texts)
        if given and known is not None and kind not in known:
            raise _wrong(f"This model's template takes no {kind}.", "Serve it with a template that does.")
        if words and given != words and (given or (known and kind in known)):
            raise _wrong(
                f"There are {given} {kind} parts and {words} times {word} in the texts.",
                f"Give one {kind} for each {word}, or leave the words out.",
            )
        if given:
            (by_word if words else by_part).add(kind)
    return Placement(media, frozenset(by_part), frozenset(by_word))


def _wrong(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_media", hint=hint, param="messages")


def text_of(message: Message, placement: Placement) -> str:
    """The message as one text, with a word for each medium."""
    return "".join(
        part.text
        if isinstance(part, TextPart)
        else placement.words[part.type]
        if part.type in placement.by_part
        else ""
        for part in parts_of(message)
    )


def as_parts(
    messages: Sequence[Message], placement: Placement, words: Mapping[str, str]
) -> tuple[list[Message], Placement]:
    """The same conversation with a part where a word stood, so that what users wrote is text and nothing else.

    ``words``: what each part is to leave in a text."""
    left = {kind: iter([part for part in placement.media if part.type == kind]) for kind in placement.by_word}
    result = [
        message
        if not parts_of(message)
        else message.model_copy(update={"content": tuple(_moved(message, placement, left))})
        for message in messages
    ]
    return result, replace(
        placement, by_part=placement.by_part | placement.by_word, by_word=frozenset(), words={**WORDS, **words}
    )


def _moved(
    message: Message, placement: Placement, left: Mapping[str, Iterator[MediaPart]]
) -> Iterator[TextPart | MediaPart]:
    kinds = {WORDS[kind]: kind for kind in placement.by_word}
    for part in parts_of(message):
        if isinstance(part, MediaPart):
            if part.type not in placement.by_word:
                yield part
            continue
        for text in re.split(f"({'|'.join(map(re.escape, kinds))})", part.text) if kinds else [part.text]:
            if text in kinds:
                yield next(left[kinds[text]])
            elif text:
                yield TextPart(text=text)


def split(message: Message, placement: Placement) -> list[dict[str, str]]:
    """The message as parts of one kind each, as chat templates of multimodal models walk through them."""
    words = [WORDS[kind] for kind in placement.by_part | placement.by_word]
    kinds = {word: kind for kind, word in WORDS.items()}
    result: list[dict[str, str]] = []
    for part in parts_of(message):
        if isinstance(part, MediaPart):
            result += [{"type": part.type}] if part.type in placement.by_part else []
            continue
        for text in re.split(f"({'|'.join(map(re.escape, words))})", part.text) if words else [part.text]:
            if text in words:
                result.append({"type": kinds[text]})
            elif text:
                result.append({"type": "text", "text": text})
    return result
