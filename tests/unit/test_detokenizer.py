"""Whatever the tokenizer, the pieces of an incremental decode join to what a decode of all ids says."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="comes with an engine's extra")

from tests.small_tokenizers import KINDS, byte_fallback, byte_level, metaspace
from tokenfleet.engines.detokenizer import ByteStream, WindowStream
from tokenfleet.engines.hf_tokenizer import HFTokenizer
from tokenfleet.engines.models import BUILTIN_MODEL, default_cache
from tokenfleet.engines.scripted import ScriptedTokenizer

TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n😀é世\ufffd<s>")), max_size=60)
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def pieces(tokenizer, ids, **kwargs):
    stream = tokenizer.decode_stream(**kwargs)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return HFTokenizer(KINDS[request.param]())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_pieces_of_any_text_join_to_it(kind, text):
    tokenizer = HFTokenizer(KINDS[kind]())
    ids = tokenizer.encode(text)
    for skip in (True, False):
        assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece"])
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_of_random_ids_join_to_what_the_library_says(kind, skip):
    tokenizer, draw = HFTokenizer(KINDS[kind]()), random.Random(7)
    for _ in range(400):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_fallback_keeping_spaces"])
def test_broken_bytes_spoil_no_character_before_them(kind):
    """The library marks a whole run of byte tokens as broken if any of it is; a stream has given the good ones out."""
    tokenizer, draw = HFTokenizer(KINDS[kind]()), random.Random(7)
    seen_broken = 0
    for _ in range(400):
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(20)]
        tokens = [tokenizer.inner.id_to_token(token_id) for token_id in ids]
        data = b"".join(
            bytes([int(match[1], 16)]) if (match := BYTE.fullmatch(token)) else token.replace("▁", " ").encode()
            for token in tokens
        )
        if kind == "byte_fallback":
            data = data.removeprefix(b" ")
        text = "".join(pieces(tokenizer, ids))
        assert re.sub("\ufffd+", "\ufffd", text) == re.sub("\ufffd+", "\ufffd", data.decode("utf-8", "replace"))
        assert text == tokenizer.decode(ids) or "\ufffd" in text
        seen_broken += "\ufffd" in text
    assert seen_broken > 100


def test_a_character_cut_off_at_the_end_reads_as_the_library_has_it(tokenizer):
    ids = tokenizer.encode("ok 😀")
    for end in range(len(ids) + 1):
        text = "".join(pieces(tokenizer, ids[:end]))
        assert text == tokenizer.decode(ids[:end])
        text.encode()  # raises if it is no valid Unicode


def test_text_given_out_is_final_and_an_open_character_is_not_given_out():
    tokenizer = HFTokenizer(byte_level())
    ids = tokenizer.encode("naïve 🦊🐙 世界 end")
    stream, text, was_open = tokenizer.decode_stream(), "", 0
    for end, token_id in enumerate(ids, 1):
        text += stream.push(token_id)
        if stream.is_open:
            was_open += 1
            assert "\ufffd" not in text
        else:
            assert text == tokenizer.decode(ids[:end])
    assert was_open > 3


def test_an_honest_replacement_character_is_not_held_back():
    tokenizer = HFTokenizer(byte_level())
    stream = tokenizer.decode_stream()
    assert "".join(stream.push(token_id) for token_id in tokenizer.encode("a\ufffd")) == "a\ufffd"
    assert not stream.is_open


def test_common_kinds_decode_by_look_up_and_the_rest_by_window():
    kinds = {kind: type(HFTokenizer(make()).decode_stream()) for kind, make in KINDS.items()}
    assert kinds.pop("word_piece") is WindowStream
    assert set(kinds.values()) == {ByteStream}


def test_a_decoder_that_is_not_what_it_seems_falls_back_to_windows():
    from tokenizers import Tokenizer, decoders

    odd = Tokenizer.from_str(byte_level().to_str())
    odd.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("Th", "th"), decoders.ByteLevel()])
    assert isinstance(HFTokenizer(odd).decode_stream(), WindowStream)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
def test_windows_join_to_the_same_text_as_look_ups(kind):
    tokenizer, draw = HFTokenizer(KINDS[kind]()), random.Random(3)
    words = ["a ", " Hello", "世界", "😀", "é", "  ", "\n", "I'm", "<s>", "</s> x"]
    for _ in range(200):
        ids = tokenizer.encode("".join(draw.choices(words, k=10)))
        stream = WindowStream(tokenizer.decode)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_window_stream_gives_out_bytes_that_never_become_a_character():
    tokenizer = HFTokenizer(byte_level())
    stray = tokenizer.encode("😀")[-1]
    stream = WindowStream(tokenizer.decode)
    ids = [stray] * 20 + tokenizer.encode(" fine")
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_tokenizer_in_pure_python():
    transformers = pytest.importorskip("transformers", reason="comes with an engine's extra")
    tokenizer, draw = HFTokenizer(transformers.ByT5Tokenizer()), random.Random(1)
    assert tokenizer.eos_ids == {1}
    for ids in [tokenizer.encode("héllo 😀 wörld"), *(draw.choices(range(259), k=20) for _ in range(100))]:
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_are_skipped_or_shown():
    tokenizer = HFTokenizer(byte_level())
    ids = [0, *tokenizer.encode("hi"), 1]
    assert "".join(pieces(tokenizer, ids)) == "hi"
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == "<s>hi</s>"


def test_ids_that_stand_for_nothing_have_no_text():
    for tokenizer in (HFTokenizer(byte_level()), HFTokenizer(metaspace()), ScriptedTokenizer()):
        assert pieces(tokenizer, [10**7]) == ["", ""]
        assert tokenizer.token_text(10**7) == ""


def test_a_token_that_is_part_of_a_character_shows_its_bytes():
    tokenizer = HFTokenizer(byte_fallback())
    assert tokenizer.token_text(tokenizer.inner.token_to_id("<0xF0>")) == "bytes:\\xf0"
    assert tokenizer.token_text(tokenizer.encode(" quick")[-1]).strip() in "quick"


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_scripted_tokenizer_is_exact_both_ways(text):
    tokenizer = ScriptedTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids)) == text


def test_the_small_real_model():
    folder = default_cache() / "models" / BUILTIN_MODEL
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("not converted on this machine yet")
    tokenizer, draw = HFTokenizer.load(folder), random.Random(5)
    assert isinstance(tokenizer.decode_stream(), ByteStream)
    assert tokenizer.eos_ids == {2}
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_a_parser_looks_for_stay_visible(kind):
    """A tool call's marks are special tokens in many models: without them its parser would find nothing."""
    tokenizer = HFTokenizer(KINDS[kind]())
    special = sorted(tokenizer._special)
    if len(special) < 2:
        pytest.skip("this kind has no two special tokens")
    seen, hidden = special[:2]
    ids = [*tokenizer.encode("one"), hidden, seen, *tokenizer.encode("two")]
    text = "".join(pieces(tokenizer, ids, visible_ids=frozenset({seen})))
    assert tokenizer.inner.id_to_token(seen) in text
    assert tokenizer.inner.id_to_token(hidden) not in text
