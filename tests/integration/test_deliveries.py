"""The book of unacknowledged messages, on a real Valkey through real kombu. The hub's clock is the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue

from tests.servers import RedisServer
from tokenfleet.workers.deliveries import BOOKED_AFTER_S, LEDGER_TASK, harden


class Taker:
    """A consumer on a hardened channel, as a worker's; ``planned`` is what waits for the hub's timer."""

    def __init__(self, server: RedisServer) -> None:
        self.names = {"unacked_key": f"{server.fleet}.book", "unacked_index_key": f"{server.fleet}.book_index"}
        self.redis = server.client(decode_responses=True)
        self.connection = Connection(server.celery_url, transport_options=self.names)
        self.channel = self.connection.channel()
        self.planned: list[tuple[float, Callable[[], None]]] = []
        hub = SimpleNamespace(call_later=lambda delay_s, call: self.planned.append((delay_s, call)))
        harden(self.channel, hub)
        self.queue = Queue(f"{server.fleet}.work")
        self.taken: list[Any] = []
        self.consumer = Consumer(self.channel, [self.queue], on_message=self.taken.append)
        self.consumer.consume()

    def send(self, task: str, count: int = 1) -> None:
        with self.connection.Producer() as producer:
            for _ in range(count):
                producer.publish("[]", routing_key=self.queue.name, headers={"task": task})

    def take(self, count: int = 1) -> list[Any]:
        before = len(self.taken)
        while len(self.taken) < before + count:
            self.connection.drain_events(timeout=30)
        return self.taken[before:]

    def later(self) -> None:
        """The hub's timers come due."""
        planned, self.planned = self.planned, []
        for _, call in planned:
            call()

    @property
    def book(self) -> set[str]:
        records = set(self.redis.hkeys(self.names["unacked_key"]))
        assert records == set(self.redis.zrange(self.names["unacked_index_key"], 0, -1))
        return records

    @property
    def queued(self) -> int:
        return self.redis.llen(self.queue.name)


@pytest.fixture
def taker(shared_redis: RedisServer) -> Iterator[Taker]:
    taker = Taker(shared_redis)
    yield taker
    taker.connection.close()
    taker.redis.close()


def test_jobs_are_written_down_together_and_rubbed_out_when_acked(taker: Taker) -> None:
    taker.send(LEDGER_TASK, 3)
    first, second, third = taker.take(3)
    assert taker.book == set()
    assert [delay_s for delay_s, _ in taker.planned] == [BOOKED_AFTER_S]
    second.ack()  # before it was written down: it never is
    taker.later()
    assert taker.book == {first.delivery_tag, third.delivery_tag}
    first.ack()
    third.ack()
    assert taker.book == set()
    taker.send(LEDGER_TASK)
    (fourth,) = taker.take()
    taker.later()
    assert taker.book == {fourth.delivery_tag}


def test_what_may_be_all_there_is_of_a_job_is_written_down_before_it_is_taken(taker: Taker) -> None:
    taker.send("tokenfleet.chat")
    (message,) = taker.take()
    assert taker.book == {message.delivery_tag}
    assert not taker.planned


def test_a_job_that_is_put_back_was_written_down_or_not(taker: Taker) -> None:
    for is_written in (True, False):
        taker.send(LEDGER_TASK)
        (message,) = taker.take()
        if is_written:
            taker.later()
        message.requeue()
        assert taker.book == set()
        assert taker.queued == 1
        (again,) = taker.take()
        again.ack()
        taker.later()
        assert taker.book == set()


def test_what_was_not_acked_goes_back_when_the_channel_closes(taker: Taker) -> None:
    taker.send(LEDGER_TASK, 2)
    taker.send("tokenfleet.chat")
    taker.take(3)[0].ack()
    taker.consumer.cancel()
    taker.channel.close()
    assert (taker.queued, taker.book) == (2, set())


def test_a_full_redis_does_not_end_the_worker(taker: Taker, caplog: pytest.LogCaptureFixture) -> None:
    taker.send(LEDGER_TASK)
    (message,) = taker.take()
    taker.redis.set(taker.names["unacked_key"], "what can't be written to")
    taker.later()
    taker.redis.delete(taker.names["unacked_key"])
    message.ack()
    assert not taker.redis.exists(taker.names["unacked_key"])
