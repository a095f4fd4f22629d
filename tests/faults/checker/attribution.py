"""Who made which token: by the salts, and the engines' own records (I5, and the cost of takeovers).

A salted token shows 16 bits of its attempt's salt, and follows from prompt, all ids before it and the whole salt
(engines/scripted/salted.py describes it; written again here). So the log alone tells whether an attempt continued from
exactly what was delivered.

Codes: late_owner, unknown_salt, wrong_continuation, changed_token, epoch_backwards, wrong_prefill, made_too_much,
ran_after_end, never_made.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tests.faults.checker.evidence import TERMINALS, Evidence
from tests.faults.checker.ledger import Log
from tests.faults.checker.streams import cut
from tests.faults.checker.vocabulary import salt_of

if TYPE_CHECKING:
    from tests.faults.checker.verdict import Verdict

Sequence = tuple[str, int, int]  # job, attempt, choice


def check(evidence: Evidence, verdict: Verdict, logs: dict[str, Log], *, in_flight_tokens: int, is_plain: bool) -> None:
    salts: dict[Sequence, int] = {}
    prefilled: dict[Sequence, int] = {}
    made: dict[Sequence, dict[int, int]] = defaultdict(dict)
    n_made: dict[str, int] = defaultdict(int)
    for line in evidence.records:
        if line["event"] == "prefill":
            sequence = parse(line["sequence_id"])
            if line["salt"] is not None:
                salts[sequence] = line["salt"]
            prefilled[sequence] = line["delivered_tokens"]
        elif line["event"] == "tokens":
            for sequence_id, index, token, _ in line["made"]:
                sequence = parse(sequence_id)
                made[sequence][index] = token
                n_made[sequence[0]] += 1
    for job, log in logs.items():
        verdict.tokens += sum(len(event["ids"]) for event in log if event["type"] == "delta")
        verdict.cut_streams += cut(log)
        prompt = json.loads(evidence.dump["jobs"][job]["hash"].get("prompt") or "[]")
        _check_job(job, log, prompt, salts, prefilled, made, verdict, is_plain=is_plain)
        delivered = sum(len(event["ids"]) for event in log if event["type"] == "delta")
        attempts = {attempt for of_job, attempt, _ in prefilled if of_job == job}
        choices = {choice for of_job, _, choice in prefilled if of_job == job}
        # Only an attempt that was cut may have made tokens that never got out.
        cuts = len(attempts) - (bool(log) and log[-1]["type"] == "finished")
        if n_made[job] > delivered + max(0, cuts) * in_flight_tokens * max(1, len(choices)):
            verdict.found("I5", "made_too_much", job, f"{n_made[job]} tokens made, {delivered} delivered, {cuts} cuts")


def _check_job(
    job: str,
    log: Log,
    prompt: list[int],
    salts: dict[Sequence, int],
    prefilled: dict[Sequence, int],
    made: dict[Sequence, dict[int, int]],
    verdict: Verdict,
    *,
    is_plain: bool,
) -> None:
    def found(code: str, detail: str = "") -> None:
        verdict.found("I5", code, job, detail)

    epoch, ids = 0, defaultdict(list)
    states: dict[int, int] = {}
    for event in log:
        if event["type"] == "started":
            if event["epoch"] <= epoch:
                found("epoch_backwards", f"{event['epoch']} after {epoch}")
            epoch = event["epoch"]
            for (of_job, attempt, choice), delivered in prefilled.items():
                if of_job == job and attempt == epoch and delivered != len(ids[choice]):
                    found("wrong_prefill", f"attempt {epoch}, choice {choice}: {delivered} for {len(ids[choice])}")
        elif event["type"] == "delta":
            choice = event["choice"]
            for token in event["ids"]:
                index, sequence = len(ids[choice]), (job, epoch, choice)
                visible = salt_of(token)
                state = states.setdefault(choice, digest(prompt))
                if visible is not None and not is_plain:
                    _attribute(found, sequence, index, token, visible, salts, state)
                if sequence in made and made[sequence].get(index) != token:
                    found("changed_token" if index in made[sequence] else "never_made", f"index {index} of {sequence}")
                states[choice] = mix(state ^ token)
                ids[choice].append(token)
        elif event["type"] in TERMINALS:
            last = max((attempt for of_job, attempt, _ in prefilled if of_job == job), default=0)
            if last > max(epoch, int(event.get("usage", {}).get("attempts", 1))):
                found("ran_after_end", f"attempt {last} of {epoch}")


def _attribute(
    found: Any, sequence: Sequence, index: int, token: int, visible: int, salts: dict[Sequence, int], state: int
) -> None:
    salt = salts.get(sequence)
    if salt is not None and salt & 0xFFFF == visible:
        if token != 1024 + visible * 16 + (mix(state ^ salt) & 15):
            found("wrong_continuation", f"index {index} does not follow from what was delivered before it")
        return
    job, epoch, choice = sequence
    owner = next((e for (j, e, c), s in salts.items() if (j, c) == (job, choice) and s & 0xFFFF == visible), None)
    if owner is None:
        found("unknown_salt", f"index {index} of attempt {epoch}: made by nobody who ran this job")
    else:
        found("late_owner", f"index {index} was made by attempt {owner} and stands in attempt {epoch}")


def parse(sequence_id: str) -> Sequence:
    job, attempt, choice = sequence_id.rsplit("-", 2)
    return job, int(attempt), int(choice)


def digest(prompt: list[int]) -> int:
    return int.from_bytes(hashlib.blake2b(array.array("q", prompt).tobytes(), digest_size=8).digest(), "big")


def mix(value: int) -> int:
    """splitmix64's finaliser."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
