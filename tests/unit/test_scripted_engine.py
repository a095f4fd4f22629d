"""The scripted engine: its clock, its salts, its record, its faults."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from tokenfleet.engines.base import Sequence
from tokenfleet.engines.scripted import (
    ScriptedEngine,
    ScriptedOptions,
    ScriptedTokenizer,
    read_record,
    salt_of,
    salts_by_token,
)
from tokenfleet.engines.scripted.tokenizer import EOS
from tokenfleet.wire.chat import GenerationParams, Message
from tokenfleet.wire.errors import EngineDead, EngineError

TOKENIZER = ScriptedTokenizer()
ROOT = Path(__file__).parents[2]


def sequence(text="hi", *, delivered=(), attempt=1, name="s", **params):
    params = GenerationParams(**{"max_tokens": 20, **params})
    return Sequence(
        sequence_id=name,
        prompt_ids=tuple(TOKENIZER.render_chat([Message(role="user", content=text)])),
        params=params,
        max_new_tokens=params.max_new_tokens,
        seed=params.seed,
        delivered_ids=tuple(delivered),
        eos_ids=TOKENIZER.eos_ids,
        extra={"attempt": attempt},
    )


@pytest.fixture
async def start():
    engines = []

    async def start(**options):
        engine = ScriptedEngine(ScriptedOptions(**options))
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.close()


async def collect(engine, sequence):
    return [token_id async for chunk in engine.generate(sequence) for token_id in chunk.ids]


# -- tokens -----------------------------------------------------------------------------------------------------------


async def test_tokens_follow_from_prompt_seed_and_index(start):
    one, other = await start(), await start()
    ids = await collect(one, sequence(seed=1))
    assert await collect(other, sequence(seed=1)) == ids
    assert await collect(other, sequence(seed=1, delivered=ids[:7])) == ids[7:]
    assert await collect(other, sequence(seed=2)) != ids
    assert await collect(other, sequence("ho", seed=1)) != ids


async def test_adapters_change_the_text(start):
    engine = await start(adapters=("pirate",))
    plain = sequence(temperature=0)
    adapted = Sequence("a", plain.prompt_ids, plain.params, 20, eos_ids=plain.eos_ids, adapter="pirate")
    assert await collect(engine, plain) != await collect(engine, adapted)


async def test_exactly_the_text_asked_for(start):
    engine = await start()
    said = await collect(engine, sequence(r'say [[say: "a \"quoted\" 🚀 the\nriver]]"]]', max_tokens=99))
    assert TOKENIZER.decode(said[:-1]) == 'a "quoted" 🚀 the\nriver]]'
    assert said[-1] == EOS
    spelled = await collect(engine, sequence('[[spell: "🚀 é"]]'))
    assert bytes(spelled[:-1]).decode() == "🚀 é"
    assert spelled[-1] == EOS


async def test_eos_where_it_was_asked_for(start):
    engine = await start(eos_after=3)
    assert (await collect(engine, sequence())).index(EOS) == 3
    assert (await collect(engine, sequence("[[eos: 6]]"))).index(EOS) == 6
    assert (await collect(engine, sequence(min_tokens=9))).index(EOS) == 9
    assert len(await collect(engine, sequence(ignore_eos=True))) == 20


async def test_malformed_directives_are_text(start):
    engine = await start(allow_faults=True)
    plain = '[[say: unquoted]] [[fault: explode at 1]] [[say: "\\q"]] [[eos: x]] [['
    assert len(await collect(engine, sequence(plain))) == 20


# -- salts ------------------------------------------------------------------------------------------------------------


async def test_a_salted_token_shows_who_made_it_and_out_of_what(start, tmp_path):
    engine = await start(salted=True, record_path=str(tmp_path / "record"))
    first = await collect(engine, sequence(name="first"))
    second = await collect(engine, sequence(name="second", delivered=first[:8]))
    restarted = await collect(engine, sequence(name="restarted"))
    salts = {
        line["sequence_id"]: line["salt"] for line in read_record(tmp_path / "record") if line["event"] == "prefill"
    }
    prompt = sequence().prompt_ids

    assert salts_by_token(prompt, first[:8] + second, salts.values()) == [salts["first"]] * 8 + [salts["second"]] * 12
    assert {salt_of(token_id) for token_id in second} == {salts["second"] & 0xFFFF}
    assert f"-{salts['second'] & 0xFFFF:04x}" in TOKENIZER.decode(second)
    # Other text, and a splice that does not follow from what is before it, are both found out.
    assert first[:12] != restarted[:12]
    assert None in salts_by_token(prompt, first[:8] + restarted[8:], salts.values())
    assert None in salts_by_token(prompt, first[:8] + second[1:], salts.values())


# -- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """Puts a loop's clock in the test's hands: time stands still unless all wait, then it jumps to the next timer."""

    def __init__(self, loop, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(loop, "time", lambda: self.now)
        select = loop._selector.select

        def jump(timeout=None):
            if timeout:
                self.now += timeout
            return select(0)

        monkeypatch.setattr(loop._selector, "select", jump)


async def test_the_clock_is_exact_and_delays_do_not_add_up(start, monkeypatch):
    loop = asyncio.get_running_loop()
    clock = Clock(loop, monkeypatch)
    engine = await start(ttft_ms=100, token_ms=7, prefill_us_per_token=1000)
    tokens = len(sequence().prompt_ids)
    began, times = clock.now, []
    async for chunk in engine.generate(sequence()):
        times += [clock.now - began] * len(chunk.ids)
        if len(times) == 5:
            clock.now += 0.050  # the loop was held up
    due = [0.1 + tokens * 0.001 + i * 0.007 for i in range(20)]
    late = [actual - each for actual, each in zip(times, due, strict=True)]
    assert all(each >= -1e-9 for each in late), "a token came early"
    assert max(late[:5] + late[13:]) < 0.0021  # the loop's own resolution of timers is 1 ms
    assert max(late[5:12]) > 0.04


async def test_what_a_standstill_took_is_put_off_beyond_what_may_be_made_up_for(start, monkeypatch):
    loop = asyncio.get_running_loop()
    clock = Clock(loop, monkeypatch)
    engine = await start(token_ms=10, most_behind_ms=30)
    began, times = clock.now, []
    async for chunk in engine.generate(sequence()):
        times += [clock.now - began] * len(chunk.ids)
        if len(times) == 5:
            clock.now += 5.0  # the machine stood still
    due = [i * 0.01 for i in range(20)]
    late = [actual - each for actual, each in zip(times, due, strict=True)]
    assert max(late[:5]) < 0.0021
    # Those of the last 30 ms come at once; the rest as much later as nobody made up for.
    assert late[5] == pytest.approx(4.99, abs=0.02)
    assert late[9:] == [pytest.approx(4.96, abs=0.02)] * 11


async def test_sequences_beyond_the_slots_wait_their_turn(start, monkeypatch):
    clock = Clock(asyncio.get_running_loop(), monkeypatch)
    engine = await start(slots=2, token_ms=10)
    began, ended = clock.now, {}

    async def one(name):
        await collect(engine, sequence(name=name, max_tokens=10))
        ended[name] = clock.now - began

    tasks = [asyncio.create_task(one(name)) for name in "abc"]
    await asyncio.sleep(0.05)
    assert engine.running == 2
    await asyncio.gather(*tasks)
    assert ended["a"] == pytest.approx(0.09, abs=0.003)
    assert ended["c"] == pytest.approx(0.18, abs=0.006)
    assert engine.running == 0


# -- record -----------------------------------------------------------------------------------------------------------


async def test_the_record_has_everything_that_happened(start, tmp_path):
    engine = await start(record_path=str(tmp_path / "record"), token_ms=1)
    ids = await collect(engine, sequence(name="whole", seed=5))
    async with aclosing(engine.generate(sequence(name="left", max_tokens=5000, delivered=ids[:3]))) as chunks:
        async for _ in chunks:
            break
    lines = read_record(tmp_path / "record")
    assert [line["event"] for line in lines if line["event"] != "tokens"] == [
        "start",
        "prefill",
        "end",
        "prefill",
        "end",
    ]
    made = [each for line in lines if line["event"] == "tokens" for each in line["made"]]
    assert [each[1:3] for each in made if each[0] == "whole"] == [[i, token_id] for i, token_id in enumerate(ids)]
    prefills = [line for line in lines if line["event"] == "prefill"]
    assert [(each["prompt_tokens"], each["delivered_tokens"]) for each in prefills] == [(5, 0), (5, 3)]
    assert [line["reason"] for line in lines if line["event"] == "end"] == ["length", "abort"]
    assert all({"t", "wall", "pid"} <= line.keys() for line in lines)


KILLED = """
import asyncio, json, sys
from tests.unit.test_scripted_engine import sequence
from tokenfleet.engines.scripted import ScriptedEngine, ScriptedOptions
async def main():
    engine = ScriptedEngine(ScriptedOptions(allow_faults=True, token_ms=1, record_path=sys.argv[1], salted=True))
    await engine.start()
    async for chunk in engine.generate(sequence(sys.argv[2])):
        print(json.dumps(chunk.ids), flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize(("kind", "status"), [("die", -signal.SIGKILL), ("exit", 1)])
def test_a_kill_loses_nothing_that_was_delivered(tmp_path, kind, status):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "record"), f"[[fault: {kind} at 12]]"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == status
    delivered = [token_id for line in done.stdout.splitlines() for token_id in json.loads(line)]
    lines = read_record(tmp_path / "record")
    made = [each[2] for line in lines if line["event"] == "tokens" for each in line["made"]]
    assert len(made) == 12
    assert delivered == made[: len(delivered)] != []
    assert lines[-1]["event"] == "fault"
    assert (lines[-1]["kind"], lines[-1]["index"]) == (kind, 12)


# -- faults -----------------------------------------------------------------------------------------------------------


async def read(engine, sequence, into):
    async for chunk in engine.generate(sequence):
        into += chunk.ids


async def until_stuck(engine):
    """Wait until no step was made for many turns of the loop."""
    steps, turns = -1, 0
    while turns < 200:
        turns = turns + 1 if engine.steps == steps else 0
        steps = engine.steps
        await asyncio.sleep(0)


@pytest.mark.parametrize(("kind", "code"), [("raise", "engine_error"), ("oom", "out_of_memory")])
async def test_one_failing_sequence_leaves_the_others_alone(start, kind, code):
    engine = await start(allow_faults=True)
    fine = asyncio.create_task(collect(engine, sequence(name="fine")))
    ids = []
    with pytest.raises(EngineError) as raised:
        await read(engine, sequence(f"[[fault: {kind} at 7]]"), ids)
    assert (raised.value.code, len(ids)) == (code, 7)
    assert len(await fine) == 20
    await engine.check()


async def test_a_dead_engine_fails_everything(start):
    engine = await start(allow_faults=True, slots=2)
    others = [asyncio.create_task(collect(engine, sequence(name=f"o{i}", max_tokens=10_000))) for i in range(3)]
    with pytest.raises(EngineDead):
        await collect(engine, sequence("[[fault: dead at 3]]", name="bad"))
    for other in others:
        with pytest.raises(EngineDead):
            await other
    with pytest.raises(EngineDead):
        await engine.check()
    assert engine.running == 0


async def test_a_hanging_sequence_keeps_its_slot_while_others_run(start):
    engine = await start(allow_faults=True)
    ids = []
    task = asyncio.create_task(read(engine, sequence("[[fault: hang at 4]]", name="hangs"), ids))
    assert len(await collect(engine, sequence(name="runs"))) == 20
    await until_stuck(engine)
    assert (len(ids), engine.running) == (4, 1)
    task.cancel()
    await asyncio.wait([task])
    assert engine.running == 0


async def test_a_frozen_engine_makes_no_progress_at_all(start):
    engine = await start(allow_faults=True)
    frozen, other = [], []
    tasks = [
        asyncio.create_task(read(engine, sequence("[[fault: freeze at 4]]"), frozen)),
        asyncio.create_task(read(engine, sequence(name="other", max_tokens=10_000), other)),
    ]
    await until_stuck(engine)
    assert len(frozen) == 4
    assert len(other) <= 5
    assert engine.running == 2
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert engine.running == 0


async def test_a_blocked_loop_stands_still_and_then_goes_on(start):
    engine = await start(allow_faults=True)
    times, task = [], asyncio.create_task(collect(engine, sequence("[[fault: block 0.3 at 4]]")))
    while not task.done():
        times.append(time.monotonic())
        await asyncio.sleep(0)
    assert max(after - before for before, after in itertools.pairwise(times)) >= 0.3
    assert len(await task) == 20


async def test_a_fault_may_be_for_one_attempt_only(start):
    engine = await start(allow_faults=True)
    text = "[[fault: raise at 4 on attempt 1]]"
    with pytest.raises(EngineError):
        await collect(engine, sequence(text, attempt=1))
    assert len(await collect(engine, sequence(text, attempt=2))) == 20


async def test_without_leave_faults_are_text(start):
    engine = await start()
    assert len(await collect(engine, sequence("[[fault: die at 1]]"))) == 20


async def test_closing_ends_what_runs_and_twice_is_once(start):
    engine = await start(token_ms=1000)
    task = asyncio.create_task(collect(engine, sequence(max_tokens=500)))
    while not engine.running:
        await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    await task
    assert engine.running == 0
    with pytest.raises(EngineDead):
        await collect(engine, sequence())
