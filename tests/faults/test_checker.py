"""The checker itself: a good run passes, and each way in which one can be bad is found."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.checker import Evidence, check
from tests.faults.checker.attribution import digest, mix
from tests.faults.checker.vocabulary import text_of

A, B = "aaaaaaaa-0000-0000-0000-000000000001", "bbbbbbbb-0000-0000-0000-000000000002"
PROMPT = [258, 99, 100, 261, 259]


class Run:
    """Writes down what an honest fleet would: attempts that are cut, two readers that see everything."""

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.random = random.Random(7)
        self.t = 0.0

    def job(self, job: str, attempts: list[int], *, n: int = 1, in_flight: int = 3) -> None:
        """``attempts``: how many tokens of each choice each of them delivers."""
        log: list[dict[str, Any]] = [{"type": "queued", "t_ms": 1, "model": "m"}]
        ids: dict[int, list[int]] = {choice: [] for choice in range(n)}
        for epoch, count in enumerate(attempts, 1):
            log.append({"type": "started", "epoch": epoch, "worker": f"w{epoch}", "prompt_tokens": len(PROMPT)})
            is_last = epoch == len(attempts)
            for choice in range(n):
                self._attempt(job, epoch, choice, ids[choice], count, 0 if is_last else in_flight, log)
        for choice in range(n):
            log.append({"type": "choice_finished", "choice": choice, "reason": "length", "tokens": len(ids[choice])})
        tokens = sum(map(len, ids.values()))
        usage = {"prompt_tokens": len(PROMPT), "completion_tokens": tokens, "attempts": len(attempts)}
        log.append({"type": "finished", "usage": usage})
        choices = [{"index": choice, "text": text_of(ids[choice])} for choice in range(n)]
        self.evidence.dump["jobs"][job] = {
            "hash": {
                "state": "finished", "seq": str(len(log)), "epoch": str(len(attempts)), "strikes": "0",
                "prompt": json.dumps(PROMPT),
            },
            "log": [[f"{k}-0", json.dumps(event)] for k, event in enumerate(log, 1)],
            "celery": json.dumps({"status": "SUCCESS", "result": {"job_id": job, "choices": choices}}),
        }  # fmt: skip
        self.note("accepted", job=job, n=n, max_new_tokens=len(ids[0]))
        for by, after in (("early", 0), ("late", 4)):
            self.note("open", by=by, job=job, after=after)
            for seq, event in enumerate(log[after:], after + 1):
                self.note("event", by=by, job=job, seq=seq, event=event)
        self.note("fault", what="SIGKILL", pid=1, cuts=len(attempts) > 1)

    def _attempt(
        self, job: str, epoch: int, choice: int, ids: list[int], count: int, in_flight: int, log: list[dict[str, Any]]
    ) -> None:
        salt = self.random.getrandbits(63)
        sequence = f"{job}-{epoch:04d}-{choice:03d}"
        self._record("prefill", sequence_id=sequence, salt=salt, delivered_tokens=len(ids))
        state = digest(PROMPT)
        for token in ids:
            state = mix(state ^ token)
        for k in range(count + in_flight):
            token = 1024 + (salt & 0xFFFF) * 16 + (mix(state ^ salt) & 15)
            state = mix(state ^ token)
            self._record("tokens", made=[[sequence, len(ids) if k < count else len(ids) + k - count, token, salt]])
            if k < count:
                text = text_of([token])
                log.append({"type": "delta", "choice": choice, "index": len(ids), "ids": [token], "text": text})
                ids.append(token)

    def _record(self, event: str, **fields: Any) -> None:
        self.evidence.records.append({"event": event, **fields})

    def note(self, kind: str, **fields: Any) -> None:
        self.t += 0.01
        self.evidence.history.append({"kind": kind, "t": self.t, **fields})


def good_run() -> Evidence:
    run = Run()
    run.job(A, [8, 12, 5])
    run.job(B, [6, 7], n=2)
    return run.evidence


# -- the evidence's parts, for bending them ---------------------------------------------------------------------------


def log_of(evidence: Evidence, job: str) -> list[dict[str, Any]]:
    return [json.loads(text) for _, text in evidence.dump["jobs"][job]["log"]]


def put_log(evidence: Evidence, job: str, log: list[dict[str, Any]], *, told: bool = True) -> None:
    """Replace the log, and, where it was told so, what readers saw of it."""
    entry = evidence.dump["jobs"][job]
    entry["log"] = [[f"{k}-0", json.dumps(event)] for k, event in enumerate(log, 1)]
    entry["hash"]["seq"] = str(len(log))
    if told:
        at = next(k for k, line in enumerate(evidence.history) if line.get("job") == job and line["kind"] == "open")
        evidence.history = [
            line for line in evidence.history if line.get("job") != job or line["kind"] not in ("event", "open")
        ]
        lines = [{"kind": "open", "t": 0.5, "by": "early", "job": job, "after": 0}]
        lines += [
            {"kind": "event", "t": 0.5 + k / 100, "by": "early", "job": job, "seq": k, "event": event}
            for k, event in enumerate(log, 1)
        ]
        evidence.history[at:at] = lines


def events(evidence: Evidence, by: str = "early", job: str = A) -> list[dict[str, Any]]:
    return [x for x in evidence.history if x["kind"] == "event" and x["by"] == by and x["job"] == job]


def deltas(log: list[dict[str, Any]]) -> list[int]:
    return [k for k, event in enumerate(log) if event["type"] == "delta"]


# -- one function a way to be bad; its name says which, its result what must be found ---------------------------------


def a_reader_misses_an_event(e: Evidence) -> str:
    e.history.remove(events(e)[10])
    return "seq_gap"


def a_reader_gets_an_event_twice(e: Evidence) -> str:
    line = events(e)[10]
    e.history.insert(e.history.index(line), copy.deepcopy(line))
    return "seq_repeat"


def a_reader_sees_another_token_than_the_next_reader(e: Evidence) -> str:
    event = copy.deepcopy(events(e, "late")[5]["event"])
    event["ids"][0] += 1
    events(e, "late")[5]["event"] = event
    return "changed_event"


def all_readers_see_another_text_than_is_stored(e: Evidence) -> str:
    seq = events(e)[12]["seq"]
    for line in [*events(e), *events(e, "late")]:
        if line["seq"] == seq:
            line["event"] = {**line["event"], "text": " other"}
    return "other_text_than_stored"


def a_reader_gets_two_terminals(e: Evidence) -> str:
    last = events(e)[-1]
    line = {**last, "seq": last["seq"] + 1, "event": {"type": "cancelled"}}
    e.history.insert(e.history.index(last) + 1, line)
    return "two_terminals"


def a_reader_gets_an_event_after_the_end(e: Evidence) -> str:
    last = events(e)[-1]
    line = {**last, "seq": last["seq"] + 1, "event": events(e)[10]["event"]}
    e.history.insert(e.history.index(last) + 1, line)
    return "event_after_terminal"


def a_reader_is_never_told_the_end(e: Evidence) -> str:
    e.history.remove(events(e)[-1])
    return "missing_terminal"


def the_log_has_two_terminals(e: Evidence) -> str:
    log = log_of(e, A)
    put_log(e, A, [*log, {**log[-1], "type": "cancelled"}])
    return "two_terminals"


def the_log_has_no_terminal(e: Evidence) -> str:
    put_log(e, A, log_of(e, A)[:-1])
    return "missing_terminal"


def a_delta_follows_the_terminal(e: Evidence) -> str:
    log = log_of(e, A)
    put_log(e, A, [*log, {"type": "delta", "choice": 1, "index": 0, "ids": [], "text": ""}])
    return "event_after_terminal"


def an_accepted_job_is_gone(e: Evidence) -> str:
    del e.dump["jobs"][A]
    return "job_lost"


def an_accepted_job_never_ends(e: Evidence) -> str:
    e.dump["jobs"][A]["hash"]["state"] = "running"
    put_log(e, A, log_of(e, A)[:-1])
    return "not_ended"


def the_log_lacks_a_seq(e: Evidence) -> str:
    del e.dump["jobs"][A]["log"][9]
    return "log_gap"


def the_log_lacks_a_token(e: Evidence) -> str:
    log = log_of(e, A)
    del log[deltas(log)[4]]
    put_log(e, A, log)
    return "token_gap"


def the_next_owner_repeats_a_token(e: Evidence) -> str:
    log = log_of(e, A)
    second = next(k for k, event in enumerate(log) if event.get("epoch") == 2)
    log.insert(second + 1, log[second - 1])
    put_log(e, A, log)
    return "token_repeat"


def a_token_is_changed_in_log_and_streams(e: Evidence) -> str:
    log = log_of(e, A)
    delta = log[deltas(log)[3]]
    delta["ids"] = [delta["ids"][0] ^ 1]
    delta["text"] = text_of(delta["ids"])
    put_log(e, A, log)
    return "changed_token"


def the_older_owner_writes_after_the_next_has_started(e: Evidence) -> str:
    log = log_of(e, A)
    second = next(k for k, event in enumerate(log) if event.get("epoch") == 2)
    log[second - 1], log[second] = log[second], log[second - 1]
    put_log(e, A, log)
    return "late_owner"


def somebody_unknown_wrote_a_token(e: Evidence) -> str:
    e.records = [r for r in e.records if "-0002-" not in r.get("sequence_id", "")]
    return "unknown_salt"


def an_attempt_did_not_continue_from_what_was_delivered(e: Evidence) -> str:
    log = log_of(e, A)
    started = next(k for k, event in enumerate(log) if event.get("epoch") == 2)
    # The first attempt's last token was another one than the second attempt prefilled.
    delta = log[started - 1]
    delta["ids"] = [delta["ids"][0] ^ 1]
    delta["text"] = text_of(delta["ids"])
    for record in e.records:
        for made in record.get("made", ()):
            if made[0].startswith(f"{A}-0001") and made[1] == delta["index"]:
                made[2] = delta["ids"][0]
    put_log(e, A, log)
    return "wrong_continuation"


def an_attempt_prefilled_too_few_tokens(e: Evidence) -> str:
    next(r for r in e.records if r.get("sequence_id") == f"{A}-0002-000")["delivered_tokens"] -= 1
    return "wrong_prefill"


def an_attempt_started_over(e: Evidence) -> str:
    """Silently, with all tokens made twice."""
    made = [r for r in e.records if r["event"] == "tokens" and r["made"][0][0].startswith(A)]
    e.records += [r for _ in range(30) for r in made]
    return "made_too_much"


def a_job_ran_again_after_its_end(e: Evidence) -> str:
    e.records.append({"event": "prefill", "sequence_id": f"{A}-0009-000", "salt": 1, "delivered_tokens": 20})
    return "ran_after_end"


def an_attempt_is_older_than_the_one_before(e: Evidence) -> str:
    log = log_of(e, A)
    next(event for event in log if event.get("epoch") == 3)["epoch"] = 1
    put_log(e, A, log)
    return "epoch_backwards"


def the_text_is_not_that_of_its_tokens(e: Evidence) -> str:
    log = log_of(e, A)
    log[deltas(log)[5]]["text"] += "!"
    put_log(e, A, log)
    return "text_differs"


def the_result_is_not_the_text_of_the_deltas(e: Evidence) -> str:
    celery = json.loads(e.dump["jobs"][A]["celery"])
    celery["result"]["choices"][0]["text"] += " more"
    e.dump["jobs"][A]["celery"] = json.dumps(celery)
    return "result_differs"


def usage_counts_wrong(e: Evidence) -> str:
    log = log_of(e, A)
    log[-1]["usage"]["completion_tokens"] += 1
    put_log(e, A, log)
    return "wrong_usage"


def attempts_are_counted_wrong(e: Evidence) -> str:
    log = log_of(e, A)
    log[-1]["usage"]["attempts"] = 1
    put_log(e, A, log)
    return "wrong_attempts"


def half_a_character_is_shown(e: Evidence) -> str:
    log = log_of(e, A)
    log[deltas(log)[5]]["text"] = " caf\udcc3"
    put_log(e, A, log)
    return "invalid_utf8"


def a_replacement_character_is_shown(e: Evidence) -> str:
    log = log_of(e, A)
    log[deltas(log)[5]]["text"] = " caf�"
    put_log(e, A, log)
    return "invalid_utf8"


def a_finished_choice_goes_on(e: Evidence) -> str:
    log = log_of(e, B)
    ends = [k for k, event in enumerate(log) if event["type"] == "choice_finished"]
    log.insert(deltas(log)[-2], log.pop(ends[-1]))
    put_log(e, B, log)
    return "delta_of_finished_choice"


def a_choice_is_missing(e: Evidence) -> str:
    log = [event for event in log_of(e, B) if event.get("choice") != 1]
    put_log(e, B, log)
    return "missing_choice"


def a_choice_counts_its_tokens_wrong(e: Evidence) -> str:
    log = log_of(e, B)
    next(event for event in log if event["type"] == "choice_finished")["tokens"] += 1
    put_log(e, B, log)
    return "wrong_token_count"


def the_ledger_says_another_end_than_the_log(e: Evidence) -> str:
    e.dump["jobs"][A]["hash"]["state"] = "cancelled"
    return "state_differs"


def a_poison_job_killed_four(e: Evidence) -> str:
    e.dump["jobs"][A]["hash"]["strikes"] = "4"
    return "too_many_strikes"


def a_reader_is_told_that_an_existing_job_is_unknown(e: Evidence) -> str:
    e.history += [
        {"kind": "open", "t": 99, "by": "third", "job": A, "after": 0},
        {"kind": "error", "t": 99, "by": "third", "job": A, "code": "unknown_job"},
    ]
    return "told_otherwise"


def a_refused_job_is_stored(e: Evidence) -> str:
    e.history.append({"kind": "refused", "t": 99, "job": A, "code": "queue_full"})
    return "refused_but_stored"


def garbage_stands_in_the_log(e: Evidence) -> str:
    e.dump["jobs"][A]["log"][7][1] = "\x00garbage"
    return "bad_event"


def a_key_is_left(e: Evidence) -> str:
    e.dump["leftovers"] = {"unacked": -1}
    return "key_left"


FAULTY: list[Callable[[Evidence], str]] = [
    made for name, made in list(globals().items())
    if callable(made) and getattr(made, "__annotations__", {}).get("return") == "str"
    and getattr(made, "__module__", "") == __name__
]  # fmt: skip


def test_a_good_run_passes() -> None:
    verdict = check(good_run(), in_flight_tokens=3)
    assert verdict.is_clean, verdict.violations or verdict.invalid
    assert verdict.jobs == 2
    assert verdict.cut_streams == 2
    assert verdict.tokens == 25 + 26


@pytest.mark.parametrize("bend", FAULTY, ids=lambda bend: bend.__name__)
def test_a_bad_run_is_found(bend: Callable[[Evidence], str]) -> None:
    evidence = good_run()
    code = bend(evidence)
    assert code in check(evidence, in_flight_tokens=3).codes


def test_there_are_enough_ways_to_be_bad() -> None:
    assert len(FAULTY) >= 30


def test_a_run_whose_kill_landed_nowhere_is_invalid() -> None:
    run = Run()
    run.job(A, [20])
    run.note("fault", what="SIGKILL", pid=1, cuts=True)
    assert check(run.evidence).invalid
    assert not check(run.evidence).violations


def test_the_command_line_reads_a_folder_and_ends_nonzero_for_a_bad_one(tmp_path: Path) -> None:
    def judge(evidence: Evidence) -> subprocess.CompletedProcess[str]:
        (tmp_path / "history-1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evidence.history) + '{"cut')
        (tmp_path / "record-1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evidence.records))
        (tmp_path / "dump.json").write_text(json.dumps(evidence.dump))
        command = [sys.executable, "-m", "tests.faults.checker", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = judge(good_run())
    assert good.returncode == 0, good.stdout + good.stderr
    evidence = good_run()
    an_accepted_job_is_gone(evidence)
    bad = judge(evidence)
    assert bad.returncode == 1
    assert "job_lost" in bad.stdout


def test_the_checker_shares_no_code_with_the_product() -> None:
    for path in (Path(__file__).parent / "checker").glob("*.py"):
        assert "tokenfleet" not in path.read_text()
