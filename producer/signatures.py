"""For Celery users: chats and scores as signatures, for chains, groups and chords of their own app.

    from tokenfleet import chat
    chain(fetch.s(url), chat.s(model="smollm2-135m-instruct", max_new_tokens=100), store.s())

A job made from a signature has the task's id: ``AsyncResult(id).get()`` waits for its answer, a dict with ``choices``
and ``usage``. Links, chains and chords go on at the job's end, once. The prompt travels in the user's own message, to
the fleet's queue; from then on only the job's id does.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.canvas import Signature

from tokenfleet.producer.media import references_only
from tokenfleet.wire.keys import Keys


def chat_signature(*messages: Any, model: str, fleet: str = "default", app: Celery | None = None, **named: Any) -> Any:
    """A signature of a chat; arguments as `Client.submit`'s. Without ``messages`` it takes the chain's last result.

    Media are named by reference: the parts that `Client.upload` gives. Raises `InvalidRequest` for media themselves."""
    checked = tuple(references_only(each, {}) for each in messages)
    references_only("media", named)
    return _signature("tokenfleet.chat", checked, model, fleet, app, named)


def score_signature(*texts: Any, model: str, fleet: str = "default", app: Celery | None = None, **named: Any) -> Any:
    """A signature of a scoring job; ``texts`` is one list."""
    return _signature("tokenfleet.score", texts, model, fleet, app, named)


def _signature(name: str, args: Any, model: str, fleet: str, app: Celery | None, named: dict[str, Any]) -> Any:
    # Flower and events show what the sender wrote in these headers: never a prompt.
    options = {"queue": Keys(fleet).queue(model), "argsrepr": "(...)", "kwargsrepr": "{...}"}
    return Signature(name, args=args, kwargs=named, options=options, app=app)
