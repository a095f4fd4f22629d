"""The tokenizer that comes out of a GGUF file, on whichever transformers reads it."""

from __future__ import annotations

import json

import pytest

from tests.small_tokenizers import byte_level

pytestmark = pytest.mark.unit


def test_a_byte_level_tokenizer_read_as_sentencepiece_is_mended():
    """As transformers 5.17 reads SmolLM2's file; seen with it: a grammar refused the second word of "a weather"."""
    hf = pytest.importorskip("transformers")
    pytest.importorskip("llguidance")
    import llguidance.hf
    from tokenizers import Tokenizer

    from tokenfleet.engines.gguf_conversion import mend

    right = byte_level()
    state = json.loads(right.to_str())
    state["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, state["decoder"],
    ]}  # fmt: skip
    state["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<s>"}
    wrong = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="<s>"
    )
    text = "the quick 😀 fox"
    ids = right.encode(text).ids

    def refused():
        tokenizer = llguidance.hf.from_tokenizer(wrong, len(wrong))
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(text))
        return [token for token in ids if not matcher.try_consume_tokens([token])]

    assert refused(), "it would prove nothing"
    tokens = [right.id_to_token(i) for i in range(right.get_vocab_size())]
    mend(wrong, {"model": "gpt2", "tokens": tokens, "bos_token_id": 0, "eos_token_id": 1})
    assert not refused()
    assert (wrong.eos_token, wrong.decode(ids)) == ("</s>", text)


def test_tokenizers_of_other_kinds_are_left_alone():
    hf = pytest.importorskip("transformers")
    from tests.small_tokenizers import byte_fallback
    from tokenfleet.engines.gguf_conversion import mend

    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), eos_token="</s>")
    before = tokenizer.backend_tokenizer.to_str()
    mend(tokenizer, {"model": "llama", "eos_token_id": 0, "tokens": ["<unk>"]})
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token) == (before, "</s>")
