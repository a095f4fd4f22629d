"""From tokens to deltas: cuts, stop strings, limits, continuation, fan-out. Engine: the scripted one."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenfleet.engines.base import RawLogprob, TokenChunk
from tokenfleet.engines.choice import ChoiceText, DeliveredChoice
from tokenfleet.engines.generation import GenerationJob, choice_seed, generate_deltas, resolve_max_new_tokens
from tokenfleet.engines.scripted import ScriptedEngine, ScriptedOptions, ScriptedTokenizer
from tokenfleet.engines.scripted.tokenizer import EOS
from tokenfleet.engines.stopping import StopMatcher
from tokenfleet.wire.chat import GenerationParams, Message
from tokenfleet.wire.errors import ContextLengthExceeded, EngineError, InvalidRequest
from tokenfleet.wire.events import ChoiceFinished, Delta

TOKENIZER = ScriptedTokenizer()
AB = st.text("ab", min_size=1, max_size=5)


def first_stop(text, stops):
    """The stop string that is complete first, the longer of two that end together; by trying every end."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text.endswith(stop, 0, end)]:
            return max(found, key=len), end
    return None


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab", max_size=40), stops=st.lists(AB, min_size=1, max_size=4), cuts=st.lists(st.integers(0, 40)))
def test_a_stop_string_is_found_wherever_the_text_is_cut(text, stops, cuts):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    matcher, expected = StopMatcher(stops), first_stop(text, stops)
    for start, end in itertools.pairwise(edges):
        found = matcher.push(text[start:end])
        if found is not None:
            assert (found.stop, start + found.end) == expected
            return
        assert expected is None or expected[1] > end
        beginnings = [
            n for n in range(1, end + 1) for stop in stops if n < len(stop) and stop[:n] == text[end - n : end]
        ]
        assert matcher.open_chars == max(beginnings, default=0)
    assert expected is None


def test_a_stop_string_made_to_be_slow_is_not():
    matcher = StopMatcher(["a" * 50_000 + "b"])
    for _ in range(100):
        assert matcher.push("a" * 1000) is None
    assert matcher.open_chars == 50_000


def chunked(ids, sizes, reason=None):
    """``ids`` in chunks of these sizes, over and over; the last has the reason."""
    chunks, position, turn = [], 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        chunks.append(tuple(ids[position : position + size]))
        position, turn = position + size, turn + 1
    return [TokenChunk(chunk, (), reason if i + 1 == len(chunks) else None) for i, chunk in enumerate(chunks)]


def feed(text, chunks):
    events = []
    for chunk in chunks:
        events += text.feed(chunk)
        if text.is_finished:
            break
    return events


def joined(events):
    deltas = [event for event in events if isinstance(event, Delta)]
    return [i for delta in deltas for i in delta.ids], "".join(delta.text for delta in deltas)


def expected_outcome(ids, stops, min_tokens=0):
    """Ids, text, reason and stop of a choice, from its whole text at once."""
    for count in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:count])
        before = TOKENIZER.decode(ids[: count - 1])
        before = before.rstrip("\ufffd") if text[: len(before)] != before else before
        found = first_stop(text, stops) if "\ufffd" not in text[len(before) :] else None
        if found and found[1] > len(before) and count > min_tokens:
            return ids[:count], text[: found[1] - len(found[0])], "stop", found[0]
    return ids, TOKENIZER.decode(ids), "length", None


PARTS = st.sampled_from(["a", "b", "ab", " the", "😀", "é", "\n", "</s>", "<", "/s", ">", " river", "世界"])


@settings(max_examples=400, deadline=None)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=25),
    by_bytes=st.booleans(),
    stops=st.lists(st.sampled_from(["</s>", "ab", "😀", "\n\n", "aab", "世界\n", "b the"]), max_size=3),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
)
def test_deltas_join_to_the_text_before_the_stop_however_tokens_come(parts, by_bytes, stops, sizes):
    whole = "".join(parts)
    ids = list(whole.encode()) if by_bytes else TOKENIZER.encode(whole)
    text = ChoiceText(3, TOKENIZER, GenerationParams(stop=tuple(stops)), len(ids))
    events = feed(text, chunked(ids, sizes, "length"))
    expected_ids, expected_text, reason, stop = expected_outcome(ids, stops)
    assert joined(events) == (expected_ids, expected_text)
    assert events[-1] == ChoiceFinished(3, reason, len(expected_ids), stop)
    index = 0
    for event in events[:-1]:
        assert (event.choice, event.index) == (3, index)
        index += len(event.ids)
        # What was given out so far is a beginning of the whole, and none of it will turn out to be a stop string.
        assert "\ufffd" not in event.text


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=20),
    stops=st.lists(st.sampled_from(["</s>", "ab", "😀", "aab", "b the"]), max_size=2),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    min_tokens=st.integers(0, 8),
)
def test_a_choice_continues_from_every_delta_as_if_undisturbed(parts, stops, sizes, min_tokens):
    ids = list("".join(parts).encode())
    params = GenerationParams(stop=tuple(stops), min_tokens=min_tokens)
    undisturbed = feed(ChoiceText(0, TOKENIZER, params, len(ids)), chunked(ids, sizes, "length"))
    for end in range(len(undisturbed)):
        log = undisturbed[:end]
        done, shown = joined(log)
        text = ChoiceText(0, TOKENIZER, params, len(ids))
        ended = text.resume(DeliveredChoice(tuple(done), shown))
        rest = [ended] if ended else feed(text, chunked(ids[len(done) :], sizes, "length"))
        assert joined([*log, *rest]) == joined(undisturbed)
        assert rest[-1] == undisturbed[-1]
        assert not ended or end == len(undisturbed) - 1


def test_an_end_that_was_not_logged_is_told_again_without_the_engine():
    params = GenerationParams(stop=("</s>",))
    for ids, max_new_tokens, finished in [
        ([*b"hi</s>"], 99, ChoiceFinished(0, "stop", 6, "</s>")),
        ([*b"hi", EOS], 99, ChoiceFinished(0, "stop", 3)),
        ([*b"hi"], 2, ChoiceFinished(0, "length", 2)),
        ([*"😀".encode()[:2]], 2, ChoiceFinished(0, "length", 2)),
    ]:
        first = ChoiceText(0, TOKENIZER, params, max_new_tokens, eos_ids=frozenset({EOS}))
        reason = "stop" if ids[-1] == EOS else "length"
        events = feed(first, [TokenChunk(tuple(ids), (), reason)])
        again = ChoiceText(0, TOKENIZER, params, max_new_tokens, eos_ids=frozenset({EOS}))
        assert again.resume(DeliveredChoice(tuple(ids), joined(events)[1])) == events[-1] == finished


def test_other_text_for_delivered_ids_is_an_error():
    with pytest.raises(EngineError) as raised:
        ChoiceText(0, TOKENIZER, GenerationParams(), 9).resume(DeliveredChoice((97, 98), "ac"))
    assert raised.value.code == "continuation_mismatch"


def test_eos_is_in_the_ids_without_text_and_open_text_comes_out_before_it():
    text = ChoiceText(0, TOKENIZER, GenerationParams(stop=("abc",)), 9, eos_ids=frozenset({EOS}))
    assert text.feed(TokenChunk((97, 98))) == []
    assert text.feed(TokenChunk((EOS,), (), "stop")) == [
        Delta(0, 0, (97, 98, EOS), "ab"),
        ChoiceFinished(0, "stop", 3),
    ]


def test_a_character_that_never_completes_reads_as_a_replacement_at_the_end():
    text = ChoiceText(0, TOKENIZER, GenerationParams(), 9)
    assert text.feed(TokenChunk((97, 0xF0, 0x9F))) == [Delta(0, 0, (97,), "a")]
    assert text.feed(TokenChunk((), (), "length")) == [
        Delta(0, 1, (0xF0, 0x9F), "\ufffd"),
        ChoiceFinished(0, "length", 3),
    ]


def test_an_abort_gives_out_nothing_that_was_held():
    text = ChoiceText(0, TOKENIZER, GenerationParams(stop=("abc",)), 9)
    assert text.feed(TokenChunk((99, 97, 98), (), "cancelled")) == [
        Delta(0, 0, (99,), "c"),
        ChoiceFinished(0, "cancelled", 1),
    ]


def test_only_as_much_is_held_as_may_still_become_the_stop_string():
    text = ChoiceText(0, TOKENIZER, GenerationParams(stop=("aab",)), 99)
    given_out = [len(joined(text.feed(TokenChunk((97,))))[0]) for _ in range(6)]
    assert given_out == [0, 0, 1, 1, 1, 1]


def test_a_stop_string_within_min_tokens_is_text_like_any_other():
    text = ChoiceText(0, TOKENIZER, GenerationParams(stop=("ab",), min_tokens=2), 99)
    events = feed(text, chunked([*b"ababx"], [1], "length"))
    assert joined(events) == ([*b"abab"], "ab")
    assert events[-1] == ChoiceFinished(0, "stop", 4, "ab")


def test_logprobs_stay_with_their_tokens():
    params = GenerationParams(stop=("abc",), logprobs=True, top_logprobs=1)
    text = ChoiceText(0, TOKENIZER, params, 99)
    raw = [RawLogprob(token_id, -float(i), ((token_id, -float(i)),)) for i, token_id in enumerate([97, 98, 120, 0xF0])]
    events = text.feed(TokenChunk((97,), (raw[0],))) + text.feed(TokenChunk((98, 120, 0xF0), tuple(raw[1:])))
    assert [delta.ids for delta in events] == [(97, 98, 120)]
    assert [(each.id, each.token, each.logprob) for each in events[0].logprobs] == [
        (97, "a", 0.0),
        (98, "b", -1.0),
        (120, "x", -2.0),
    ]
    assert events[0].logprobs[0].top[0].token == "a"
    [last, _] = text.feed(TokenChunk((), (), "length"))
    assert last.logprobs[0].token == "bytes:\\xf0"


@pytest.mark.parametrize(
    ("given", "prompt", "context", "resolved"),
    [
        ({}, 10, 4096, 1024),
        ({}, 4000, 4096, 96),  # the default yields to the context
        ({"max_tokens": 50}, 4000, 4096, 50),
        ({"max_new_tokens": None}, 96, 4096, 4000),
        ({"max_length": 3000}, 100, 4096, 2900),  # asked for, so the default does not cap it
        ({"max_length": 3000, "max_tokens": 7}, 100, 4096, 7),
        ({"max_length": 3000, "max_tokens": 1024}, 100, 4096, 1024),  # asked for, though it be the default
        ({"max_length": 9000}, 100, 4096, 3996),
        ({"max_tokens": 96}, 4000, 4096, 96),
    ],
)
def test_the_number_of_new_tokens(given, prompt, context, resolved):
    assert resolve_max_new_tokens(GenerationParams(**given), prompt, context) == resolved


@pytest.mark.parametrize(
    ("given", "prompt", "counts"),
    [
        ({}, 100, (100, 1, 100)),
        ({"max_tokens": 51}, 50, (50, 51, 100)),
        ({"max_tokens": 1024}, 50, (50, 1024, 100)),
        ({"min_tokens": 60}, 50, (50, 60, 100)),
        ({"max_length": 50}, 50, (50, 1, 50)),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_the_counts(given, prompt, counts):
    with pytest.raises(ContextLengthExceeded) as raised:
        resolve_max_new_tokens(GenerationParams(**given), prompt, 100)
    details = raised.value.details
    assert (details["prompt_tokens"], details["max_new_tokens"], details["context_tokens"]) == counts
    assert raised.value.hint


def test_the_seeds_of_choices_are_as_documented():
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 2) == int.from_bytes(hashlib.sha256(b"7:2").digest()[:8], "big") >> 1
    assert len({choice_seed(7, i) for i in range(128)}) == 128


# -- over an engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def engine():
    engine = ScriptedEngine(ScriptedOptions(slots=8, allow_faults=True))
    await engine.start()
    yield engine
    assert engine.running == 0, "a slot leaked"
    await engine.close()


def job(text="hi", **kwargs):
    fields = {key: kwargs.pop(key) for key in ("delivered", "attempt", "stop") if key in kwargs}
    params = GenerationParams(**{"max_tokens": 20, **kwargs})
    prompt = tuple(TOKENIZER.render_chat([Message(role="user", content=text)]))
    return GenerationJob(
        **{"job_id": "j", "attempt": 1, **fields},
        prompt_ids=prompt,
        params=params,
        max_new_tokens=params.max_new_tokens,
        eos_ids=TOKENIZER.eos_ids,
    )


async def run(engine, job):
    return [event async for event in generate_deltas(engine, TOKENIZER, job)]


async def test_n_choices_interleave_and_each_has_its_own_end(engine):
    events = await run(engine, job(n=4, seed=3))
    ends = [event for event in events if isinstance(event, ChoiceFinished)]
    assert sorted(end.choice for end in ends) == [0, 1, 2, 3]
    assert {end.reason for end in ends} == {"length"}
    by_choice = {i: joined([e for e in events if isinstance(e, Delta) and e.choice == i])[0] for i in range(4)}
    assert all(len(ids) == 20 for ids in by_choice.values())
    assert len({tuple(ids) for ids in by_choice.values()}) == 4
    assert by_choice[0] == joined(await run(engine, job(seed=3)))[0]
    for choice, ids in by_choice.items():
        assert ids == joined(await run(engine, job(seed=choice_seed(3, choice))))[0]


async def test_of_n_choices_only_the_unfinished_are_run_again(engine):
    whole = await run(engine, job(n=3, seed=3))
    ids = {i: joined([e for e in whole if isinstance(e, Delta) and e.choice == i]) for i in range(3)}
    delivered = {
        0: DeliveredChoice(tuple(ids[0][0]), ids[0][1], is_finished=True),
        2: DeliveredChoice(tuple(ids[2][0][:5]), TOKENIZER.decode(ids[2][0][:5])),
    }
    rest = await run(engine, job(n=3, seed=3, delivered=delivered, attempt=2))
    assert {event.choice for event in rest} == {1, 2}
    assert joined([e for e in rest if isinstance(e, Delta) and e.choice == 1]) == ids[1]
    assert joined([e for e in rest if isinstance(e, Delta) and e.choice == 2])[0] == ids[2][0][5:]
    assert next(e for e in rest if isinstance(e, Delta) and e.choice == 2).index == 5


@pytest.mark.parametrize("n", [1, 5])
async def test_closing_frees_all_slots_before_it_returns(engine, n):
    async with aclosing(generate_deltas(engine, TOKENIZER, job(n=n, max_tokens=10_000))) as events:
        async for _ in events:
            assert engine.running == n
            break
    assert engine.running == 0


@pytest.mark.parametrize("n", [1, 5])
async def test_cancelling_frees_all_slots(engine, n):
    seen = asyncio.Event()

    async def read():
        async for _ in generate_deltas(engine, TOKENIZER, job("[[fault: hang at 5]]", n=n)):
            seen.set()

    task = asyncio.create_task(read())
    await seen.wait()
    assert engine.running == n
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_of_the_engine_ends_all_choices(engine, n):
    with pytest.raises(EngineError, match="token 5"):
        await run(engine, job("[[fault: raise at 5]]", n=n))
    assert engine.running == 0


async def test_a_stop_string_ends_the_sequence_in_the_engine_too(engine):
    events = await run(engine, job('[[spell: "one</s>two"]]', stop=("</s>",)))
    assert joined(events) == ([*b"one</s>"], "one")
    assert engine.running == 0


@pytest.mark.parametrize("n", [1, 2])
async def test_a_slow_reader_gets_what_waits_in_one_delta(engine, n):
    lengths = []
    async with aclosing(generate_deltas(engine, TOKENIZER, job(n=n, max_tokens=50, temperature=0))) as events:
        async for event in events:
            if isinstance(event, Delta):
                lengths.append(len(event.ids))
                steps = engine.steps
                while engine.running and engine.steps < steps + 10:  # the reader is away for ten steps
                    await asyncio.sleep(0)
    assert sum(lengths) == 50 * n
    assert max(lengths) >= 10
    assert len(lengths) <= 12 * n


@pytest.mark.parametrize(
    ("param", "given"),
    [("logit_bias", {"logit_bias": {10**8: 100}}), ("stop_token_ids", {"stop_token_ids": (-1,)})],
)
async def test_ids_beyond_the_vocabulary_are_refused(engine, param, given):
    with pytest.raises(InvalidRequest) as raised:
        await run(engine, job(**given))
    assert raised.value.details["param"] == param
