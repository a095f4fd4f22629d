"""How the tests of the contract ask an engine, and what holds of every answer."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from tests.contract.reference import processed
from tests.processes import on_this_machine
from tokenfleet.engines.generation import GenerationJob, generate_deltas
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.events import ChoiceFinished, Delta

TEXTS = ["The quick brown fox", "Hello world, how are you?", "naïve café 世界 😀", "x", "Two spaces.  And\na line"]
GREEDY = {"temperature": 0}
FREE = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}


class Answer:
    """All events of one job, checked for what holds of every job."""

    def __init__(self, subject, job, events):
        self.job, self.events = job, events
        self.ends = {event.choice: event for event in events if isinstance(event, ChoiceFinished)}
        assert len(self.ends) == len([event for event in events if isinstance(event, ChoiceFinished)])
        self.ids = {choice: list(each.ids) for choice, each in job.delivered.items()}
        self.texts = {choice: each.text for choice, each in job.delivered.items()}
        self.logprobs = {}
        for event in events:
            ids = self.ids.setdefault(event.choice, [])
            self.texts.setdefault(event.choice, "")
            if isinstance(event, Delta):
                assert event.index == len(ids)
                assert event.ids
                event.text.encode()  # valid Unicode
                ids += event.ids
                self.texts[event.choice] += event.text
                self.logprobs.setdefault(event.choice, []).extend(event.logprobs)
            else:
                assert event.tokens == len(ids) <= job.max_new_tokens
                self._check_text(subject, event, ids, self.texts[event.choice])

    def _check_text(self, subject, end, ids, text):
        skip = self.job.params.skip_special_tokens
        ends_in_id = end.reason == "stop" and end.stop is None
        whole = subject.tokenizer.decode(ids[:-1] if ends_in_id else ids, skip_special_tokens=skip)
        match end.reason:
            case "stop" if end.stop is not None:
                assert whole.startswith(text + end.stop)
                within_minimum = subject.tokenizer.decode(ids[: self.job.params.min_tokens], skip_special_tokens=skip)
                assert end.stop not in text[len(within_minimum) :]
            case "stop":
                assert ids[-1] in {*self.job.params.stop_token_ids, subject.eos_id}
                assert text == whole
            case "length":
                assert len(ids) == self.job.max_new_tokens
                assert text == whole
            case reason:
                pytest.fail(f"a choice ended with {reason}")

    @property
    def only(self):
        [ids] = self.ids.values()
        return ids

    @property
    def text(self):
        [text] = self.texts.values()
        return text

    @property
    def end(self):
        [end] = self.ends.values()
        return end


def make_job(subject, text=TEXTS[0], *, job_id="j", attempt=1, delivered=None, **params):
    params = GenerationParams(**{"max_new_tokens": 16, **params})
    return GenerationJob(
        job_id=job_id,
        attempt=attempt,
        prompt_ids=tuple(subject.tokenizer.encode(text)),
        params=params,
        max_new_tokens=params.max_new_tokens,
        eos_ids=frozenset({subject.eos_id}),
        delivered=delivered or {},
    )


async def run(subject, job):
    return Answer(subject, job, [event async for event in generate_deltas(subject.engine, subject.tokenizer, job)])


async def ask(subject, text=TEXTS[0], **kwargs):
    return await run(subject, make_job(subject, text, **kwargs))


def by_rank(subject, params):
    """``params`` with the keys of logit_bias replaced: 0 is the best first token after TEXTS[0], 1 the next."""
    order = np.argsort(-subject.logits(subject.tokenizer.encode(TEXTS[0]), [])[0])
    if "logit_bias" not in params:
        return params
    return {**params, "logit_bias": {int(order[rank]): bias for rank, bias in params["logit_bias"].items()}}


async def until(condition, limit_s=60.0):
    deadline = time.monotonic() + on_this_machine(limit_s)
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        await asyncio.sleep(0.002)


def assert_greedy(subject, job, ids):
    """Teacher-forced: every id has the best score given its own prefix, or is within tolerance of it."""
    barred = {subject.eos_id, *job.params.stop_token_ids}
    if job.params.ignore_eos:
        barred.discard(subject.eos_id)
    truth = subject.logits(job.prompt_ids, ids)
    for place, token_id in enumerate(ids):
        scores = processed(truth[place], job.params, job.prompt_ids, ids[:place], barred)
        assert scores[token_id] >= scores.max() - subject.tolerance, f"token {place}"
