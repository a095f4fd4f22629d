"""What a stream may hold when its worker dies: half a character, half a stop string, some of its choices, scores."""

from __future__ import annotations

import json

import pytest

from tests.faults.trial import Trial, ledger_of, running, stopping
from tests.fleets import Fleet, wait_until
from tokenfleet.wire.errors import InvalidRequest, StreamInterrupted
from tokenfleet.wire.events import ChoiceFinished, Delta, Finished, Started
from tokenfleet.wire.toolcalls import parse

SAID = "naïve 🚀 café — 世界! " * 12


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "' + "Łódź" * 9 + '"}}\n</tool_call>'


def spell(text: str) -> str:
    """A prompt that has the scripted engine say ``text`` one byte a token, at first not to its end."""
    return stopping(100, f"[[spell: {json.dumps(text, ensure_ascii=False)}]]")


def test_characters_stop_strings_choices_and_logprobs_survive_a_kill(fleet: Fleet) -> None:
    """Many streams, so that the one kill lands within characters and within stop strings; all at 30 ms a byte."""
    first = fleet.start_worker(token_ms=30.0)
    with Trial(fleet) as trial:
        spelled = [trial.submit(spell("x" * k + SAID)) for k in range(12)]
        stopped = [
            trial.submit(spell("y" * k + "abcdef" * 40 + "STOP HERE" + "z" * 50), stop=["STOP HERE"]) for k in range(6)
        ]
        # A stop string's beginning, again and again: tokens are held back most of the time.
        held = [trial.submit(spell("z" * k + "STOP HER" * 30), stop=["STOP HERE"]) for k in range(6)]
        several = trial.submit("[[eos: 900]]", n=4, max_new_tokens=800, seed=7)
        uneven = [
            trial.submit(stopping(100), n=3, max_new_tokens=200, seed=k, logprobs=True, top_logprobs=2)
            for k in range(2)
        ]
        called = [trial.submit(spell("w" * k + CALL), tools=TOOLS) for k in range(4)]
        readings = trial.watch([*spelled, *stopped, *held, several, *uneven, *called])
        trial.until_streaming(15)
        second = fleet.start_worker(token_ms=3.0, wait=False)
        trial.kill(first)
        verdict = trial.judge(may_run_plain=True)
        assert verdict.cut_streams == len(readings)
        texts = {reading.job.id: reading.text for reading in readings}
        assert [texts[job.id] for job in spelled] == ["x" * k + SAID for k in range(12)]
        assert [texts[job.id] for job in stopped] == ["y" * k + "abcdef" * 40 for k in range(6)]
        assert [texts[job.id] for job in held] == ["z" * k + "STOP HER" * 30 for k in range(6)]
        assert all(job.result(30).choices[0].stop == "STOP HERE" for job in stopped)
        # Every byte boundary counts as a token, so somewhere the cut fell into a character.
        delivered = [line["delivered_tokens"] for line in second.record if line["event"] == "prefill"]
        assert len(delivered) == 24 + 4 + 6 + 4
        for k, job in enumerate(called):
            result = job.result(30)
            parsed = parse(result.choices[0].text, result.parser, key=job.id)
            assert (parsed.content or "") == "w" * k
            assert [(c.function.name, json.loads(c.function.arguments)) for c in parsed.tool_calls] == [
                ("weather", {"city": "Łódź" * 9})
            ]
        # The same seed on an undisturbed worker gives the same choices.
        again = trial.client.submit("[[eos: 900]]", n=4, max_new_tokens=800, seed=7).result(60)
        assert [c.text for c in several.result(30).choices] == [c.text for c in again.choices]
        for job in uneven:
            for choice in job.result(30).choices:
                assert [entry.id for entry in choice.logprobs] == list(choice.ids)
                assert all(len(entry.top) == 2 for entry in choice.logprobs)


def test_only_unfinished_choices_go_on(fleet: Fleet) -> None:
    first = fleet.start_worker(token_ms=200.0)
    with Trial(fleet) as trial:
        # With this seed they have 2, 58, 66 and 114 tokens.
        job = trial.submit("count", n=4, max_new_tokens=900, stop=[" river"], seed=2, temperature=2.0, top_p=1.0)
        [reading] = trial.watch(job)
        wait_until(lambda: any(isinstance(e, ChoiceFinished) for e in reading.events), 20, "a choice is finished")
        trial.kill(first, cuts=False)
        done = {e.choice for e in reading.events if isinstance(e, ChoiceFinished)}
        assert len(done) < 4, "all are finished: nothing would be proven"
        second = fleet.start_worker(token_ms=3.0)
        trial.judge(may_run_plain=True)
        resumed = {int(line["sequence_id"][-3:]) for line in second.record if line["event"] == "prefill"}
        assert resumed
        assert resumed.isdisjoint(done)


def test_scores_are_run_again_with_one_end(fleet: Fleet) -> None:
    first = fleet.start_worker()
    with Trial(fleet) as trial:
        stopped = trial.submit("count", max_new_tokens=3000)
        [streaming] = trial.watch(stopped)
        trial.until_streaming(5)
        first.kill_group()
        job = trial.client.submit_scores(["good", "bad"])
        trial.history.note("accepted", job=job.id)
        trial.watch(job, "scores")
        fleet.start_worker(token_ms=1.0)
        trial.fault("SIGKILL", first.pid, cuts=False)
        trial.judge(may_run_plain=True)
        assert len(job.result(30).scores) == 2
        assert streaming.tokens == 3000


def test_what_cant_be_continued_ends_with_a_typed_error(fleet: Fleet) -> None:
    """The spare worker serves another version of the model: never silently other text."""
    first = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        job = trial.submit("count", max_new_tokens=2000)
        fresh = trial.submit("[[fault: hang at 0 on attempt 1]]", max_new_tokens=20)
        [reading, _] = trial.watch([job, fresh])
        trial.until_streaming(20, [reading])
        fleet.start_worker(salted=False, token_ms=2.0, wait=False)
        trial.kill(first, cuts=False)
        trial.judge(may_run_plain=True)
        with pytest.raises(StreamInterrupted):
            job.result(30)
        assert ledger_of(fleet, job)["state"] == "failed"
        assert len(fresh.result(30).choices[0].ids) == 20, "nothing of it was delivered: it may start anew"


def test_another_version_leaves_streams_to_a_worker_of_the_same_while_there_is_one(fleet: Fleet) -> None:
    """Two workers of one version and one of another, as in the middle of an upgrade. Every stream goes on."""
    same = [fleet.start_worker(salted=True, token_ms=10.0, wait=False) for _ in range(2)]
    fleet.start_worker(salted=False, token_ms=10.0, wait=False)
    for index, worker in enumerate(fleet.workers):
        fleet.wait_ready(worker, index)
    with Trial(fleet) as trial:
        jobs = [trial.submit(f"count {k}", max_new_tokens=300) for k in range(24)]
        trial.watch(jobs)
        trial.until_streaming(20)
        victim = max(same, key=lambda worker: len(running(worker)))
        hit = len(running(victim))
        assert hit >= 4, "the other version would hardly be asked"
        trial.kill(victim)
        trial.judge(may_run_plain=True)
        results = [job.result(30) for job in jobs]
        assert all(len(result.choices[0].ids) == 300 for result in results)
        assert [result.usage.attempts for result in results].count(2) == hit


def test_what_an_engine_cant_continue_is_refused_or_ends_with_its_worker(fleet: Fleet) -> None:
    """A job that must be durable is told before its first token, any other when its worker dies."""
    uncontinued = {"uncontinued": ["presence_penalty"]}
    first = fleet.start_worker(token_ms=40.0, **uncontinued)
    with Trial(fleet) as trial:
        loose, plain = (trial.submit("count", max_new_tokens=900, presence_penalty=p) for p in (0.5, 0.0))
        durable = trial.submit("count", max_new_tokens=900, durable=True)
        refused = trial.submit("count", max_new_tokens=900, presence_penalty=0.5, durable=True)
        cut = trial.watch([loose, plain, durable])
        [nothing] = trial.watch(refused)
        trial.until_streaming(20, cut)
        fleet.start_worker(token_ms=3.0, wait=False, **uncontinued)
        trial.kill(first)
        trial.judge(may_run_plain=True)
        with pytest.raises(StreamInterrupted):
            loose.result(30)
        with pytest.raises(InvalidRequest) as caught:
            refused.result(30)
        assert caught.value.code == "not_durable"
        assert nothing.tokens == 0
        assert [len(job.result(30).choices[0].ids) for job in (plain, durable)] == [900, 900]


def test_kinds_of_events_after_a_takeover(fleet: Fleet) -> None:
    """The reader sees a pause, not a restart: one more `started`, the same tokens, one end."""
    first = fleet.start_worker(salted=True, token_ms=10.0)
    with Trial(fleet) as trial:
        job = trial.submit(stopping(600), max_new_tokens=700)
        [reading] = trial.watch(job)
        trial.until_streaming(20)
        fleet.start_worker(salted=True, token_ms=3.0, wait=False)
        trial.kill(first, whole_group=False)
        trial.judge()
        kinds = [type(event) for event in reading.events if not isinstance(event, Delta)]
        assert kinds.count(Started) == 2
        assert kinds[-1] is Finished
        late = trial.read_now(job, "late", after=5)
        assert late == reading.events[5:]
