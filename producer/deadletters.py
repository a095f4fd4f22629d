"""Dead letters: jobs given up because worker after worker died under them. Look at them, and try them again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.events import Failed, decode
from tokenfleet.wire.jobs import JobOptions, parse_request
from tokenfleet.wire.ledger import Ledger, checked, translated, unknown
from tokenfleet.wire.media import media_entries

if TYPE_CHECKING:
    from tokenfleet.wire.chat import ChatRequest, ScoreRequest


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A failed job with its payload, as long as it is kept (7 days for what was given up). Times: Redis' clock, ms."""

    job_id: str
    model: str
    code: str
    message: str
    strikes: int
    attempts: int
    completion_tokens: int
    submitted_ms: int
    ended_ms: int
    kept_ms: int
    """How much longer it is kept."""
    deaths: tuple[str, ...]
    """Who died under it and when, the last few: ``<ms> worker <id> died in attempt <n>``."""
    request: bytes
    """The payload as JSON."""
    options: JobOptions

    def parsed(self) -> ChatRequest | ScoreRequest:
        """Raises `InvalidRequest` if it is what this release can't read."""
        return parse_request(self.request)


async def dead_letters(ledger: Ledger) -> list[DeadLetter]:
    """The jobs that were given up, oldest first. Raises `FleetUnavailable`."""
    async with translated():
        ids = [job_id.decode() for job_id in await _db(ledger).zrange(ledger.keys.dead, 0, -1)]
    found = [await _read(ledger, job_id) for job_id in ids]
    return sorted((letter for letter in found if letter is not None), key=lambda letter: letter.ended_ms)


async def dead_letter(ledger: Ledger, job_id: str) -> DeadLetter:
    """One failed job. Raises `UnknownJob`, and `InvalidRequest` (``not_a_dead_letter``) for one that has not failed."""
    letter = await _read(ledger, checked(job_id))
    if letter is None:
        state = (await ledger.status(job_id)).state  # raises UnknownJob
        raise InvalidRequest(f"Job {job_id} has not failed: it is {state}.", code="not_a_dead_letter")
    return letter


async def requeue(ledger: Ledger, job_id: str, *, max_queued: int = 100_000) -> str:
    """Queue a failed job's request again, as a new job with ``retry_of``, and take it off the list; the new job's id.

    Asking twice makes one job: the new id follows from the old one. Raises what `dead_letter` and submitting raise."""
    letter = await dead_letter(ledger, job_id)
    entries = media_entries(letter.options.tenant, letter.parsed())
    options = letter.options.model_copy(update={"retry_of": job_id, "delay_s": 0.0})
    h = hashlib.sha256(f"retry of {job_id}".encode()).hexdigest()
    new_id = f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:32]}"
    await ledger.submit(new_id, letter.model, letter.request, options, max_queued=max_queued, media=entries)
    async with translated():
        await _db(ledger).zrem(ledger.keys.dead, job_id)
    return new_id


async def _read(ledger: Ledger, job_id: str) -> DeadLetter | None:
    async with translated():
        pipe = _db(ledger).pipeline(transaction=False)
        pipe.hgetall(ledger.keys.job(job_id)).pttl(ledger.keys.job(job_id))
        stored, kept_ms = await pipe.execute()
    f = {name.decode(): value for name, value in stored.items()}
    if f.get("state") != b"failed":
        return None
    terminal = decode(f["terminal"])
    if not isinstance(terminal, Failed):
        raise unknown(job_id)
    error = terminal.error
    return DeadLetter(
        job_id=job_id,
        model=f["model"].decode(),
        code=error.code,
        message=error.message,
        strikes=int(f["strikes"]),
        attempts=int(f["epoch"]),
        completion_tokens=int(f["tokens"]),
        submitted_ms=int(f["submitted_ms"]),
        ended_ms=int(f["ended_ms"]),
        kept_ms=max(0, kept_ms),
        deaths=tuple(f.get("deaths", b"").decode().splitlines()),
        request=f["request"],
        options=JobOptions.model_validate_json(f.get("options", b"{}")),
    )


def _db(ledger: Ledger) -> Any:
    return ledger.client  # redis-py's annotations can't tell a client that decodes from one that doesn't
