"""What every engine refuses of a sequence or a text before it computes anything, with the same words and codes."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from tokenfleet.engines.base import EngineInfo, Sequence, TokenChunk
from tokenfleet.engines.stopping import ending_ids
from tokenfleet.wire.errors import ContextLengthExceeded, EngineError, InvalidRequest
from tokenfleet.wire.requests import check_adapter, check_can_generate, check_modalities
from tokenfleet.wire.support import check_supported


def check_sequence(info: EngineInfo, sequence: Sequence) -> None:
    """Raises `InvalidRequest`, and `ContextLengthExceeded` for what has no room."""
    params = sequence.params
    check_can_generate(info)
    prompt_tokens = len(sequence.prompt_ids)
    if not prompt_tokens:
        raise InvalidRequest("The prompt has no tokens.", param="prompt")
    if prompt_tokens + sequence.max_new_tokens > info.context_tokens:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens; with {sequence.max_new_tokens} new ones that is more than "
            f"the {info.context_tokens} there is room for.",
            prompt_tokens=prompt_tokens,
            max_new_tokens=sequence.max_new_tokens,
            context_tokens=info.context_tokens,
        )
    _check_ids(info, "prompt", (*sequence.prompt_ids, *sequence.delivered_ids))
    _check_ids(info, "logit_bias", params.logit_bias)
    _check_ids(info, "stop_token_ids", params.stop_token_ids)
    check_adapter(info.adapters, sequence.adapter)
    check_modalities(info.modalities, (medium.kind for medium in sequence.media))
    check_supported(info.name, params)


def check_texts(info: EngineInfo, texts_ids: Items[tuple[int, ...]], adapter: str | None, *, hint: str) -> None:
    """Of texts to be scored. Raises `EngineError` (``unsupported``, with ``hint``) if the model gives no scores,
    `InvalidRequest`, `ContextLengthExceeded`."""
    if not info.can_score:
        raise EngineError("This model gives no scores: it was loaded to generate.", code="unsupported", hint=hint)
    check_adapter(info.adapters, adapter)
    for ids in texts_ids:
        _check_ids(info, "texts", ids)
        if not ids:
            raise InvalidRequest("texts: one is empty, so that no token of it could be scored.", param="texts")
        if len(ids) > info.context_tokens:
            raise ContextLengthExceeded(
                f"A text has {len(ids)} tokens; up to {info.context_tokens} can be scored.",
                prompt_tokens=len(ids),
                context_tokens=info.context_tokens,
            )


def already_over(sequence: Sequence) -> TokenChunk | None:
    """What is left of a continuation whose last token had been delivered when its worker died."""
    delivered = sequence.delivered_ids
    if delivered and delivered[-1] in ending_ids(sequence.params, sequence.eos_ids):
        return TokenChunk((), (), "stop")
    if len(delivered) >= sequence.max_new_tokens:
        return TokenChunk((), (), "length")
    return None


def _check_ids(info: EngineInfo, name: str, ids: Iterable[int]) -> None:
    if any(not 0 <= token < info.vocab_size for token in ids):
        raise InvalidRequest(
            f"{name}: a token id lies outside of the model's vocabulary (0 to {info.vocab_size - 1}).", param=name
        )
