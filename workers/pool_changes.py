"""What the pool changes in Celery and kombu while it runs: two things, each for a reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.worker import state
from celery.worker.control import Panel
from kombu.transport.redis import Channel as RedisChannel


def keep_client(channel: Any) -> None:
    """Have kombu's Redis channel write its book of unacked messages through one client object.

    It makes a new one for every delivery and every ack (the connections are pooled, the objects are not): a fifth of
    the CPU that a worker spends on a no-op task.
    """
    if not isinstance(channel, RedisChannel):
        return
    redis_channel: Any = channel  # kombu has no types
    kept = redis_channel._create_client()

    @contextmanager
    def conn_or_acquire(client: Any = None) -> Iterator[Any]:
        yield client or kept

    redis_channel.conn_or_acquire = conn_or_acquire


def let_revoke_cancel(pool_class: type) -> None:
    """A plain ``revoke`` of a task that already runs here (or waits for a slot) means: cancel it.

    Celery itself only does so with ``terminate=True``: killing a process is drastic; cancelling a coroutine isn't.
    """
    celery_revoke = Panel.data["revoke"]
    if getattr(celery_revoke, "cancels_coroutines", False):
        return

    def revoke(node: Any, task_id: Any, terminate: bool = False, signal: Any = None, **kwargs: Any) -> Any:
        ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
        if isinstance(node.consumer.pool, pool_class) and any(i in state.requests for i in ids):
            terminate = True
        return celery_revoke(node, ids, terminate=terminate, signal=signal, **kwargs)

    revoke.cancels_coroutines = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = revoke
