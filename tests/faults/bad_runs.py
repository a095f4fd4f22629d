"""Ways in which a run can be bad: one function each; its name says which, its result what must be found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

from tests.faults.checker import Evidence
from tests.faults.checker.vocabulary import text_of
from tests.faults.honest_run import A, B, deltas, events, log_of, put_log


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
