"""The ledger's dump: every accepted job ended exactly once (I1, I4), and its log, text, result and usage agree (I3).

Codes: job_lost, not_ended, log_gap, two_terminals, event_after_terminal, missing_terminal, state_differs, bad_event,
token_gap, token_repeat, delta_of_finished_choice, missing_choice, wrong_token_count, wrong_usage, wrong_attempts,
invalid_utf8, text_differs, result_differs, too_many_strikes, key_left, refused_but_stored.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.faults.checker.evidence import TERMINALS, Evidence, Line
from tests.faults.checker.vocabulary import text_of

if TYPE_CHECKING:
    from tests.faults.checker.verdict import Verdict

Log = list[Line]


def check(evidence: Evidence, verdict: Verdict, *, is_over: bool) -> dict[str, Log]:
    """Returns the events of each job by the dump, index = seq - 1."""
    logs: dict[str, Log] = {}
    accepted = {line["job"]: line for line in evidence.of_kind("accepted")}
    lost = {line["job"] for line in evidence.of_kind("error") if line["code"] in ("lost_state", "unknown_job")}
    forgotten = any(fault["what"] == "lose all" for fault in evidence.of_kind("fault"))
    for job, entry in evidence.dump["jobs"].items():
        logs[job] = _check_job(job, entry, accepted.get(job, {}), verdict, is_over=is_over)
    for job in accepted.keys() - logs.keys():
        if not (forgotten and job in lost):
            verdict.found("I1", "job_lost", job, "it was accepted, and Redis knows nothing of it")
    for line in evidence.of_kind("refused"):
        if line.get("job") in logs:
            verdict.found("I9", "refused_but_stored", line["job"], line["code"])
    for name, ttl_ms in evidence.dump.get("leftovers", {}).items():
        verdict.found("I8", "key_left", "-", f"{name} (expires in {ttl_ms} ms)")
    return logs


def _check_job(job: str, entry: dict[str, Any], accepted: Line, verdict: Verdict, *, is_over: bool) -> Log:
    def found(invariant: str, code: str, detail: str = "") -> None:
        verdict.found(invariant, code, job, detail)

    stored, log = entry["hash"], []
    if [entry_id for entry_id, _ in entry["log"]] != [f"{k + 1}-0" for k in range(len(entry["log"]))]:
        found("I2", "log_gap", str([entry_id for entry_id, _ in entry["log"]])[:200])
    for entry_id, text in entry["log"]:
        try:
            event = json.loads(text)
            event["type"]
        except (ValueError, KeyError, TypeError):
            found("I3", "bad_event", entry_id)
            event = {"type": "?"}
        log.append(event)
    if not log:
        found("I1", "job_lost", "its log is empty")
        return log
    terminals = [k for k, event in enumerate(log) if event["type"] in TERMINALS]
    if len(terminals) > 1:
        found("I4", "two_terminals", ", ".join(log[k]["type"] for k in terminals))
    elif terminals and terminals[0] != len(log) - 1:
        found("I4", "event_after_terminal", log[-1]["type"])
    is_ended = stored["state"] in TERMINALS
    if is_over and not is_ended:
        found("I1", "not_ended", stored["state"])
    if is_ended and not terminals:
        found("I4", "missing_terminal", stored["state"])
    if terminals and log[-1]["type"] != stored["state"] and len(terminals) == 1:
        found("I4", "state_differs", f"the ledger says {stored['state']}, the log {log[terminals[0]]['type']}")
    if int(stored["seq"]) != len(log):
        found("I2", "state_differs", f"the ledger counts {stored['seq']} events, the log has {len(log)}")
    if int(stored["strikes"]) > 3:
        found("I7", "too_many_strikes", stored["strikes"])
    _check_text(log, stored, entry.get("celery"), accepted, found)
    return log


def _check_text(log: Log, stored: dict[str, str], celery: str | None, accepted: Line, found: Any) -> None:
    ids: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    ended: dict[int, Line] = {}
    for event in log:
        if event["type"] == "delta":
            choice = event["choice"]
            known = ids.setdefault(choice, [])
            if choice in ended:
                found("I2", "delta_of_finished_choice", f"choice {choice}")
            if event["index"] > len(known):
                found("I2", "token_gap", f"choice {choice}: {len(known)} tokens, then index {event['index']}")
            elif event["index"] < len(known):
                found("I2", "token_repeat", f"choice {choice}: index {event['index']} after {len(known)} tokens")
            known += event["ids"]
            texts[choice] = texts.get(choice, "") + event["text"]
            if not is_utf8(event["text"]):
                found("I3", "invalid_utf8", f"choice {choice}, index {event['index']}")
        elif event["type"] == "choice_finished":
            if event["choice"] in ended:
                found("I4", "two_terminals", f"choice {event['choice']} finished twice")
            ended[event["choice"]] = event
            if event["tokens"] != len(ids.get(event["choice"], [])):
                found("I3", "wrong_token_count", f"choice {event['choice']}: {event['tokens']}")
    for choice, text in texts.items():
        stop = (ended.get(choice) or {}).get("stop")
        # What a stop string cut off is in the ids, not in the text; so is EOS.
        whole = text_of(ids[choice])
        if whole is not None and (not whole.startswith(text) if stop or choice not in ended else whole != text):
            found("I3", "text_differs", f"choice {choice}: the text is not that of its tokens")
    last = log[-1]
    if last["type"] not in TERMINALS:
        return
    tokens = sum(map(len, ids.values()))
    usage = last.get("usage", {})
    if usage.get("completion_tokens", 0) != tokens:
        found("I3", "wrong_usage", f"{usage.get('completion_tokens', 0)} by usage, {tokens} in the log")
    if usage.get("attempts", 1) != int(stored["epoch"]):
        found("I3", "wrong_attempts", f"{usage.get('attempts', 1)} by usage, {stored['epoch']} by the ledger")
    if last["type"] != "finished":
        return
    if "scores" not in last and set(ended) != set(range(accepted.get("n", len(ended) or 1))):
        found("I3", "missing_choice", f"finished with choices {sorted(ended)}")
    result = json.loads(celery)["result"] if celery else None
    said = {c.get("index", 0): c.get("text", "") for c in (result or {}).get("choices", [])}
    if result is None or {k: v for k, v in said.items() if v} != {k: v for k, v in texts.items() if v}:
        found("I3", "result_differs", "the stored result is not the text of the deltas")


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\ufffd" not in text
