"""What follows a job in Celery's canvas: link, link_error, the rest of a chain, a chord's count. Sent once, at its end.

The worker that ends the job sends them at once; what is left in the outbox (the job was cancelled from outside, or the
worker died) is sent by whichever worker reaps next. Messages are built by Celery, collected instead of sent, and then
sent by one script together with the job's removal from the outbox.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import redis
from celery import Celery, signature
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from kombu.utils.json import dumps

from tokenfleet.wire import scripts
from tokenfleet.wire.keys import Keys

log = logging.getLogger(__name__)

# A Context's names for what a message's headers and embed say.
_NAMES = ("callbacks", "errbacks", "chain", "chord", "group", "group_index", "root_id", "parent_id")


def links_of(request: Any) -> bytes:
    """The links of a Celery request as JSON for the ledger; empty if it has none."""
    links = {name: value for name in _NAMES if (value := getattr(request, name, None)) not in (None, [], ())}
    follows = any(name in links for name in ("callbacks", "errbacks", "chain", "chord", "group"))
    return json.dumps(links).encode() if follows else b""


def send_links(app: Celery, client: redis.Redis, keys: Keys, job_id: str) -> bool:
    """Send what follows an ended job, unless somebody has. Blocking: for a thread. Raises redis-py's exceptions."""
    links, meta = client.hget(keys.job(job_id), "links"), client.get(f"celery-task-meta-{job_id}")
    if not links or not meta:  # its retention is over
        scripts.run_blocking(client, "links", keys.prefix, job_id)
        return False
    request, outcome = Context(json.loads(links), id=job_id), json.loads(meta)
    is_success = outcome["status"] == "SUCCESS"
    result = outcome["result"] if is_success else _exception(app, outcome)
    messages = _collect(app, request, result, is_success=is_success)
    if request.chord:  # before the job leaves the outbox, else nobody tries again; Celery counts a part once
        app.backend.on_chord_part_return(request, outcome["status"], result)
    sent = scripts.run_blocking(client, "links", keys.prefix, job_id, *(part for pair in messages for part in pair))
    return bool(sent)


def _exception(app: Celery, outcome: dict[str, Any]) -> BaseException:
    error = app.backend.exception_to_python(outcome["result"])
    return error if isinstance(error, BaseException) else TaskRevokedError(str(error))


def _collect(app: Celery, request: Context, result: Any, *, is_success: bool) -> list[tuple[str, str]]:
    """(list key, message) of everything that Celery would send now."""
    collected: list[tuple[str, str]] = []
    with app.connection_for_write() as connection:
        channel = connection.channel()

        def put(queue: str, message: dict[str, Any], **_: Any) -> None:
            priority = channel._get_message_priority(message, reverse=False)
            collected.append((channel._q_for_pri(queue, priority), dumps(message)))  # type: ignore[no-untyped-call]

        channel._put = put
        producer = app.amqp.Producer(channel)
        root_id = request.root_id or request.id
        if is_success:
            for callback in request.callbacks or ():
                signature(callback, app=app).apply_async(
                    (result,), parent_id=request.id, root_id=root_id, producer=producer
                )
            if request.chain:
                *rest, following = request.chain
                signature(following, app=app).apply_async(
                    (result,), chain=rest, parent_id=request.id, root_id=root_id, producer=producer
                )
        else:
            for errback in request.errbacks or ():
                # As Celery calls an errback whose task it doesn't have itself: with the failed task's id.
                signature(errback, app=app).apply_async(
                    (request.id,), parent_id=request.id, root_id=root_id, producer=producer
                )
    return collected
