"""What a model reads where a medium stands: its own token, as often as the medium has features.

The repeated text comes from the model's processor (`engines/media/processing.py`); engines that expand
prompts themselves (vLLM, SGLang) get the token once. Named templates frame it as LLaMA-Factory's plugins do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenfleet.engines.templates.named import Piece
from tokenfleet.engines.templates.schema import Template
from tokenfleet.wire.errors import InvalidRequest

_VISION = "{vision_bos}{%s}{vision_eos}"
_QWEN = {"image": _VISION % "image", "video": _VISION % "video"}
_PLAIN = {"image": "{image}", "video": "{video}"}
_FORMS: Mapping[str, Mapping[str, str]] = {
    "llava": _PLAIN,
    "llava_next": _PLAIN,
    "llava_next_video": _PLAIN,
    "video_llava": _PLAIN,
    "gemma3": _PLAIN,
    "pixtral": _PLAIN,
    "intern_vl": _PLAIN,
    "paligemma": {"image": ""},  # all images stand before the text: `_BEFORE`
    "qwen2_vl": _QWEN,
    "qwen3_vl": {"image": _QWEN["image"], "video": "{video}"},  # each frame has a frame of its own, with its time
    "glm4v": {"image": "<|begin_of_image|>{image}<|end_of_image|>"},
    "qwen2_audio": {"audio": "<|audio_bos|>{audio}<|audio_eos|>"},
}
"""By LLaMA-Factory's names for its plugins: what a part leaves in the text."""
_BEFORE = frozenset({"paligemma"})
_TOKENS = {"vision_bos": "<|vision_start|>", "vision_eos": "<|vision_end|>"}


@dataclass(frozen=True, slots=True)
class Expansion:
    """``tokens``: the model's token for each kind it takes. ``texts``: what each medium of a kind is written as, in
    order; None: the engine does that."""

    tokens: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] | None = None

    def words(self, template: Template | None) -> dict[str, str]:
        """What a medium of each kind leaves in a text. Raises `InvalidRequest` for a plugin that isn't known here."""
        if template is None:
            return dict(self.tokens)
        plugin = template.media.get("plugin", "base")
        if plugin not in _FORMS:
            raise InvalidRequest(
                f"The template {template.name!r} can't place media ({plugin}).",
                code="unsupported_modality",
                hint="Serve the model without a template, so that its own is used.",
                param="messages",
            )
        tokens = {**_TOKENS, **template.media, **self.tokens}
        return {kind: form.format_map(tokens) for kind, form in _FORMS[plugin].items() if f"{{{kind}}}" not in form
                or kind in tokens}  # fmt: skip

    def expanded(self, pieces: Sequence[Piece], template: Template | None) -> list[Piece]:
        """``pieces`` with each token written out. Raises `InvalidRequest` (``invalid_media``) where the texts hold
        more or fewer tokens than there are media: a user wrote one, or the template has no place for them."""
        if self.texts is None:
            return list(pieces)
        if template is not None and template.media.get("plugin") in _BEFORE:
            return ["".join(self.texts.get("image", ())), *pieces]
        # Of a kind of which nothing is given, too: a model would look for the medium.
        kinds = {token: kind for kind, token in self.tokens.items()}
        if not kinds:
            return list(pieces)
        left = {kind: iter(self.texts.get(kind, ())) for kind in kinds.values()}
        found = dict.fromkeys(kinds.values(), 0)

        def written(match: re.Match[str]) -> str:
            kind = kinds[match[0]]
            found[kind] += 1
            return next(left[kind], "")

        pattern = re.compile("|".join(map(re.escape, kinds)))
        result = [pattern.sub(written, piece) if isinstance(piece, str) else piece for piece in pieces]
        for kind, count in found.items():
            given = len(self.texts.get(kind, ()))
            if count != given:
                raise InvalidRequest(
                    f"The prompt has {count} places for {given} {kind} parts.",
                    code="invalid_media",
                    hint=f"Don't write the model's own token for {kind}s in a text; does its template take {kind}s?",
                    param="messages",
                )
        return result
