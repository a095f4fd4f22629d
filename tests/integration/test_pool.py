"""The asyncio pool, in real workers: ``celery -A tests.integration.pool_app worker`` on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from tests.servers import running_server
from tokenfleet.wire.urls import to_celery
from tokenfleet.workers import lifeline
from tokenfleet.workers.pool import AsyncioPool

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
"""For hangs: nothing here takes that long."""


def until(what: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Poll until ``what()`` is true; its value."""
    end = time.monotonic() + deadline_s
    while not (value := what()):
        assert time.monotonic() < end, f"not within {deadline_s:g} s"
        time.sleep(0.01)
    return value


class Worker:
    """A worker process, the test's client of its app, and what it said."""

    def __init__(self, url: str, folder: Path, slots: int, conf: dict[str, Any], start: Any) -> None:
        broker = to_celery(url)
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.app = Celery("pool_test", broker=broker, backend=broker)
        self.app.conf.task_default_queue = "work"
        self.log = folder / "worker.log"
        setup = {"redis": url, "broker": broker, "conf": conf, "start": start}
        command = [sys.executable, "-m", "celery", "-A", "tests.integration.pool_app", "worker"]
        options = ["-c", str(slots), "-n", "w@test", "--without-gossip", "--without-mingle", "-l", "INFO"]
        environment = {**os.environ, "POOL_TEST": json.dumps(setup), "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = lifeline.spawn([*command, *options], env=environment, cwd=ROOT, output=log)

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(f"tests.integration.pool_app.{task}", args, **options)

    def result(self, task: str, *args: Any, **options: Any) -> Any:
        return self.send(task, *args, **options).get(timeout=DEADLINE_S)

    def open(self, gate: str = "gate") -> None:
        self.redis.set(f"gate {gate}", 1)

    @property
    def said(self) -> list[str]:
        return self.redis.lrange("said", 0, -1)

    def hears(self, *words: str) -> None:
        """Wait until the worker said all of these."""
        try:
            until(lambda: set(words) <= set(self.said))
        except AssertionError:
            raise AssertionError(f"said {self.said}, log:\n{self.log.read_text()}") from None

    def held(self) -> int:
        """Messages that are delivered and not acked."""
        return self.redis.hlen("unacked")

    def queued(self) -> int:
        return self.redis.llen("work")

    def inspect(self, what: str) -> Any:
        inspector = self.app.control.inspect(timeout=DEADLINE_S, limit=1)
        return getattr(inspector, what)()["w@test"]

    def control(self, command: str, **arguments: Any) -> Any:
        replies = self.app.control.broadcast(
            command, arguments=arguments, reply=True, limit=1, timeout=DEADLINE_S, destination=["w@test"]
        )
        return replies[0]["w@test"]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def exits(self) -> int:
        return self.process.wait(DEADLINE_S)


StartWorker = Callable[..., Worker]


@contextlib.contextmanager
def starting_workers(folder: Path) -> Iterator[StartWorker]:
    with running_server() as server, contextlib.ExitStack() as stack:

        def start(
            slots: int = 2, start: Any = None, is_ready: bool = True, conf: dict[str, Any] | None = None
        ) -> Worker:
            worker = Worker(server.url, folder, slots, conf or {}, start)
            stack.callback(worker.redis.close)
            stack.callback(worker.app.close)
            stack.callback(worker.process.kill)
            worker.server = server
            if is_ready:
                worker.hears("ready")
            return worker

        yield start


@pytest.fixture
def start_pool_worker(tmp_path: Path) -> Iterator[StartWorker]:
    with starting_workers(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def _kept_worker() -> Iterator[Worker]:
    with tempfile.TemporaryDirectory() as folder, starting_workers(Path(folder)) as start:
        yield start(slots=4)


@pytest.fixture
def worker(_kept_worker: Worker) -> Iterator[Worker]:
    """One worker with four slots for all tests that leave it running and idle."""
    _kept_worker.redis.delete("said", *_kept_worker.redis.keys("gate *") or ["-"])
    yield _kept_worker
    assert _kept_worker.process.poll() is None, _kept_worker.log.read_text()
    until(lambda: _kept_worker.held() == 0 and _kept_worker.queued() == 0)


# -- tasks --------------------------------------------------------------------------------------------------------


def test_an_async_task_runs_on_the_loop_and_knows_its_request(worker: Worker) -> None:
    sent = worker.send("where")
    assert sent.get(timeout=DEADLINE_S) == {
        "thread": "tokenfleet-loop",
        "id": sent.id,
        "current": "tests.integration.pool_app.where",
        "loop": True,
    }


def test_child_tasks_and_threads_know_the_request_too(worker: Worker) -> None:
    sent = worker.send("helped")
    assert sent.get(timeout=DEADLINE_S) == [sent.id] * 3


def test_a_plain_task_runs_in_a_thread_of_its_own(worker: Worker) -> None:
    assert worker.result("plain").startswith("tokenfleet-task")


def test_all_slots_run_at_once_and_no_more_messages_than_slots_are_held(worker: Worker) -> None:
    sent = [worker.send("wait", i) for i in range(10)]
    until(lambda: len([s for s in worker.said if s.startswith("started")]) == 4)
    assert len(worker.inspect("active")) == 4
    assert worker.inspect("reserved") == []
    stats = worker.inspect("stats")
    assert stats["prefetch_count"] == 4
    assert stats["pool"]["implementation"] == "tests.integration.pool_app:ImpatientPool"
    assert (stats["pool"]["max-concurrency"], stats["pool"]["running"], stats["pool"]["waiting"]) == (4, 4, 0)
    assert (worker.held(), worker.queued()) == (4, 6)
    worker.open()
    assert [s.get(timeout=DEADLINE_S) for s in sent] == list(range(10))


@pytest.mark.parametrize(
    ("how", "state", "error", "runs"),
    [
        ("fine", "SUCCESS", None, 1),
        ("fail", "FAILURE", "ValueError", 1),
        ("retry", "SUCCESS", None, 3),
        ("reject", "FAILURE", "Reject", 1),
        ("exit", "FAILURE", "RuntimeError", 1),
        ("no memory", "FAILURE", "RuntimeError", 1),
        ("cancelled from inside", "FAILURE", "RuntimeError", 1),
        ("exit of a child", "SUCCESS", None, 1),
    ],
)
def test_how_a_coroutine_ends_reaches_celery(
    worker: Worker, how: str, state: str, error: str | None, runs: int
) -> None:
    sent = worker.send("end", how)
    until(sent.ready)
    assert sent.state == state
    assert (type(sent.result).__name__ if error else None) == error
    assert worker.redis.get(sent.id) == str(runs)
    until(lambda: worker.held() == 0)


def test_an_ignored_task_is_acked_and_leaves_no_state(worker: Worker) -> None:
    sent = worker.send("end", "ignore")
    until(lambda: worker.redis.get(sent.id) == "1" and worker.held() == 0)
    assert worker.result("end", "fine") == "fine"
    assert sent.state == "PENDING"


def test_nothing_of_an_ended_task_waits_for_the_garbage_collector(worker: Worker) -> None:
    try:
        for how in ("fine", "fail", "ignore"):
            worker.send("forgotten", how)
            worker.hears(f"gone {how}")
    finally:
        worker.result("collect_garbage")


def test_autoretry_sees_the_exceptions_of_a_coroutine(worker: Worker) -> None:
    assert worker.result("flaky") == 1


# -- revoke and limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminate", [False, True])
def test_revoke_cancels_a_running_coroutine(worker: Worker, terminate: bool) -> None:
    sent = worker.send("wait", "x")
    worker.hears("started x")
    sent.revoke(terminate=terminate)
    worker.hears("cancelled x")
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=DEADLINE_S)
    until(lambda: worker.held() == 0)
    assert worker.inspect("active") == []


def test_revoke_ends_a_task_that_waits_for_a_slot_before_it_starts(worker: Worker) -> None:
    running = [worker.send("wait_acked", i) for i in range(4)]
    until(lambda: len(worker.inspect("active")) == 4)
    late = worker.send("wait", "late")
    until(lambda: worker.inspect("stats")["pool"]["waiting"] == 1)
    assert [r["id"] for r in worker.inspect("reserved")] == [late.id]
    late.revoke()
    with pytest.raises(TaskRevokedError):
        late.get(timeout=DEADLINE_S)
    until(lambda: worker.held() == 0)
    worker.open()
    assert [r.get(timeout=DEADLINE_S) for r in running] == list(range(4))
    assert "started late" not in worker.said


def test_an_eta_task_that_is_due_while_all_slots_are_taken_waits_for_one(worker: Worker) -> None:
    due = worker.send("wait", "due", eta=datetime.now(UTC) + timedelta(seconds=0.5))
    sent = [worker.send("wait", i) for i in range(5)]
    until(lambda: len(worker.inspect("active")) == 4)
    until(lambda: worker.inspect("scheduled") == [])
    assert worker.inspect("stats")["pool"]["running"] == 4
    worker.open()
    assert [s.get(timeout=DEADLINE_S) for s in (*sent, due)] == [*range(5), "due"]


def test_a_coroutine_can_catch_its_soft_time_limit(worker: Worker) -> None:
    assert worker.result("soft", "caught") == "partial"


@pytest.mark.parametrize("how", ["not caught", "with children"])
def test_a_soft_time_limit_that_is_not_caught_fails_the_task(worker: Worker, how: str) -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        worker.result("soft", how)
    if how == "with children":
        worker.hears("child over")


def test_the_hard_time_limit_cancels_the_coroutine(worker: Worker) -> None:
    with pytest.raises(TimeLimitExceeded):
        worker.result("hard")
    worker.hears("hard over")


def test_the_time_limits_of_a_single_call_count(worker: Worker) -> None:
    sent = worker.send("wait", "x", time_limit=0.2)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=DEADLINE_S)
    worker.hears("cancelled x")


# -- the loop and Celery's own thread -----------------------------------------------------------------------------


def test_celery_answers_while_the_loop_is_blocked(worker: Worker) -> None:
    sent = worker.send("block", "x", "door")
    worker.hears("started x")
    queued = worker.send("where")
    assert worker.control("ping") == {"ok": "pong"}
    until(lambda: worker.held() == 2)
    worker.open("door")
    sent.get(timeout=DEADLINE_S)
    assert queued.get(timeout=DEADLINE_S)["loop"]


def test_a_quit_signal_of_a_child_reaches_the_engine_and_not_celery(worker: Worker) -> None:
    assert worker.result("child_quits") == 0
    worker.hears("child quit")
    assert worker.result("end", "fine") == "fine"


def test_grow_and_shrink_change_slots_and_prefetch_and_let_tasks_finish(worker: Worker) -> None:
    def started() -> int:
        return len([s for s in worker.said if s.startswith("started")])

    assert worker.control("pool_shrink", n=4)["error"]
    sent = [worker.send("wait", i, "first") for i in range(10)]
    until(lambda: started() == 4)
    assert "ok" in worker.control("pool_grow", n=2)
    until(lambda: started() == 6)
    assert worker.held() == 6
    assert "ok" in worker.control("pool_shrink", n=4)
    stats = worker.inspect("stats")
    assert (stats["pool"]["max-concurrency"], stats["prefetch_count"], stats["pool"]["running"]) == (2, 2, 6)
    late = [worker.send("wait", i, "second") for i in range(10, 15)]
    worker.open("first")
    assert [s.get(timeout=DEADLINE_S) for s in sent] == list(range(10))
    until(lambda: started() == 12)
    assert len(worker.inspect("active")) == worker.held() == 2
    assert "ok" in worker.control("pool_grow", n=2)
    worker.open("second")
    assert [s.get(timeout=DEADLINE_S) for s in late] == list(range(10, 15))


# -- start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_lifespans_are_entered_before_the_first_task_and_left_after_the_last(
    start_pool_worker: StartWorker, number: signal.Signals
) -> None:
    worker = start_pool_worker(is_ready=False)
    worker.send("wait", "x")
    worker.hears("started x")
    worker.signal(number)
    worker.open()
    assert worker.exits() == 0
    said = [s for s in worker.said if s != "ready"]
    entered = ["outer entered on tokenfleet-loop", "inner entered"]
    assert said == [*entered, "started x", "finished x", "inner left", "outer left"]


def test_a_lifespan_sets_the_number_of_slots(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(slots=1, start=3)
    for i in range(5):
        worker.send("wait", i)
    until(lambda: worker.queued() == 2)
    assert worker.inspect("stats")["prefetch_count"] == 3
    assert worker.held() == len(worker.inspect("active")) == 3


@pytest.mark.parametrize(
    ("start", "line"),
    [("refuse", "There is no model. Name one."), ("break", "ZeroDivisionError: first line second line")],
)
def test_a_failed_start_is_one_line_and_an_exit_status(start_pool_worker: StartWorker, start: str, line: str) -> None:
    worker = start_pool_worker(start=start, is_ready=False)
    assert worker.exits() == 1
    log = worker.log.read_text()
    assert f"The worker can't start: {line}\n" in log
    assert "Traceback" not in log
    assert "ready" not in worker.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_ends_a_start_that_takes_long(start_pool_worker: StartWorker, number: signal.Signals) -> None:
    worker = start_pool_worker(start="hang", is_ready=False)
    worker.hears("starting")
    worker.signal(number)
    assert worker.exits() == (0 if number == signal.SIGTERM else 1)
    assert "start cancelled" in worker.said


def test_a_load_in_a_thread_does_not_hold_up_the_end_of_a_start(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(start="load in a thread", is_ready=False)
    worker.hears("starting")
    worker.signal(signal.SIGTERM)
    assert worker.exits() == 1  # ended by the pool: Python would wait for the thread


# -- stop ---------------------------------------------------------------------------------------------------------


def test_a_warm_shutdown_lets_running_tasks_finish_and_acks_them_at_once(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(slots=2)
    first, second = worker.send("wait", "a", "a"), worker.send("wait", "b", "b")
    worker.hears("started a", "started b")
    worker.send("wait", "c", "a")
    worker.signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in worker.log.read_text())
    worker.signal(signal.SIGTERM)  # a second one changes nothing
    worker.open("a")
    assert first.get(timeout=DEADLINE_S) == "a"
    until(lambda: worker.held() == 1)  # acked while the other still runs
    assert "finished b" not in worker.said
    worker.open("b")
    assert second.get(timeout=DEADLINE_S) == "b"
    assert worker.exits() == 0
    assert (worker.held(), worker.queued()) == (0, 1)
    assert "started c" not in worker.said
    assert worker.said[-2:] == ["inner left", "outer left"]


def test_a_cold_shutdown_cancels_and_gives_messages_back(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(slots=2)
    worker.send("wait", "a")
    worker.send("wait", "b")
    worker.hears("started a", "started b")
    worker.signal(signal.SIGQUIT)
    assert worker.exits() == 1
    assert {"cancelled a", "cancelled b", "inner left", "outer left"} <= set(worker.said)
    assert (worker.held(), worker.queued()) == (0, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_shutdown_gives_back_what_waits_for_a_slot(start_pool_worker: StartWorker, number: signal.Signals) -> None:
    worker = start_pool_worker(slots=1)
    worker.send("wait_acked", "a")
    worker.hears("started a")
    worker.send("wait", "late")
    until(lambda: worker.inspect("stats")["pool"]["waiting"] == 1)
    worker.signal(number)
    if number == signal.SIGTERM:
        until(lambda: worker.redis.pubsub_numpat() == 0)  # it takes no more orders: the shutdown has begun
        worker.open()
    assert worker.exits() == (0 if number == signal.SIGTERM else 1)
    assert (worker.held(), worker.queued()) == (0, 1)
    assert "started late" not in worker.said
    assert "left behind" not in worker.log.read_text()


def test_a_cold_shutdown_cuts_a_warm_one_short(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker()
    worker.send("wait", "a")
    worker.hears("started a")
    worker.signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in worker.log.read_text())
    worker.signal(signal.SIGQUIT)
    worker.exits()
    assert {"cancelled a", "outer left"} <= set(worker.said)
    assert (worker.held(), worker.queued()) == (0, 1)


def test_a_soft_shutdown_gives_tasks_time_then_gives_them_back(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(conf={"worker_soft_shutdown_timeout": 5.0})
    short = worker.send("wait", "short", "short")
    worker.send("wait", "long", "long")
    worker.hears("started short", "started long")
    worker.signal(signal.SIGQUIT)
    until(lambda: "Initiating Soft Shutdown" in worker.log.read_text())
    worker.open("short")
    assert short.get(timeout=DEADLINE_S) == "short"
    assert "cancelled long" not in worker.said
    worker.exits()
    assert {"finished short", "cancelled long", "outer left"} <= set(worker.said)
    assert (worker.held(), worker.queued()) == (0, 1)


@pytest.mark.parametrize(("task", "args"), [("swallow", ["x"]), ("block", ["x", "-"]), ("plain_block", ["x", "-"])])
def test_a_task_that_cannot_be_stopped_does_not_hold_up_a_cold_shutdown(
    start_pool_worker: StartWorker, task: str, args: list[str]
) -> None:
    worker = start_pool_worker()
    worker.send(task, *args)
    worker.hears("started x")
    worker.signal(signal.SIGQUIT)
    worker.exits()
    assert (worker.held(), worker.queued()) == (0, 1)


def test_a_lifespan_that_never_closes_does_not_hold_up_a_cold_shutdown(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(start="never leave")
    worker.signal(signal.SIGQUIT)
    worker.exits()
    assert "outer left" in worker.said


@pytest.mark.parametrize("is_cold", [False, True])
def test_a_worker_whose_engine_died_stops_with_its_status(start_pool_worker: StartWorker, is_cold: bool) -> None:
    worker = start_pool_worker()
    worker.send("wait", "x")
    worker.hears("started x")
    worker.send("engine_died", is_cold)
    worker.open() if not is_cold else worker.hears("cancelled x")
    assert worker.exits() == 70
    assert "outer left" in worker.said
    assert worker.held() == 0
    assert worker.queued() == (1 if is_cold else 0)


def test_what_hangs_does_not_keep_a_worker_whose_engine_died(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker()
    worker.send("wait", "x")  # a task that would go on for ever
    worker.hears("started x")
    worker.send("engine_died", False, 1.0)
    assert worker.exits() not in (0, None)
    assert worker.held() == 1, "not acknowledged: it will come again"


def test_a_worker_whose_loop_ended_does_not_linger(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker()
    worker.send("cancel_everything")
    assert worker.exits() == 70


def test_a_warm_shutdown_while_the_broker_is_away_still_waits_for_tasks(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker()
    worker.send("wait", "a")
    worker.hears("started a")
    worker.server.stop()
    until(lambda: "Connection to broker lost" in worker.log.read_text())
    worker.signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in worker.log.read_text())
    worker.server.start()
    worker.open()
    worker.exits()
    assert {"finished a", "outer left"} <= set(worker.said)


def test_a_cold_shutdown_while_the_broker_is_away_ends(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker()
    worker.send("wait", "a")
    worker.hears("started a")
    worker.server.stop()
    worker.signal(signal.SIGQUIT)
    assert worker.exits() == 1


# -- other surroundings -------------------------------------------------------------------------------------------


def test_the_pool_goes_on_after_the_broker_was_away(start_pool_worker: StartWorker) -> None:
    worker = start_pool_worker(conf={"worker_enable_remote_control": False})
    worker.send("wait", "a")
    worker.hears("started a")
    worker.server.stop()
    worker.server.start()
    worker.redis.delete("said")
    worker.open()
    worker.hears("finished a")
    assert worker.result("end", "fine") == "fine"
    until(lambda: worker.held() == 0)


def test_the_pool_works_without_a_hub() -> None:
    app = Celery("embedded", broker="memory://", backend="cache+memory://")
    app.conf.update(task_acks_late=True, broker_transport_options={"polling_interval": 0.01})

    @app.task(name="double")
    async def double(n: int) -> int:
        return 2 * n

    @app.task(name="half")
    def half(n: int) -> int:
        return n // 2

    with start_worker(app, pool=AsyncioPool, perform_ping_check=False, shutdown_timeout=DEADLINE_S):
        assert double.delay(4).get(timeout=DEADLINE_S) == 8
        assert half.delay(4).get(timeout=DEADLINE_S) == 2
